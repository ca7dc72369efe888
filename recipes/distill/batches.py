"""Reads the rows of the shards, and makes batches of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foredraft.train.texts import grouped

BATCH_TOKENS = 8192
"""Number of positions in a batch, padding included."""

POOL = 2048
"""Number of rows that are sorted by length together before they are cut into batches."""


class Row(NamedTuple):
    """A text with the target's features, which stay on disk until they are read.

    Attributes:
        ids: token ids.
        features: the target's final features at each token.
        prompt_len: number of tokens of the prompt.
        held_out: whether the text is kept for evaluation.
        kind: how the text was made: ``text``, or ``temperature_`` and the temperature.
    """

    ids: Int[Tensor, " n"]
    features: Float[Tensor, "n d"]
    prompt_len: int
    held_out: bool
    kind: str


def load_rows(folder: Path) -> list[Row]:
    """Reads the texts of all shards."""
    return [Row(**row) for path in sorted(folder.glob("*.pt")) for row in torch.load(path, mmap=True)]


def epoch(rows: Sequence[Row], seed: int) -> list[list[Row]]:
    """Puts every row into one batch, with rows of similar length. The seed decides the order of the batches."""
    rng = random.Random(seed)
    order = rng.sample(rows, len(rows))
    pools = [order[first : first + POOL] for first in range(0, len(order), POOL)]
    groups = [group for pool in pools for group in grouped(pool, [len(row.ids) for row in pool], BATCH_TOKENS)]
    rng.shuffle(groups)
    return groups


class Batch(NamedTuple):
    """A right-padded batch: tokens, the target's features, and loss weights. Causal attention needs no mask for the padding."""

    ids: Int[Tensor, "b n"]
    features: Float[Tensor, "b n d"]
    weights: Float[Tensor, "b n"]


def collate(rows: Sequence[Row], prompt_weight: float) -> Batch:
    """Makes a batch of rows.

    A position has weight 1 if it predicts a token of the answer, and weight `prompt_weight` before.
    """
    weights = [torch.ones(len(row.ids)) for row in rows]
    for weight, row in zip(weights, rows, strict=True):
        weight[: row.prompt_len - 1] = prompt_weight  # the last position of the prompt predicts the answer's first token
    columns = [row.ids for row in rows], [row.features for row in rows], weights
    return Batch(*(pad_sequence(column, batch_first=True) for column in columns))
