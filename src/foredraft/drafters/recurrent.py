"""The drafter for EAGLE, FSPAD and EAGLE-3: a head that continues from its own predicted features, with its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import Layout, rows_of
from foredraft.cache.pool import KVPool
from foredraft.core.chains import Chains, ChainWish
from foredraft.core.contracts import Features, Grower, Scores, Target, Work
from foredraft.core.setting import Setting
from foredraft.core.tree import Ids, TreeBatch
from foredraft.drafters.compiled import QUANTIZED, CompiledHead, can_compile
from foredraft.drafters.growing import next_pass
from foredraft.drafters.pairs import PairCaches, PairState
from foredraft.heads.eagle import Eagle3Head, FeatureHead
from foredraft.heads.folder import load_head
from foredraft.models.graphs import Capture, Graphs, Masks, cuda_capture

_SPARE_ROWS = 48
"""Additional rows of a new table, so that few trees outgrow it."""


class RecurrentDrafter:
    """Drafts token by token, from features that the head itself predicts.

    Args:
        head: the head, in the target's dtype and on its device.
        config: the Llama configuration of the layer.
        target: provides the shared embedding and output head.
        grower: the tree policy.
        compiled: whether to run the compiled layer; None runs it if possible.
        weight_bits: bits of a stored weight of the compiled layer.

    Attributes:
        compiled: the compiled layer; None if it does not run.

    Source: EAGLE (arXiv 2401.15077), section 3.1; FSPAD (arXiv 2408.15562); EAGLE-3 (arXiv 2503.01840).
    """

    def __init__(
        self,
        head: FeatureHead | Eagle3Head,
        config: Any,
        target: Target,
        grower: Grower,
        *,
        compiled: bool | None = None,
        weight_bits: int = QUANTIZED,
    ):
        self.head, self.grower, self.vocab_size = head, grower, target.vocab_size
        self.feature_layers, self.ahead = head.feature_layers, 0
        self._embed, self._target_head = target.embed, target.head
        self._width, self._dtype, self._device = config.hidden_size, target.dtype, target.device
        self._caches = PairCaches(config, target.dtype, target.device)
        self.bytes_per_token = self._caches.bytes_per_token
        compiled = can_compile(head, config, target) if compiled is None else compiled
        self.compiled = CompiledHead(head, config, target, bits=weight_bits) if compiled else None
        self._run, self._fuse = (self.compiled or self._plain), (self.compiled or head).fuse
        self.graphs = self.make_graphs(cuda_capture()) if self._device.type == "cuda" else None

    def make_graphs(self, capture: Capture) -> Graphs:
        """Returns the captured forwards of this head, one per shape of a tree level."""
        return Graphs(self._compute, capture, self._caches.group, self._dtype)

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = QUANTIZED) -> RecurrentDrafter:
        """Builds the drafter of a speculative config.

        Raises:
            ValueError: the directory holds no head, or the head was trained for another target.
        """
        loaded = load_head(setting, force=force)
        assert setting.grower is not None
        given = loaded.head, loaded.config, setting.target, setting.grower
        return cls(*given, weight_bits=weight_bits)

    @torch.inference_mode()
    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request. Nothing is run before its first tree."""
        return self._caches.start(tokens, None if features is None else self._fuse(features), cache, first)

    def written(self, state: PairState) -> int:
        """Returns the number of pairs whose keys and values are in place."""
        return self._caches.written(state)

    def finish(self, state: PairState) -> None:
        """Releases what the request held."""
        self._caches.finish(state)

    @torch.inference_mode()
    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request. It is the root alone before the target has run a token, or if the context is full."""
        self._caches.settle(work.states, self._store)
        return self.grower.grow(self, work.capped([self._caches.room(state) for state in work.states]))

    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns draft logits after the packed nodes `node_ids` of the growing trees, from one pass of the head."""
        live, batch, start, rows = next_pass(states, partial, node_ids)
        some = [states[b] for b in live]
        for state in some:
            state.carried = self._with_room(state.carried, len(state.tokens))
        given = [state.features for state in some]
        tables = [state.carried for state in some if state.carried is not None]
        return self._run(batch, [state.cache for state in some], given, start, rows, tables)

    def draw_chains(self, work: Work, wish: ChainWish) -> Chains | None:
        """Draws whole chains if the head is compiled."""
        if self.compiled is None:
            return None
        for state, root in zip(work.states, work.roots, strict=True):
            state.add(0, root, -1)
            state.carried = self._with_room(state.carried, len(state.tokens) + wish.depth)
        batch = TreeBatch.chains([state.tokens for state in work.states])
        caches, given = [state.cache for state in work.states], [state.features for state in work.states]
        return self.compiled.draw_chains(batch, caches, given, [state.carried for state in work.states], wish)

    @torch.inference_mode()
    def observe(self, state: PairState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Adds the new pairs."""
        state.take(tokens, None if features is None else self._fuse(features))

    def _with_room(self, table: Float[Tensor, "c d"] | None, size: int) -> Float[Tensor, "c2 d"]:
        """Returns the table, enlarged to at least `size` rows if necessary."""
        if table is not None and table.shape[0] >= size:  # len() of a tensor takes a microsecond
            return table
        wider = torch.empty(2 * size + _SPARE_ROWS, self._width, dtype=self._dtype, device=self._device)
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
        """Runs one pass of the head and returns draft logits at the packed nodes `rows`.

        Args:
            given: for each tree, the features of its first nodes.
            carried: for each tree, a table of the predicted features of its nodes, which this pass fills. The feature of a
                later node is the row of its parent.
        """
        layout = caches[0].pool.behind(batch, caches, start)
        first, ends = [0] * len(batch) if start is None else list(start), batch.offsets.tolist()
        parents = [batch.parents[begin + f : end] for f, begin, end in zip(first, ends, ends[1:], strict=False)]
        features = torch.cat([rows_of(carried[b], parents[b]) if f else given[b] for b, f in enumerate(first)])
        pool = caches[0].pool
        found = self.graphs(layout, pool, (), features, rows=rows) if self.graphs is not None else None
        logits, predicted = found or self._compute(layout, pool, self._caches.masks(layout), (), features, rows=rows)
        assert predicted is not None
        parts = predicted.split([len(tree_parents) for tree_parents in parents])
        for table, f, new in zip(carried, first, parts, strict=False):
            table[f : f + len(new)] = new
        return logits

    def _compute(
        self, layout: Layout, pool: KVPool, masks: Masks, _: Sequence[int], given: Tensor | None, *, rows: Ids | None = None
    ) -> Scores:
        """Returns logits of the packed nodes `rows` (None: all new nodes), and the predicted features of all new nodes."""
        drafted = self.head(self.head.embed(layout.token_ids, self._embed), given, self._caches.attention(pool, layout, masks))
        scored = drafted.scored if rows is None else drafted.scored[layout.rows_of(rows)]
        return Scores(self.head.logits(scored, self._target_head), drafted.carried)
