"""Training texts: their tokens, the target's features at every token, and groups of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.cache.blocks import num_blocks
from foredraft.core.contracts import Target
from foredraft.core.tree import TreeBatch

CAPTURE_TOKENS = 2048
"""Number of positions in one pass of the target on a CPU. Larger passes do not fit in the cache of a small CPU."""

CAPTURE_TOKENS_ON_A_CARD = 16_384
"""Number of positions in one pass of the target on a GPU, which larger passes keep busy."""


class Text(NamedTuple):
    """A training text.

    Attributes:
        ids: token ids.
        features: the target's features, by layer. They stay on disk until they are read. Empty if the shards hold only texts.
        prompt_len: number of tokens before the first answer.
        held_out: whether the text is kept for evaluation.
        mask: whether the head learns from each token; None: from all tokens after the prompt.
    """

    ids: Int[Tensor, " n"]
    features: Mapping[int, Float[Tensor, "n d"]]
    prompt_len: int
    held_out: bool
    mask: Bool[Tensor, " n"] | None = None

    @property
    def answer(self) -> Bool[Tensor, " n"]:
        """Whether the head learns from each token."""
        return torch.arange(len(self.ids)) >= self.prompt_len if self.mask is None else self.mask

    @property
    def answer_share(self) -> float:
        """Share of answer tokens among all tokens of the text, 0 to 1."""
        return 1 - self.prompt_len / len(self.ids) if self.mask is None else float(self.mask.float().mean())


def features_of(target: Target, texts: Sequence[list[int]], feature_layers: Sequence[int]) -> list[Float[Tensor, "n f"]]:
    """Computes the target's features at the tokens of each text, in bfloat16, the layers concatenated."""
    found: dict[int, Tensor] = {}
    tokens = CAPTURE_TOKENS if target.device.type == "cpu" else CAPTURE_TOKENS_ON_A_CARD
    for group in grouped(range(len(texts)), [len(text) for text in texts], tokens):
        pool = target.new_pool(num_blocks(max(len(texts[i]) for i in group), len(group)))
        batch = TreeBatch.chains([texts[i] for i in group])
        scores = target.forward(
            batch, [pool.allocate() for _ in group], np.empty(0, np.int64), feature_layers=tuple(feature_layers)
        )
        assert scores.features is not None
        found |= dict(zip(group, scores.features.bfloat16().split([len(texts[i]) for i in group]), strict=True))
    return [found[i] for i in range(len(texts))]


def grouped(items: Sequence[Any], lengths: Sequence[int], tokens: int) -> Iterator[list[Any]]:
    """Yields groups of items of similar length, the shortest items first.

    Each group has at most `tokens` positions, padding included. Only a group of a single item may have more.
    """
    group: list[Any] = []
    for length, item in sorted(zip(lengths, items, strict=True), key=lambda pair: pair[0]):
        if group and (len(group) + 1) * length > tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
