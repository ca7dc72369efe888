"""Batches of texts of similar length. Their order depends only on the seed and the step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foredraft.core.contracts import Target
from foredraft.heads.layers import FINAL
from foredraft.train.texts import Text, features_of, grouped

POOL = 1024
"""Number of texts that are sorted by length together before they are cut into batches."""


class Batch(NamedTuple):
    """A batch of b texts, padded on the right to t positions.

    Attributes:
        ids: token ids.
        features: the target's features of the layers that the head reads, concatenated.
        final: the target's features after its last norm.
        answer: whether the head learns from the token at a position. It is false at padding.
        num_tokens: number of answer tokens. Each counts as one token pass.
    """

    ids: Int[Tensor, "b t"]
    features: Float[Tensor, "b t f"]
    final: Float[Tensor, "b t d"]
    answer: Bool[Tensor, "b t"]
    num_tokens: int


def collate(texts: Sequence[Text], layers: Sequence[int], target: Target) -> Batch:
    """Makes a batch of texts, on the target's device.

    Args:
        layers: the target's layers whose features the head reads. They are concatenated in this order.
        target: the target model. It runs over the batch if the texts hold no features.
    """
    ids = pad_sequence([text.ids.long() for text in texts], batch_first=True)
    answer = pad_sequence([text.answer for text in texts], batch_first=True)
    if not texts[0].features:
        texts = _with_features(texts, list(dict.fromkeys([*layers, *FINAL])), target)
    final = _features(texts, FINAL, target.device)
    features = final if tuple(layers) == FINAL else _features(texts, layers, target.device)
    return Batch(ids.to(target.device), features, final, answer.to(target.device), int(answer.sum()))


def _with_features(texts: Sequence[Text], layers: Sequence[int], target: Target) -> list[Text]:
    features = features_of(target, [text.ids.tolist() for text in texts], layers)
    parts = [rows.chunk(len(layers), dim=1) for rows in features]
    return [text._replace(features=dict(zip(layers, chunks, strict=True))) for text, chunks in zip(texts, parts, strict=True)]


def _features(texts: Sequence[Text], layers: Sequence[int], device: torch.device) -> Float[Tensor, "b t f"]:
    parts = [torch.cat([text.features[layer] for layer in layers], dim=1) for text in texts]
    return pad_sequence(parts, batch_first=True).to(device).float()


def epoch(texts: Sequence[Text], tokens: int, seed: int, number: int) -> list[list[Text]]:
    """Puts every text into one batch, with about `tokens` positions a batch, padding included.

    Args:
        number: number of the epoch. It decides the order together with `seed`.
    """
    rng = random.Random(f"{seed}/{number}")
    order = rng.sample(texts, len(texts))
    pools = [order[first : first + POOL] for first in range(0, len(order), POOL)]
    groups = [group for pool in pools for group in grouped(pool, [len(text.ids) for text in pool], tokens)]
    rng.shuffle(groups)
    return groups


def endless(texts: Sequence[Text], tokens: int, seed: int, first: int = 0) -> Iterator[list[Text]]:
    """Yields batches without end, epoch after epoch, starting from batch number `first`."""
    for number in count():
        groups = epoch(texts, tokens, seed, number)
        yield from groups[first:]
        first = max(0, first - len(groups))
