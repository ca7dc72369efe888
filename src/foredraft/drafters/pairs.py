"""What drafters over the target's features share: pairs of tokens and features, run behind a cache of their own.

The pairs that the target has committed are run with the target's features and kept. What is run behind them to draft is
forgotten after the step: its features were guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache import PREFILL_CHUNK, KVPool, Layout, lay_out
from foredraft.drafters.growing import Growing
from foredraft.drafters.layers import Attend, Shape
from foredraft.models.attention import attend, rotate
from foredraft.models.graphs import Masks
from foredraft.models.rope import rotary_tables
from foredraft.tree import TreeBatch

Run = Callable[[TreeBatch, Sequence[Any], Sequence[Float[Tensor, "_ d"]]], Any]
"""Runs chains of pairs, given the features of each: (batch, caches, features)."""


@dataclass(eq=False)
class PairState(Growing):
    """One request: `pending` are the tokens of pairs that are not in the cache yet.

    Attributes:
        root: the last committed token.
        parts: the pending pairs' features, in the parts in which they came; see `features`.
        carried: what was foretold in this step: by a recurrent head at each place of its run, in a table with room for more;
            the slots of other heads, or their laws.
        ran: how many pairs of this step's run are to be kept; None until the step is over.
    """

    root: int = 0
    parts: list[Float[Tensor, "_ d"]] = field(default_factory=list)
    carried: Any = None
    ran: int | None = None

    @property
    def features(self) -> Float[Tensor, "p d"]:
        """Of the pending pairs; there must be some. Put together when they are used: while others draft, only parts come in."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]

    def take(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> None:
        """Adds pairs."""
        if self.tokens and self.ran is None:
            self.ran, self.pending, self.parts = len(self.pending), [], []
        self.root = tokens[-1]
        if features is not None and len(features):
            self.pending += tokens[-len(features) :]
            self.parts.append(features)


class PairCaches:
    """Caches of one layer for the requests in flight, and the attention behind them.

    Args:
        config: a Llama configuration of the layer.
        num_slots: requests in flight at most.
        ahead: places behind the context's end that are run, though nothing is drafted there.

    Attributes:
        pool: keys and values.
        group: query heads that share a key head.
    """

    def __init__(self, config: Any, num_slots: int, dtype: torch.dtype, device: torch.device, *, ahead: int = 0):
        self.max_len: int = config.max_position_embeddings
        self._shape, self._dtype, self._device = Shape.of(config), dtype, device
        self.group = self._shape.heads // self._shape.kv_heads
        self._cos, self._sin = rotary_tables(config, self.max_len + ahead, dtype, device)
        self.pool = KVPool(
            num_slots=num_slots,
            num_layers=1,
            num_heads=self._shape.kv_heads,
            head_dim=self._shape.head_dim,
            dtype=dtype,
            device=device,
        )

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> PairState:
        """A new request, `tokens` and `features` as in `Drafter.start`: token 0 is in no pair, and the last feature meets the
        root."""
        state = PairState(self.pool.allocate(), [])
        state.take(tokens, features)
        return state

    def finish(self, state: PairState) -> None:
        """Frees the request's slot."""
        self.pool.free(state.cache)

    def room(self, state: PairState) -> int:
        """How many nodes below the root a path may have: none without a pair, and as many as there are positions left."""
        return max(0, self.max_len - state.cache.length - len(state.pending)) if state.pending else 0

    def settle(self, states: Sequence[PairState], run: Run) -> None:
        """Keeps the pairs of the last step's run, and runs all but the last part of long pending text."""
        over = [state for state in states if state.ran is not None]
        self.pool.keep([state.cache for state in over], [range(1, state.ran or 0) for state in over])
        for state in over:
            state.clear()
            state.ran = None
        while late := [state for state in states if len(state.pending) > PREFILL_CHUNK and self.room(state)]:
            chunk = TreeBatch.chains([state.pending[:PREFILL_CHUNK] for state in late])
            run(chunk, [state.cache for state in late], [state.features[:PREFILL_CHUNK] for state in late])
            self.pool.keep([state.cache for state in late], [range(1, PREFILL_CHUNK)] * len(late))
            for state in late:
                state.pending, state.parts = state.pending[PREFILL_CHUNK:], [state.features[PREFILL_CHUNK:]]

    def behind(self, batch: TreeBatch, caches: Sequence[Any], start: Sequence[int] | None) -> Layout:
        """Where the new nodes go."""
        layout = lay_out(batch, caches, start, self._device)
        self.pool.reserve(layout.length)
        return layout

    def masks(self, layout: Layout) -> Masks:
        """What each of them sees: its cache and its path."""
        mask = layout.mask(self._dtype, self._device)
        return {None: None if mask is None else mask.repeat(1, 1, self.group, 1)}

    def attention(self, layout: Layout, masks: Masks) -> Attend:
        """The attention of new nodes that were laid out by `behind`."""
        rotation = self._cos[layout.positions][:, None], self._sin[layout.positions][:, None]

        def attend_to_path(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(0, (rotate(query, rotation), rotate(key, rotation), value), masks[None], layout, self.pool)

        return attend_to_path
