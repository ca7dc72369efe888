"""Shards: files of training texts with the target's features at every token.

The target generates the answers, or the data holds them and a mask marks their tokens. A shard without features holds only
texts, and the target runs over each batch again (`foredraft.train.batches`).

A shard is written under another name first, so it is complete or missing. `manifest.json` records what the shards were made
from and the hash of each tensor. A run can therefore continue after an interruption, and damage is found before training.
Each layer's features are a separate tensor, so a head reads only the layers that it uses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foredraft.core.errors import UserError
from foredraft.core.params import SamplingParams
from foredraft.core.progress import progress_bar
from foredraft.llm import LLM
from foredraft.train.corpus import Corpus, Prompt, Usage
from foredraft.train.texts import Text, features_of

SHARD_TEXTS = 256
"""Number of texts in a shard."""


_MAY_DIFFER = ("num_tokens", "feature_layers", "seed")
"""Facts that a later run may change: it may add shards, use fewer layers, or use another seed on the same texts."""

_TEXT_VERSION = 2
"""Version of the order and rendering of the conversations. Version 1 left out system turns and tool turns."""


class TrainingError(UserError):
    """A run cannot continue. The message gives the reason, the files that are intact, and what to do."""


class Plan(NamedTuple):
    """The content that the shards should have.

    Attributes:
        temperatures: temperatures of the answers, used in turn over the prompts.
        max_len: largest number of tokens of a prompt and its answer together.
        num_tokens: total number of answer tokens, without the held-out ones.
        feature_layers: the target's layers, as in `Target.forward`; if empty, the shards hold only texts.
        seed: seed of the prompts' order and of the sampled answers.
    """

    temperatures: Sequence[float]
    max_len: int
    num_tokens: int
    feature_layers: Sequence[int]
    seed: int


def capture(
    llm: LLM, read: Callable[[int], Corpus], plan: Plan, folder: Path, about: Mapping[str, Any], layers: Sequence[int]
) -> list[Text]:
    """Makes the shards that are missing, and opens all shards.

    Args:
        llm: the target, without speculation.
        read: returns the prompts in the order of a seed. It is called only if shards are missing.
        plan: the content that the shards should have.
        folder: folder of the shards.
        about: further facts on which the shards depend: the target's fingerprint, the data, and whose answers are used.
        layers: layers whose features are opened, if the shards hold features.

    Raises:
        TrainingError: existing shards were made from something else, lack a layer or are damaged, or a shard cannot be written.
    """
    facts = json.loads(json.dumps({**plan._asdict(), **about}))
    manifest = _read_manifest(folder, facts)
    plan = plan._replace(feature_layers=manifest["made_from"]["feature_layers"], seed=manifest["made_from"]["seed"])
    layers = layers if plan.feature_layers else ()
    if missing := {*layers} - {*plan.feature_layers}:
        raise TrainingError(
            f"the shards in {folder} lack the target's layers {sorted(missing)}", "give another --shards folder"
        )
    tokens = sum(shard["answer_tokens"] for shard in manifest["shards"])
    if tokens < plan.num_tokens:
        if manifest["shards"] and manifest["text_version"] != _TEXT_VERSION:
            raise TrainingError(
                f"the shards in {folder} were begun by another version of foredraft, which read conversations differently",
                "give another --shards folder, or delete this one",
            )
        prompts, usage = read(plan.seed)
        folder.mkdir(parents=True, exist_ok=True)
        prompts.sort(key=lambda prompt: not prompt.held_out)  # held-out ones are in the first shards
        manifest |= {"text_version": _TEXT_VERSION, "usage": vars(usage)}
        _write(llm, prompts, plan, folder, manifest)
    return [text for shard in manifest["shards"] for text in open_shard(folder / shard["name"], shard["sha256"], layers)]


def usage_lines(folder: Path) -> list[str]:
    """Returns the lines of `Usage.lines` for the shards in a folder: the conversations that were not used, and why."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("text_version", 1) != _TEXT_VERSION:
        return [f"the shards in {folder} are by an earlier version of foredraft, which left out system and tool turns"]
    usage = manifest["usage"]
    return Usage(usage["conversations"], Counter(usage["left_out"]), Counter(usage["in_part"])).lines()


