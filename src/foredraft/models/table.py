"""Targets whose law is a table. They are exact in float64 and serve as the reference in tests and theory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache as memoize
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import Scores
from foredraft.core.errors import UserError
from foredraft.core.tree import Ids, TreeBatch

Law = Callable[[tuple[int, ...]], Float[np.ndarray, " v"]]
"""The law of the next token after a whole prefix."""


def random_law(vocab_size: int, seed: int, zeros: float = 0.0, concentration: float = 1.0) -> Law:
    """Makes a law with a distinct Dirichlet row for every prefix. A share `zeros` of its entries is zero, never all."""

    @memoize
    def law(prefix: tuple[int, ...]) -> Float[np.ndarray, " v"]:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        row = rng.dirichlet(np.full(vocab_size, concentration))
        row[(rng.random(vocab_size) < zeros) & (np.arange(vocab_size) != row.argmax())] = 0.0
        return row / row.sum()

    return law


@dataclass
class TableCache:
    """A cache that holds the committed tokens and the tree of the last forward."""

    tokens: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of committed tokens."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """Drops all tokens after the first `length`."""
        del self.tokens[length:]


class TablePool:
    """The pool of a `TableTarget`'s caches."""

    bytes_per_token = 0

    def allocate(self) -> TableCache:
        """Makes an empty cache."""
        return TableCache()

    def copy(self, cache: TableCache) -> TableCache:
        """Makes a cache with the tokens of another."""
        return TableCache(list(cache.tokens))

    def free(self, cache: TableCache) -> None:
        """Frees a cache."""
        pass

    def keep(self, caches: Sequence[TableCache], paths: Sequence[Sequence[int]]) -> None:
        """Commits node 0 and the nodes of `paths` for every request."""
        for cache, path in zip(caches, paths, strict=True):
            cache.tokens += [cache.tree[node] for node in (0, *path)]
            cache.tree = []


@dataclass
class TableTarget:
    """A target with a given law. Its logits are log-probabilities in float64, so temperature 1 reproduces the law.

    Attributes:
        law: law of the next token after a whole prefix.
        vocab_size: size of the vocabulary.
        max_len: length of the context in tokens.
        num_forwards: number of calls of `forward` so far.
        config: the model's configuration, if it has any.
    """

    has_own_threads, num_weight_bytes, shared = False, 0, None
    dtype, device = torch.float64, torch.device("cpu")

    law: Law
    vocab_size: int
    max_len: int = 1 << 20
    num_forwards: int = 0
    config: Any = None

    def new_pool(self, num_slots: int, max_len: int) -> TablePool:
        """Makes a pool of token lists. The table needs no keys and values."""
        return TablePool()

    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Raises `ValueError`, since a table has no embedding."""
        raise UserError("a target with a given law has no embedding", "choose a drafter without a head")

    def head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Raises `ValueError`, since a table has no features."""
        raise UserError("a target with a given law has no output head", "choose a drafter without a head")

    def forward(
        self,
        batch: TreeBatch,
        caches: Sequence[TableCache],
        rows: Ids | None = None,
        *,
        start: Sequence[int] | None = None,
        feature_layers: Sequence[int] = (),
    ) -> Scores:
        """Returns the table's rows at `rows`, or at all new nodes. Prefixes come from the caches and the batch."""
        self.num_forwards += 1
        laws: dict[int, np.ndarray] = {}
        for b, cache in enumerate(caches):
            tree, first = batch[b], start[b] if start is not None else 0
            assert len(cache.tree) >= first, "nodes before start were not run"
            cache.tree[first:] = tree.tokens[first:].tolist()
            for node in range(first, tree.num_nodes):
                path = [cache.tree[i] for i in (0, *tree.path_to(node))]
                laws[int(batch.offsets[b]) + node] = self.law((*cache.tokens, *path))
        chosen = list(laws.values()) if rows is None else [laws[int(row)] for row in rows]
        table = np.stack(chosen) if chosen else np.zeros((0, self.vocab_size))
        return Scores(torch.from_numpy(table).log())
