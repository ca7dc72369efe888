"""Batches of texts of like length, in an order that the seed and the step alone decide."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foredraft.drafters.heads import FINAL
from foredraft.train.shards import Text, features_of, grouped

POOL = 1024
"""Texts among which those of like length are put together."""


class Batch(NamedTuple):
    """Texts side by side, padded on the right.

    Attributes:
        features: the target's, of the layers that a head is given.
        final: those after the target's last norm.
        answer: whether the token at a position belongs to an answer that is learned from; padding does not.
        num_tokens: answer tokens: one token pass each.
    """

    ids: Int[Tensor, "b t"]
    features: Float[Tensor, "b t f"]
    final: Float[Tensor, "b t d"]
    answer: Bool[Tensor, "b t"]
    num_tokens: int


def collate(texts: Sequence[Text], layers: Sequence[int], target: Any) -> Batch:
    """Puts texts side by side, on the target's device.

    Args:
        layers: whose features a head is given, side by side.
        target: the model that is drafted for; it is run where the texts have come without features.
    """
    ids = pad_sequence([text.ids.long() for text in texts], batch_first=True)
    answer = pad_sequence([text.answer for text in texts], batch_first=True)
    if not texts[0].features:
        texts = _with_features(texts, list(dict.fromkeys([*layers, *FINAL])), target)
    final = _features(texts, FINAL, target.device)
    features = final if tuple(layers) == FINAL else _features(texts, layers, target.device)
    return Batch(ids.to(target.device), features, final, answer.to(target.device), int(answer.sum()))


def _with_features(texts: Sequence[Text], layers: Sequence[int], target: Any) -> list[Text]:
    found = features_of(target, [text.ids.tolist() for text in texts], layers)
    parts = [one.chunk(len(layers), dim=1) for one in found]
    return [text._replace(features=dict(zip(layers, some, strict=True))) for text, some in zip(texts, parts, strict=True)]


def _features(texts: Sequence[Text], layers: Sequence[int], device: torch.device) -> Float[Tensor, "b t f"]:
    parts = [torch.cat([text.features[layer] for layer in layers], dim=1) for text in texts]
    return pad_sequence(parts, batch_first=True).to(device).float()


def epoch(texts: Sequence[Text], tokens: int, seed: int, number: int) -> list[list[Text]]:
    """All texts once, in batches of about `tokens` positions."""
    rng = random.Random(f"{seed}/{number}")
    order = rng.sample(texts, len(texts))
    pools = [order[first : first + POOL] for first in range(0, len(order), POOL)]
    groups = [group for pool in pools for group in grouped(pool, [len(text.ids) for text in pool], tokens)]
    rng.shuffle(groups)
    return groups


def endless(texts: Sequence[Text], tokens: int, seed: int, first: int = 0) -> Iterator[list[Text]]:
    """Epoch after epoch of batches, from batch number `first` on."""
    for number in count():
        groups = epoch(texts, tokens, seed, number)
        yield from groups[first:]
        first = max(0, first - len(groups))