def _write(llm: LLM, prompts: Sequence[Prompt], plan: Plan, folder: Path, manifest: dict[str, Any]) -> None:
    """Makes shards until there are enough tokens or no more prompts, and enters each into the manifest."""
    tokens = sum(shard["answer_tokens"] for shard in manifest["shards"])
    with progress_bar("answer tokens", plan.num_tokens) as advance:
        advance(tokens)
        for first in range(len(manifest["shards"]) * SHARD_TEXTS, len(prompts), SHARD_TEXTS):
            if tokens >= plan.num_tokens:
                break
            file = folder / f"{len(manifest['shards']):05d}.safetensors"
            new = _write_shard(llm, prompts[first : first + SHARD_TEXTS], plan, file, first, advance)
            manifest["shards"].append(new)
            write_whole(folder / "manifest.json", lambda file: file.write_text(json.dumps(manifest, indent=1)))
            tokens += new["answer_tokens"]


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
        changes = (f"{key} {manifest['made_from'].get(key)} (now {facts[key]})" for key in different)
        raise TrainingError(
            f"the shards in {folder} were made with {' and '.join(changes)}",
            "give another --shards folder, or delete this one",
        )
    return manifest


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name, and renames it when it is on the disk. On failure the old file stays intact.

    Args:
        write: writes the content to the path that it is given.

    Raises:
        TrainingError: the file cannot be written.
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
            f"cannot write {file} ({reason})", "its old content is intact. Free disk space and run the same command again"
        ) from None


def _write_shard(
    llm: LLM, prompts: Sequence[Prompt], plan: Plan, file: Path, first: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Writes the shard of some prompts, the first of which has the index `first`. `advance` counts answer tokens."""
    given = prompts[0].mask is not None
    texts = [prompt.ids for prompt in prompts] if given else _answer(llm, prompts, plan, first, advance)
    masks = [torch.tensor(prompt.mask) for prompt in prompts] if given else []
    prompt_lens = [prompt.mask.index(True) if prompt.mask else len(prompt.ids) for prompt in prompts]
    features = [rows.cpu() for rows in features_of(llm.target, texts, plan.feature_layers)] if plan.feature_layers else []
    layers = torch.cat(features).chunk(len(plan.feature_layers), dim=1) if features else ()
    tensors = {
        "ids": torch.tensor([token for text in texts for token in text], dtype=torch.int32),
        "lengths": torch.tensor([len(text) for text in texts]),
        "prompt_lens": torch.tensor(prompt_lens),
        "held_out": torch.tensor([prompt.held_out for prompt in prompts]),
        **({"mask": torch.cat(masks)} if given else {}),
        **{_name(layer): rows.contiguous() for layer, rows in zip(plan.feature_layers, layers, strict=True)},
    }
    write_whole(file, lambda part: save_file(tensors, part))
    answers = [
        sum(prompt.mask) if prompt.mask else len(text) - len(prompt.ids)
        for text, prompt in zip(texts, prompts, strict=True)
        if not prompt.held_out
    ]
    advance(sum(answers) if given else 0)
    hashes = {name: _sha256(tensor) for name, tensor in tensors.items()}
    return {"name": file.name, "sha256": hashes, "answer_tokens": sum(answers)}


def _name(layer: int) -> str:
    return f"features.{layer}"


def _answer(llm: LLM, prompts: Sequence[Prompt], plan: Plan, first: int, advance: Callable[[int], None]) -> list[list[int]]:
    """Returns the prompts with the target's own answers, the end of sequence included."""
    temperatures = [plan.temperatures[(first + i) % len(plan.temperatures)] for i in range(len(prompts))]
    sampling = [
        SamplingParams(temperature=temperature, max_tokens=plan.max_len - len(prompt.ids), seed=plan.seed + first + i)
        for i, (temperature, prompt) in enumerate(zip(temperatures, prompts, strict=True))
    ]
    texts = []
    for at in range(0, len(prompts), llm.max_num_seqs):
        wave = prompts[at : at + llm.max_num_seqs]
        results = llm.generate([prompt.ids for prompt in wave], sampling[at : at + llm.max_num_seqs])
        texts += [prompt.ids + result.outputs[0].token_ids for prompt, result in zip(wave, results, strict=True)]
        new = zip(wave, results, strict=True)
        advance(sum(len(result.outputs[0].token_ids) for prompt, result in new if not prompt.held_out))
    return texts


def open_shard(file: Path, sha256: Mapping[str, str], layers: Sequence[int]) -> list[Text]:
    """Opens the texts of a shard with the features of some layers, mapped into memory.

    Args:
        sha256: hash of each tensor, by name.

    Raises:
        TrainingError: the shard is missing or damaged.
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
            f"the shard {file} is missing or damaged",
            f"Delete the folder {file.parent} and run again, to make the shards again",
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
