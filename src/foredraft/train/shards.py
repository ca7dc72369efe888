"""Texts with the target's features at every token, in files that are mapped into memory. The target wrote the answers, or they
are given and a mask says which tokens they are. Without layers, a shard holds the texts alone, and the target is run over each
batch again (`foredraft.train.batches`).

A shard is whole or not there: it is written under another name first. `manifest.json` says what the shards were made from and
what each tensor of them hashes to, so that a run goes on where it was cut off, and damage is found before it is trained on.
Features of different layers are tensors of their own: a head that uses one layer reads no other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foredraft.llm import LLM
from foredraft.params import SamplingParams
from foredraft.progress import progress_bar
from foredraft.train.corpus import Corpus, Prompt, Usage
from foredraft.tree import TreeBatch

SHARD_TEXTS = 256
CAPTURE_TOKENS = 2048
"""Positions in one pass of the target: wider passes leave the cache of a small CPU."""

CAPTURE_TOKENS_ON_A_CARD = 16_384
"""The same on a card, which wider passes keep busy."""

_MAY_DIFFER = ("num_tokens", "feature_layers", "seed")
"""More shards may be asked for, fewer layers used, and several seeds may learn from the same texts."""

_TEXT_VERSION = 2
"""Of the order and rendering of the conversations. Version 1 left out system turns and tool turns."""


class TrainingError(ValueError):
    """A run cannot go on; the message says why, what stands and what to do."""


class Plan(NamedTuple):
    """What the shards are to hold.

    Attributes:
        temperatures: of the answers, in turn over the prompts.
        max_len: tokens of prompt and answer together.
        num_tokens: answer tokens in all, held-out ones apart.
        feature_layers: of the target, as in `Target.forward`; none: texts alone are kept.
    """

    temperatures: Sequence[float]
    max_len: int
    num_tokens: int
    feature_layers: Sequence[int]
    seed: int


class Text(NamedTuple):
    """One text; its features, by layer, stay on disk until they are read. None are there where texts alone are kept.

    Attributes:
        prompt_len: tokens before the first answer.
        mask: which tokens are learned from; None: all after `prompt_len`.
    """

    ids: Int[Tensor, " n"]
    features: Mapping[int, Float[Tensor, "n d"]]
    prompt_len: int
    held_out: bool
    mask: Bool[Tensor, " n"] | None = None

    @property
    def answer(self) -> Bool[Tensor, " n"]:
        """Whether each token is learned from."""
        return torch.arange(len(self.ids)) >= self.prompt_len if self.mask is None else self.mask

    @property
    def answer_share(self) -> float:
        """Answer tokens, of all."""
        return 1 - self.prompt_len / len(self.ids) if self.mask is None else float(self.mask.float().mean())


def capture(
    llm: LLM, read: Callable[[int], Corpus], plan: Plan, folder: Path, about: Mapping[str, Any], layers: Sequence[int]
) -> list[Text]:
    """Writes what is missing of the shards, and opens them all.

    Args:
        llm: the target, decoding plainly.
        read: gives the prompts in the order of a seed; asked where shards are missing.
        about: what the shards depend on beside the plan: the target's fingerprint, the data, whose answers.
        layers: whose features are opened, if any are kept.

    Raises:
        TrainingError: shards there were made from something else, lack a layer, are damaged, or cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = json.loads(json.dumps({**plan._asdict(), **about}))
    manifest = _read_manifest(folder, facts)
    plan = plan._replace(feature_layers=manifest["made_from"]["feature_layers"], seed=manifest["made_from"]["seed"])
    layers = layers if plan.feature_layers else ()
    if missing := {*layers} - {*plan.feature_layers}:
        raise TrainingError(f"the shards in {folder} lack the target's layers {sorted(missing)}: give another --shards folder")
    tokens = sum(shard["answer_tokens"] for shard in manifest["shards"])
    if tokens < plan.num_tokens:
        if manifest["shards"] and manifest["text_version"] != _TEXT_VERSION:
            raise TrainingError(
                f"the shards in {folder} were begun by another version of foredraft, which read conversations in another way: "
                "give another --shards folder, or delete it"
            )
        prompts, usage = read(plan.seed)
        prompts.sort(key=lambda prompt: not prompt.held_out)  # held-out ones are in the first shards
        manifest |= {"text_version": _TEXT_VERSION, "usage": vars(usage)}
        _write(llm, prompts, plan, folder, manifest)
    return [text for shard in manifest["shards"] for text in open_shard(folder / shard["name"], shard["sha256"], layers)]


