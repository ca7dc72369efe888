"""Targets whose law is a table. They are exact in float64 and serve as the reference in tests and theory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.cache.blocks import Blocks
from foredraft.cache.pool import KVCache, KVPool
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

    def new_pool(self, blocks: int | Blocks) -> KVPool:
        """Returns a pool whose keys are the tokens; see `foredraft.core.contracts.Target`."""
        return KVPool(blocks, 1, 1, 1, torch.int64, self.device)

    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Raises `ValueError`, since a table has no embedding."""
        raise UserError("a target with a given law has no embedding", "choose a drafter without a head")

    def head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Raises `ValueError`, since a table has no features."""
        raise UserError("a target with a given law has no output head", "choose a drafter without a head")

    def forward(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        rows: Ids | None = None,
        *,
        start: Sequence[int] | None = None,
        feature_layers: Sequence[int] = (),
    ) -> Scores:
        """Returns the table's rows at `rows`, or at all new nodes. Prefixes come from the caches and the batch."""
        self.num_forwards += 1
        pool = caches[0].pool
        layout = pool.behind(batch, caches, start)
        keys = pool.kv[0, 0, 0].view(-1)
        keys[layout.place] = layout.token_ids
        wanted = layout.new if rows is None else rows
        laws = [self.law(prefix) for prefix in self._prefixes(batch, caches, keys, np.asarray(wanted, np.int64))]
        return Scores(torch.from_numpy(np.stack(laws) if laws else np.zeros((0, self.vocab_size))).log())

    def _prefixes(
        self, batch: TreeBatch, caches: Sequence[KVCache], keys: Int[Tensor, " t"], wanted: Ids
    ) -> Iterator[tuple[int, ...]]:
        """Returns the tokens up to each packed node in `wanted`, as the pool holds them."""
        held: dict[int, list[int]] = {}
        for b in (np.searchsorted(batch.offsets, wanted, side="right") - 1).tolist():
            if b not in held:
                length = caches[b].length + batch[b].num_nodes
                held[b] = keys[[caches[b].place(position) for position in range(length)]].tolist()
        for node in wanted.tolist():
            b = int(np.searchsorted(batch.offsets, node, side="right")) - 1
            length, path = caches[b].length, (0, *batch[b].path_to(node - int(batch.offsets[b])))
            yield (*held[b][:length], *(held[b][length + place] for place in path))
