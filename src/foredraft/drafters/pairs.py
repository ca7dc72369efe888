"""Code shared by drafters over the target's features: pairs of tokens and features, and a cache of the pairs.

Pairs that the target has committed are run with the target's features, and stay in the cache. Pairs that are run to draft use
predicted features, so they are removed after the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import Layout
from foredraft.cache.pool import PREFILL_CHUNK, DrafterPools, KVPool
from foredraft.core.contracts import Features
from foredraft.core.tree import TreeBatch
from foredraft.drafters.growing import Growing
from foredraft.heads.layers import Attend, Shape
from foredraft.kernels.attention import rotate
from foredraft.models.graphs import Masks
from foredraft.models.rope import rotary_tables

Run = Callable[[TreeBatch, Sequence[Any], Sequence[Float[Tensor, "_ d"]]], Any]
"""Runs chains of pairs with their features: (batch, caches, features)."""


@dataclass(eq=False)
class PairState(Growing):
    """The state of one request. `pending` holds the tokens of pairs that are not in the cache yet.

    Attributes:
        parts: features of the pending pairs, in the parts in which they arrived; see `features`.
        carried: predictions of this step. For a recurrent head, a table of the predicted features at each place of the run,
            which may have unused rows. For other heads, their slots or their laws.
        ran: number of pairs of this step's run to keep; None until the step is over.
    """

    parts: list[Float[Tensor, "_ d"]] = field(default_factory=list)
    carried: Any = None
    ran: int | None = None

    @property
    def features(self) -> Float[Tensor, "p d"]:
        """Features of the pending pairs, of which there must be at least one.

        The parts are concatenated only here, because parts may arrive in many steps in which another drafter drafts.
        """
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]

    def take(self, tokens: Sequence[int], features: Features | None) -> None:
        """Adds the pairs of newly committed tokens."""
        if self.tokens and self.ran is None:
            self.ran, self.pending, self.parts = len(self.pending), [], []
        if features is not None and len(features):
            self.pending += tokens[-len(features) :]
            self.parts.append(features)


class PairCaches:
    """Caches of one layer for all running requests, and the attention over them.

    Args:
        config: a Llama configuration of the layer.
        ahead: number of positions beyond the end of the context that can be run. Nothing is drafted there.

    Attributes:
        bytes_per_token: bytes of the keys and values of one pair.
        max_len: the context, in tokens.
        group: number of query heads that share a key head.
    """

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device, *, ahead: int = 0):
        self.max_len: int = config.max_position_embeddings
        self._shape, self._dtype = Shape.of(config), dtype
        self.group = self._shape.heads // self._shape.kv_heads
        self._cos, self._sin = rotary_tables(config, self.max_len + ahead, dtype, device)
        shape = 1, self._shape.kv_heads, self._shape.head_dim, dtype, device
        self._pools = DrafterPools(lambda blocks: KVPool(blocks, *shape), self.max_len + ahead)
        self.bytes_per_token = KVPool(0, *shape).bytes_per_token

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request; see `Drafter.start`.

        Token 0 is in no pair. The last feature forms a pair with the root.
        """
        state = PairState(self._pools.cache(cache, first), [])
        state.take(tokens, features)
        return state

    def written(self, state: PairState) -> int:
        """Returns the number of pairs whose keys and values are in place, also those that are not committed yet."""
        return state.cache.length + (state.ran or 0)

    def finish(self, state: PairState) -> None:
        """Releases what the request held."""
        self._pools.finish(state.cache)

    def room(self, state: PairState) -> int:
        """Returns the maximum depth of a path: the number of positions left, or 0 if there is no pending pair."""
        return max(0, self.max_len - state.cache.length - len(state.pending)) if state.pending else 0

    def settle(self, states: Sequence[PairState], run: Run) -> None:
        """Commits the pairs of the last step's run, and runs all but the last part of long pending text."""
        over = [state for state in states if state.ran is not None]
        _keep([state.cache for state in over], [range(1, state.ran or 0) for state in over])
        for state in states:  # also those whose last run was not completed
            state.clear()
            state.ran = None
        while late := [state for state in states if len(state.pending) > PREFILL_CHUNK and self.room(state)]:
            chunk = TreeBatch.chains([state.pending[:PREFILL_CHUNK] for state in late])
            run(chunk, [state.cache for state in late], [state.features[:PREFILL_CHUNK] for state in late])
            _keep([state.cache for state in late], [range(1, PREFILL_CHUNK)] * len(late))
            for state in late:
                state.pending, state.parts = state.pending[PREFILL_CHUNK:], [state.features[PREFILL_CHUNK:]]

    def masks(self, layout: Layout) -> Masks:
        """Returns the attention masks of the new nodes. Each node sees its cache and its path."""
        return layout.masks((None,), self._dtype, self.group)

    def attention(self, pool: KVPool, layout: Layout, masks: Masks) -> Attend:
        """Returns the attention function of new nodes that `KVPool.behind` laid out."""
        rotation = self._cos[layout.positions][:, None], self._sin[layout.positions][:, None]

        def attend_to_path(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return pool.attend(0, (rotate(query, rotation), rotate(key, rotation), value), masks[None], layout)

        return attend_to_path


def _keep(caches: Sequence[Any], paths: Sequence[Sequence[int]]) -> None:
    if caches:
        caches[0].pool.keep(caches, paths)
