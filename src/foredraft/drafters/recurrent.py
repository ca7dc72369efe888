"""EAGLE, FSPAD and EAGLE-3 at work: a head that goes on from its own features, behind a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache import KVPool, Layout, rows_of
from foredraft.drafters import Setting
from foredraft.drafters.compiled import FEW, CompiledHead, can_compile
from foredraft.drafters.folder import load_head
from foredraft.drafters.growing import capped, next_pass
from foredraft.drafters.heads import Eagle3Head, FeatureHead
from foredraft.drafters.pairs import PairCaches, PairState
from foredraft.draws import Draws
from foredraft.models.graphs import Capture, Graphs, Masks, cuda_capture
from foredraft.params import SamplingParams
from foredraft.protocols import Budget, Grower, Scores
from foredraft.tree import Ids, TreeBatch

_FEW = 48
"""Nodes that a table has room for beyond what is asked for, so that few trees outgrow it."""


class RecurrentDrafter:
    """Drafts token by token on features that the head itself foretells.

    Args:
        head: its weights, in the target's dtype and on its device.
        config: the Llama configuration of its layer.
        target: gives the embedding and the head that are shared.
        grower: how its trees grow.
        num_slots: requests in flight at most.
        compiled: whether the compiled layer runs; None is wherever it can.
        weight_bits: those of the compiled layer.

    Attributes:
        compiled: the compiled layer, if it runs.

    Source: EAGLE (arXiv 2401.15077), section 3.1; FSPAD (arXiv 2408.15562); EAGLE-3 (arXiv 2503.01840).
    """

    def __init__(
        self,
        head: FeatureHead | Eagle3Head,
        config: Any,
        target: Any,
        grower: Grower,
        num_slots: int,
        *,
        compiled: bool | None = None,
        weight_bits: int = FEW,
    ):
        self.head, self.grower, self.vocab_size = head, grower, target.vocab_size
        self.feature_layers = head.feature_layers
        self._embed, self._target_head = target.embed, target.head
        self._width, self._dtype, self._device = config.hidden_size, target.dtype, target.device
        self._caches = PairCaches(config, num_slots, target.dtype, target.device)
        compiled = can_compile(head, config, target) if compiled is None else compiled
        self.compiled = CompiledHead(head, config, target, bits=weight_bits) if compiled else None
        self._run, self._fuse = (self.compiled or self._plain), (self.compiled or head).fuse
        self.graphs = self.make_graphs(cuda_capture()) if self._device.type == "cuda" else None

    def make_graphs(self, capture: Capture) -> Graphs:
        """Levels of fixed shape of this head."""
        return Graphs(self._compute, capture, self._caches.group, self._dtype)

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = FEW) -> RecurrentDrafter:
        """The drafter of a speculative config.

        Raises:
            ValueError: there is no head in the directory, it belongs to another target.
        """
        loaded = load_head(setting, force=force)
        assert setting.grower is not None
        given = loaded.head, loaded.config, setting.target, setting.grower, setting.num_slots
        return cls(*given, weight_bits=weight_bits)

    @torch.inference_mode()
    def start(self, tokens: Sequence[int], features: Float[Tensor, "m f"] | None) -> PairState:
        """A new request; nothing is run before its first tree."""
        return self._caches.start(tokens, None if features is None else self._fuse(features))

    def finish(self, state: PairState) -> None:
        """Frees the request's slot."""
        self._caches.finish(state)

    @torch.inference_mode()
    def propose(
        self,
        states: Sequence[PairState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request; none before the target has run a token, and none where the head's context is full."""
        self._caches.settle(states, self._store)
        room = [self._caches.room(state) for state in states]
        return self.grower.grow(self, states, [state.root for state in states], capped(budgets, room), sampling, draws)

    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Draft logits after the packed nodes `node_ids` of the growing trees, in one pass of the head."""
        live, batch, start, rows = next_pass(states, partial, node_ids)
        some = [states[b] for b in live]
        for state in some:
            state.carried = self._with_room(state.carried, len(state.tokens))
        given = [state.features for state in some]
        tables = [state.carried for state in some if state.carried is not None]
        return self._run(batch, [state.cache for state in some], given, start, rows, tables)

    @torch.inference_mode()
    def observe(
        self, state: PairState, tokens: Sequence[int], features: Float[Tensor, "m f"] | None, path: Sequence[int]
    ) -> None:
        """New pairs."""
        state.take(tokens, None if features is None else self._fuse(features))

    def _with_room(self, table: Float[Tensor, "c d"] | None, size: int) -> Float[Tensor, "c2 d"]:
        """The table with at least `size` rows."""
        if table is not None and len(table) >= size:
            return table
        wider = torch.empty(2 * size + _FEW, self._width, dtype=self._dtype, device=self._device)
        if table is not None:
            wider[: len(table)] = table
        return wider

    def _store(self, batch: TreeBatch, caches: Sequence[Any], features: Sequence[Float[Tensor, "_ d"]]) -> None:
        self._run(batch, caches, features, None, np.empty(0, np.int64))

    @torch.inference_mode()
    def _plain(
        self,
        batch: TreeBatch,
        caches: Sequence[Any],
        given: Sequence[Float[Tensor, "_ d"]],
        start: Sequence[int] | None,
        rows: Ids,
        carried: Sequence[Float[Tensor, "_ d"]] = (),
    ) -> Float[Tensor, "r v"]:
        """One pass of the head: draft logits at the packed nodes `rows`.

        Args:
            given: per tree, features of its first nodes.
            carried: per tree, a table of what its nodes carry on, which is filled; a later node is given its parent's row.
        """
        layout = self._caches.behind(batch, caches, start)
        first, ends = [0] * len(batch) if start is None else list(start), batch.offsets.tolist()
        parents = [batch.parents[begin + f : end] for f, begin, end in zip(first, ends, ends[1:], strict=False)]
        features = torch.cat([rows_of(carried[b], parents[b]) if f else given[b] for b, f in enumerate(first)])
        pool = self._caches.pool
        found = self.graphs(layout, pool, (), features, rows=rows) if self.graphs is not None else None
        logits, foretold = found or self._compute(layout, pool, self._caches.masks(layout), (), features, rows=rows)
        assert foretold is not None
        for table, f, new in zip(carried, first, foretold.split([len(one) for one in parents]), strict=False):
            table[f : f + len(new)] = new
        return logits

    def _compute(
        self, layout: Layout, pool: KVPool, masks: Masks, _: Sequence[int], given: Tensor | None, *, rows: Ids | None = None
    ) -> Scores:
        """Logits of all new nodes or of the packed nodes `rows`, and what all carry on."""
        drafted = self.head(self.head.embed(layout.token_ids, self._embed), given, self._caches.attention(layout, masks))
        scored = drafted.scored if rows is None else drafted.scored[layout.rows_of(rows)]
        return Scores(self.head.logits(scored, self._target_head), drafted.carried)
