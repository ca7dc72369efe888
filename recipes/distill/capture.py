"""Texts, most of them written by the target itself, and the target's final features at every token of them.

The features are a tenth of the size of the next-token laws, which the target's head gives back when a batch needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foredraft import LLM, SamplingParams
from foredraft.models.llama import LlamaTarget
from foredraft.progress import progress_bar
from foredraft.train.shards import grouped
from foredraft.tree import TreeBatch

from .corpus import Example

WAYS = (1.0, None, 0.7, 1.0, None, 1.0, 0.0, None)
"""How texts are made, in turn: sampled at a temperature, or None: the training text itself. Sampled ones mostly at 1, the
rest so that the drafter also meets greedy text, which loops. To run a given text costs a third of sampling one."""

HELD_OUT_WAYS = (1.0, 0.0, None)

MAX_PROMPT = 1024
WINDOW = 512
"""Tokens of the longest sampled text; behind a long prompt a training text may go on to `MAX_PROMPT + ROOM`."""

ROOM = 64
"""Tokens that an answer gets at least. Behind a prompt that leaves less of the window, sampling would not pay."""

SHARD_TEXTS = 256
CAPTURE_TOKENS = 2048
"""Positions in one pass of the target: wider passes leave the cache."""


class Plan(NamedTuple):
    """What will become a text: an example, and the temperature at which it is answered (None: by the data)."""

    example: Example
    temperature: float | None


def plan_texts(examples: Sequence[Example]) -> list[Plan]:
    """The held-out examples in each of their ways, then the others, one way each."""
    examples = [example for example in examples if len(example.prompt_ids) <= MAX_PROMPT]
    held = [Plan(example, way) for example in examples if example.held_out for way in HELD_OUT_WAYS]
    others = [example for example in examples if not example.held_out]
    plan = held + [Plan(example, WAYS[i % len(WAYS)]) for i, example in enumerate(others)]
    return [one._replace(temperature=None) if len(one.example.prompt_ids) > WINDOW - ROOM else one for one in plan]


def capture(llm: LLM, plan: Sequence[Plan], folder: Path, num_tokens: int) -> None:
    """Writes shards of texts with their features until the answers have `num_tokens`; finished shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    found = 0
    with progress_bar("answer tokens", num_tokens) as advance:
        for number, first in enumerate(range(0, len(plan), SHARD_TEXTS)):
            path = folder / f"{number:05d}.pt"
            if not path.exists():
                save_shard(llm, plan[first : first + SHARD_TEXTS], path)
            more = sum(len(row["ids"]) - row["prompt_len"] for row in torch.load(path, mmap=True))
            advance(more)
            found += more
            if found >= num_tokens:
                break


def save_shard(llm: LLM, plan: Sequence[Plan], path: Path) -> None:
    """Makes the texts of a shard, runs the target over them and writes both."""
    texts = write_texts(llm, plan)
    rows = [
        {
            "ids": torch.tensor(text),
            "features": features.clone(),  # a view would be saved with all that it is a view of
            "prompt_len": len(one.example.prompt_ids),
            "held_out": one.example.held_out,
            "kind": "text" if one.temperature is None else f"temperature_{one.temperature:g}",
        }
        for one, text, features in zip(plan, texts, run_texts(llm.target, texts), strict=True)
    ]
    torch.save(rows, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)  # a kill never leaves half a shard


def write_texts(llm: LLM, plan: Sequence[Plan]) -> list[list[int]]:
    """Prompts with the target's answers or the data's, without an end of sequence: nothing is predicted after it."""
    texts = [text_of(one.example) for one in plan]
    sampling = {i: SamplingParams(temperature=one.temperature) for i, one in enumerate(plan) if one.temperature is not None}
    results = llm.generate([plan[i].example.prompt_ids for i in sampling], list(sampling.values()))
    for i, result in zip(sampling, results, strict=True):
        output = result.outputs[0]
        answer_ids = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
        texts[i] = result.prompt_token_ids + answer_ids
    return texts


def text_of(example: Example) -> list[int]:
    """Prompt and answer of the data, cut at the window or a little behind a long prompt."""
    return (example.prompt_ids + example.answer_ids)[: max(WINDOW, len(example.prompt_ids) + ROOM)]


def run_texts(target: LlamaTarget, texts: Sequence[list[int]]) -> list[Tensor]:
    """The target's final features `[n, d]` at the tokens of each text."""
    features: dict[int, Tensor] = {}
    for group in grouped(range(len(texts)), [len(text) for text in texts], CAPTURE_TOKENS):
        batch, pool = TreeBatch.chains([texts[i] for i in group]), target.new_pool(len(group), WINDOW)
        nothing = np.empty(0, np.int64)
        scores = target.forward(batch, [pool.allocate() for _ in group], nothing, feature_layers=(-1,))
        assert scores.features is not None
        features |= dict(zip(group, scores.features.split([len(texts[i]) for i in group]), strict=True))
    return [features[i] for i in range(len(texts))]