def usage_lines(folder: Path) -> list[str]:
    """What the shards in a folder hold no text of, with the reasons, see `Usage.lines`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("text_version", 1) != _TEXT_VERSION:
        return [f"the shards in {folder} are by an earlier version of foredraft, which left out system and tool turns"]
    usage = manifest["usage"]
    return Usage(usage["conversations"], Counter(usage["left_out"]), Counter(usage["in_part"])).lines()


def _write(llm: LLM, prompts: Sequence[Prompt], plan: Plan, folder: Path, manifest: dict[str, Any]) -> None:
    """Shard after shard, until there are enough tokens or no more prompts; each is entered into the manifest."""
    tokens = sum(shard["answer_tokens"] for shard in manifest["shards"])
    with progress_bar("answer tokens", plan.num_tokens) as advance:
        advance(tokens)
        for first in range(len(manifest["shards"]) * SHARD_TEXTS, len(prompts), SHARD_TEXTS):
            if tokens >= plan.num_tokens:
                break
            new = _write_shard(llm, prompts[first : first + SHARD_TEXTS], plan, folder, len(manifest["shards"]), first)
            manifest["shards"].append(new)
            write_whole(folder / "manifest.json", lambda file: file.write_text(json.dumps(manifest, indent=1)))
            tokens += new["answer_tokens"]
            advance(new["answer_tokens"])


def _read_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    file = folder / "manifest.json"
    if not file.exists():
        return {"text_version": _TEXT_VERSION, "made_from": facts, "shards": []}
    try:
        manifest = json.loads(file.read_text())
    except ValueError:
        raise TrainingError(f"{file} is damaged: delete {folder} and run again") from None
    manifest.setdefault("text_version", 1)
    manifest["made_from"].setdefault("answers", "own")
    different = [key for key in facts if manifest["made_from"].get(key) != facts[key] and key not in _MAY_DIFFER]
    if different:
        raise TrainingError(
            f"the shards in {folder} were made with another {' and '.join(different)}: "
            "give another --shards folder, or delete it"
        )
    return manifest


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name and puts it in its place when it is on the disk, so that it is whole or what it was.

    Raises:
        TrainingError: it cannot be written.
    """
    part = file.with_name(file.name + ".part")
    try:
        write(part)
        with part.open("rb") as done:
            os.fsync(done.fileno())
        part.replace(file)
    except (OSError, SafetensorError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise TrainingError(
            f"cannot write {file} ({reason}): what was there before stands; make room and run the same command again"
        ) from None


def _write_shard(llm: LLM, prompts: Sequence[Prompt], plan: Plan, folder: Path, number: int, first: int) -> dict[str, Any]:
    given = prompts[0].mask is not None
    texts = [prompt.ids for prompt in prompts] if given else _answer(llm, prompts, plan, first)
    masks = [torch.tensor(prompt.mask) for prompt in prompts] if given else []
    prompt_lens = [prompt.mask.index(True) if prompt.mask else len(prompt.ids) for prompt in prompts]
    features = [one.cpu() for one in features_of(llm.target, texts, plan.feature_layers)] if plan.feature_layers else []
    layers = torch.cat(features).chunk(len(plan.feature_layers), dim=1) if features else ()
    tensors = {
        "ids": torch.tensor([token for text in texts for token in text], dtype=torch.int32),
        "lengths": torch.tensor([len(text) for text in texts]),
        "prompt_lens": torch.tensor(prompt_lens),
        "held_out": torch.tensor([prompt.held_out for prompt in prompts]),
        **({"mask": torch.cat(masks)} if given else {}),
        **{_name(layer): one.contiguous() for layer, one in zip(plan.feature_layers, layers, strict=True)},
    }
    file = folder / f"{number:05d}.safetensors"
    write_whole(file, lambda part: save_file(tensors, part))
    answers = [
        sum(one.mask) if one.mask else len(text) - len(one.ids)
        for text, one in zip(texts, prompts, strict=True)
        if not one.held_out
    ]
    hashes = {name: _sha256(tensor) for name, tensor in tensors.items()}
    return {"name": file.name, "sha256": hashes, "answer_tokens": sum(answers)}


def _name(layer: int) -> str:
    return f"features.{layer}"


def _answer(llm: LLM, prompts: Sequence[Prompt], plan: Plan, first: int) -> list[list[int]]:
    """Prompts with the target's own answers, the end of sequence included."""
    ways = [plan.temperatures[(first + i) % len(plan.temperatures)] for i in range(len(prompts))]
    sampling = [
        SamplingParams(temperature=way, max_tokens=plan.max_len - len(prompt.ids), seed=plan.seed + first + i)
        for i, (way, prompt) in enumerate(zip(ways, prompts, strict=True))
    ]
    results = llm.generate([prompt.ids for prompt in prompts], sampling)
    return [prompt.ids + result.outputs[0].token_ids for prompt, result in zip(prompts, results, strict=True)]


def features_of(target: Any, texts: Sequence[list[int]], feature_layers: Sequence[int]) -> list[Float[Tensor, "n f"]]:
    """The target's features at the tokens of each text, as they are kept: in bfloat16, the layers side by side."""
    found: dict[int, Tensor] = {}
    tokens = CAPTURE_TOKENS if target.device.type == "cpu" else CAPTURE_TOKENS_ON_A_CARD
    for group in grouped(range(len(texts)), [len(text) for text in texts], tokens):
        pool = target.new_pool(len(group), max(len(texts[i]) for i in group))
        batch = TreeBatch.chains([texts[i] for i in group])
        scores = target.forward(
            batch, [pool.allocate() for _ in group], np.empty(0, np.int64), feature_layers=tuple(feature_layers)
        )
        found |= dict(zip(group, scores.features.bfloat16().split([len(texts[i]) for i in group]), strict=True))
    return [found[i] for i in range(len(texts))]


def open_shard(file: Path, sha256: Mapping[str, str], layers: Sequence[int]) -> list[Text]:
    """The texts of a shard with the features of some layers, mapped into memory.

    Raises:
        TrainingError: it is missing or damaged.
    """
    masked = ["mask"] if "mask" in sha256 else []
    names = ["ids", "lengths", "prompt_lens", "held_out", *masked, *map(_name, layers)]
    try:
        with safe_open(file, framework="pt") as shard:
            whole = {name: shard.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        whole = {}
    if any(name not in whole or _sha256(whole[name]) != sha256[name] for name in names):
        raise TrainingError(
            f"the shard {file} is missing or damaged: delete the folder {file.parent} and run again, and it is made anew"
        )
    lengths = whole["lengths"].tolist()
    features = {layer: whole[_name(layer)].split(lengths) for layer in layers}
    masks = whole["mask"].split(lengths) if masked else [None] * len(lengths)
    columns = whole["ids"].split(lengths), whole["prompt_lens"], whole["held_out"], masks
    return [
        Text(ids, {layer: features[layer][i] for layer in layers}, int(start), bool(held), mask)
        for i, (ids, start, held, mask) in enumerate(zip(*columns, strict=True))
    ]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).hexdigest()


def grouped(items: Sequence[Any], lengths: Sequence[int], tokens: int) -> Iterator[list[Any]]:
    """Groups of like length that take at most about `tokens` positions each, padding included; the shortest first."""
    group: list[Any] = []
    for length, item in sorted(zip(lengths, items, strict=True), key=lambda pair: pair[0]):
        if group and (len(group) + 1) * length > tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
