"""Rows of the shards, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foredraft.train.shards import grouped

BATCH_TOKENS = 8192
"""Positions in a batch, padding included."""

POOL = 2048
"""Rows among which those of like length are put together."""


class Row(NamedTuple):
    """A text with the target's features; `kind` says how the text was made. The features stay on disk until they are read."""

    ids: Int[Tensor, " n"]
    features: Float[Tensor, "n d"]
    prompt_len: int
    held_out: bool
    kind: str


def load_rows(folder: Path) -> list[Row]:
    """The texts of all shards."""
    return [Row(**row) for path in sorted(folder.glob("*.pt")) for row in torch.load(path, mmap=True)]


def epoch(rows: Sequence[Row], seed: int) -> list[list[Row]]:
    """All rows once, in batches of like length, in an order that the seed decides."""
    rng = random.Random(seed)
    order = rng.sample(rows, len(rows))
    pools = [order[first : first + POOL] for first in range(0, len(order), POOL)]
    groups = [group for pool in pools for group in grouped(pool, [len(row.ids) for row in pool], BATCH_TOKENS)]
    rng.shuffle(groups)
    return groups


class Batch(NamedTuple):
    """Right-padded tokens, the target's features and a loss weight at each position; causal attention needs no mask."""

    ids: Int[Tensor, "b n"]
    features: Float[Tensor, "b n d"]
    weights: Float[Tensor, "b n"]


def collate(rows: Sequence[Row], prompt_weight: float) -> Batch:
    """Puts rows side by side; a position counts 1 where it scores a token of the answer, `prompt_weight` before."""
    weights = [torch.ones(len(row.ids)) for row in rows]
    for weight, row in zip(weights, rows, strict=True):
        weight[: row.prompt_len - 1] = prompt_weight  # the prompt's last token already scores the answer's first
    columns = [row.ids for row in rows], [row.features for row in rows], weights
    return Batch(*(pad_sequence(column, batch_first=True) for column in columns))
