"""Captures texts and the target's final features at each of their tokens. The target generates most of the texts.

The features take a tenth of the space of the next-token distributions. The target's output layer computes the distributions
from them when a batch needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foredraft import LLM, SamplingParams
from foredraft.cache.blocks import num_blocks
from foredraft.core.progress import progress_bar
from foredraft.core.tree import TreeBatch
from foredraft.models.llama import LlamaTarget
from foredraft.train.texts import grouped

from .corpus import Example

WAYS = (1.0, None, 0.7, 1.0, None, 1.0, 0.0, None)
"""Kinds of texts, used in turn: the temperature of a sampled answer, or None for the training text itself.

Most samples have temperature 1. The other temperatures show the drafter greedy text too, which loops. Running a given text
costs a third of sampling one.
"""

HELD_OUT_WAYS = (1.0, 0.0, None)

MAX_PROMPT = 1024
WINDOW = 512
"""Largest number of tokens of a sampled text. After a long prompt, a training text may have up to `MAX_PROMPT + ROOM`."""

ROOM = 64
"""Smallest number of tokens for an answer. If a prompt leaves less of the window, sampling would not pay."""

SHARD_TEXTS = 256
CAPTURE_TOKENS = 2048
"""Number of positions in one pass of the target. Larger passes do not fit in the CPU's cache."""


class Plan(NamedTuple):
    """Plan of a text: an example, and the temperature of the target's answer (None: the answer in the data)."""

    example: Example
    temperature: float | None


def plan_texts(examples: Sequence[Example]) -> list[Plan]:
    """Plans the texts: the held-out examples at all of their temperatures, then the others at one temperature each."""
    examples = [example for example in examples if len(example.prompt_ids) <= MAX_PROMPT]
    held = [Plan(example, way) for example in examples if example.held_out for way in HELD_OUT_WAYS]
    others = [example for example in examples if not example.held_out]
    plan = held + [Plan(example, WAYS[i % len(WAYS)]) for i, example in enumerate(others)]
    return [text._replace(temperature=None) if len(text.example.prompt_ids) > WINDOW - ROOM else text for text in plan]


def capture(llm: LLM, plan: Sequence[Plan], folder: Path, num_tokens: int) -> None:
    """Writes shards of texts with their features until the answers have `num_tokens` tokens. Existing shards are kept."""
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
    """Makes the texts of a shard, runs the target over them, and writes texts and features."""
    texts = write_texts(llm, plan)
    rows = [
        {
            "ids": torch.tensor(text),
            "features": features.clone(),  # a view would be saved with its whole storage
            "prompt_len": len(planned.example.prompt_ids),
            "held_out": planned.example.held_out,
            "kind": "text" if planned.temperature is None else f"temperature_{planned.temperature:g}",
        }
        for planned, text, features in zip(plan, texts, run_texts(llm.target, texts), strict=True)
    ]
    torch.save(rows, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)  # an interruption never leaves half a shard


def write_texts(llm: LLM, plan: Sequence[Plan]) -> list[list[int]]:
    """Returns prompts with answers of the target or of the data. The end of sequence is dropped, since nothing follows it."""
    texts = [text_of(planned.example) for planned in plan]
    temperatures = {i: planned.temperature for i, planned in enumerate(plan) if planned.temperature is not None}
    sampling = {i: SamplingParams(temperature=temperature) for i, temperature in temperatures.items()}
    results = llm.generate([plan[i].example.prompt_ids for i in sampling], list(sampling.values()))
    for i, result in zip(sampling, results, strict=True):
        output = result.outputs[0]
        answer_ids = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
        texts[i] = result.prompt_token_ids + answer_ids
    return texts


def text_of(example: Example) -> list[int]:
    """Returns prompt and answer of the data, cut at the window, or `ROOM` tokens after a long prompt."""
    return (example.prompt_ids + example.answer_ids)[: max(WINDOW, len(example.prompt_ids) + ROOM)]


def run_texts(target: LlamaTarget, texts: Sequence[list[int]]) -> list[Tensor]:
    """Computes the target's final features `[n, d]` at the tokens of each text."""
    features: dict[int, Tensor] = {}
    for group in grouped(range(len(texts)), [len(text) for text in texts], CAPTURE_TOKENS):
        batch, pool = TreeBatch.chains([texts[i] for i in group]), target.new_pool(num_blocks(WINDOW, len(group)))
        nothing = np.empty(0, np.int64)
        scores = target.forward(batch, [pool.allocate() for _ in group], nothing, feature_layers=(-1,))
        assert scores.features is not None
        features |= dict(zip(group, scores.features.split([len(texts[i]) for i in group]), strict=True))
    return [features[i] for i in range(len(texts))]
