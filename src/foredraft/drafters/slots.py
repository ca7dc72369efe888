"""Parallel drafters: Medusa's heads, and the layer of the CTC paper without a blank. One forward fills all slots.

The law of a slot does not depend on the tokens drafted before it. All nodes of one depth thus have the same law, and every tree
policy can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import Layout, index_of, rows_of
from foredraft.cache.pool import KVPool
from foredraft.core.contracts import Features, Grower, Scores, Target, Work
from foredraft.core.setting import Setting
from foredraft.core.tree import Ids, TreeBatch
from foredraft.drafters.compiled import QUANTIZED, CompiledHead, can_compile, compile_linears
from foredraft.drafters.growing import paths_of
from foredraft.drafters.pairs import PairCaches, PairState
from foredraft.heads.ctc import CtcHead
from foredraft.heads.folder import load_head
from foredraft.heads.medusa import MedusaHeads
from foredraft.models.graphs import Capture, Graphs, Masks, cuda_capture


class LayerSlots:
    """Fills slots with one decoder layer that has a cache.

    Args:
        head: the head, in the target's dtype and on its device.
        config: the Llama configuration of the layer.
        target: provides the shared embedding and output head.
        compiled: whether to run the compiled layer; None runs it if possible.
        weight_bits: bits of a stored weight of the compiled layer.

    Attributes:
        num_tokens: number of slots of the head.
        compiled: the compiled layer; None if it does not run.
    """

    def __init__(
        self,
        head: CtcHead,
        config: Any,
        target: Target,
        *,
        compiled: bool | None = None,
        weight_bits: int = QUANTIZED,
    ):
        self.head, self.feature_layers = head, head.feature_layers
        self.num_tokens, self.ahead = head.num_slots, head.num_slots
        self._embed, self._target_head = target.embed, target.head
        self._caches = PairCaches(config, target.dtype, target.device, ahead=self.num_tokens - 1)
        self.bytes_per_token = self._caches.bytes_per_token
        compiled = can_compile(head, config, target) if compiled is None else compiled
        self.compiled = CompiledHead(head, config, target, bits=weight_bits) if compiled else None
        self._run = self.compiled.fill if self.compiled else self._plain
        self._dtype = target.dtype
        self.graphs = self.make_graphs(cuda_capture()) if target.device.type == "cuda" else None

    def make_graphs(self, capture: Capture) -> Graphs:
        """Returns the captured forwards of the layer and its output head, one per shape."""
        return Graphs(self._compute, capture, self._caches.group, self._dtype)

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request."""
        return self._caches.start(tokens, features, cache, first)

    def written(self, state: PairState) -> int:
        """Returns the number of pairs whose keys and values are in place."""
        return self._caches.written(state)

    def finish(self, state: PairState) -> None:
        """Releases what the request held."""
        self._caches.finish(state)

    def observe(self, state: PairState, tokens: Sequence[int], features: Features | None) -> None:
        """Adds the new pairs."""
        state.take(tokens, features)

    def room(self, state: PairState) -> int:
        """Returns the maximum depth of a path."""
        return min(self._caches.room(state), self.num_tokens)

    def fill(self, states: Sequence[PairState]) -> Float[Tensor, "b k w"]:
        """Returns logits of every slot, from one forward over the pending pairs and the slots.

        The state of the last pair is the first slot.
        """
        count = self.num_tokens
        for state in states:
            state.tokens = [*state.pending, *[0] * (count - 1)]
        batch = TreeBatch.chains([state.tokens for state in states])
        features = [state.features for state in states]
        rows = (batch.offsets[1:, None] - np.arange(count, 0, -1)).flatten()
        return self._run(batch, [state.cache for state in states], features, rows, count - 1).view(len(states), count, -1)

    def settle(self, states: Sequence[PairState]) -> None:
        """Commits the pairs of the last step."""
        self._caches.settle(states, self._store)

    def _store(self, batch: TreeBatch, caches: Sequence[Any], features: Sequence[Float[Tensor, "_ d"]]) -> None:
        self._run(batch, caches, features, np.empty(0, np.int64), 0)

    def _plain(
        self, batch: TreeBatch, caches: Sequence[Any], features: Sequence[Float[Tensor, "_ d"]], rows: Ids, num_slots: int
    ) -> Float[Tensor, "r w"]:
        """Returns logits at the packed nodes `rows` of chains of pairs, each followed by `num_slots` slots."""
        layout = caches[0].pool.behind(batch, caches, None)
        entries, pool = self._enter(layout, batch, features, num_slots), caches[0].pool
        found = self.graphs(layout, pool, (), entries, rows=rows) if self.graphs is not None else None
        return (found or self._compute(layout, pool, self._caches.masks(layout), (), entries, rows=rows)).logits

    def _enter(
        self, layout: Layout, batch: TreeBatch, features: Sequence[Float[Tensor, "_ d"]], num_slots: int
    ) -> Float[Tensor, "n d"]:
        """Returns the entries of chains of pairs, each followed by `num_slots` slots."""
        sizes = np.diff(batch.offsets)
        places = np.arange(layout.count) - np.repeat(batch.offsets[:-1], sizes)
        counts = np.repeat(sizes - num_slots, sizes)
        first = np.repeat(batch.offsets[:-1] - num_slots * np.arange(len(sizes)), sizes)  # first pair of the row's chain
        is_slot, source = places >= counts, first + np.minimum(places, counts - 1)
        of_pairs, of_slots, sources, last = (
            index_of(rows, layout.device)
            for rows in (np.flatnonzero(~is_slot), np.flatnonzero(is_slot), source, source[is_slot][:: num_slots or 1])
        )
        pairs = self._embed(layout.token_ids[of_pairs]), torch.cat([*features])
        entries = self.head.enter(*pairs)[sources]
        if num_slots:
            entries[of_slots] = self.head.enter_ahead(*(tensor[last] for tensor in pairs)).flatten(0, 1)
        return entries

    def _compute(
        self, layout: Layout, pool: KVPool, masks: Masks, _: Sequence[int], given: Tensor | None, *, rows: Ids | None = None
    ) -> Scores:
        """Returns logits of the packed nodes `rows` (None: all new nodes). `given` are the entries of all new nodes."""
        states = self.head(given, self._caches.attention(pool, layout, masks))
        wanted = states if rows is None else rows_of(states, rows)
        return Scores(self.head.logits(wanted, self._target_head), None)


class FeatureSlots:
    """Fills slots with Medusa's heads, which read only the last feature."""

    def __init__(self, head: MedusaHeads):
        self.head, self.feature_layers = head, head.feature_layers
        self.num_tokens, self.ahead, self.bytes_per_token = head.num_slots, 0, 0

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request."""
        state = PairState(None, [])
        self.observe(state, tokens, features)
        return state

    def written(self, state: PairState) -> None:
        """Returns None, because there are no keys and values."""

    def finish(self, state: PairState) -> None:
        """Does nothing, because no resources are held."""

    def observe(self, state: PairState, tokens: Sequence[int], features: Features | None) -> None:
        """Stores the last pair."""
        state.parts = [features[-1:]] if features is not None and len(features) else state.parts

    def room(self, state: PairState) -> int:
        """Returns the maximum depth of a path."""
        return self.num_tokens if state.parts else 0

    def fill(self, states: Sequence[PairState]) -> Float[Tensor, "b k v"]:
        """Returns logits of every slot."""
        return self.head(torch.cat([state.features for state in states]))

    def settle(self, states: Sequence[PairState]) -> None:
        """Does nothing, because there is no cache."""


class SlotDrafter:
    """Drafts with laws that depend only on the depth of a node.

    Args:
        slots: fills the slots.
        grower: the tree policy; None if a subclass makes its own trees.
        vocab_size: vocabulary size of the target.

    Source: Medusa (arXiv 2401.10774), section 2.1.
    """

    def __init__(self, slots: LayerSlots | FeatureSlots, grower: Grower | None, vocab_size: int):
        self.slots, self.grower, self.vocab_size = slots, grower, vocab_size
        self.feature_layers, self.ahead, self.bytes_per_token = slots.feature_layers, slots.ahead, slots.bytes_per_token

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = QUANTIZED) -> SlotDrafter:
        """Builds the drafter of a speculative config.

        Raises:
            ValueError: the directory holds no head, or the head was trained for another target.
        """
        loaded = load_head(setting, force=force)
        assert setting.grower is not None
        compile_linears(loaded.head, setting.target, weight_bits)
        return cls(FeatureSlots(loaded.head), setting.grower, setting.target.vocab_size)

    @torch.inference_mode()
    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request."""
        return self.slots.start(tokens, features, cache, first)

    def written(self, state: PairState) -> int | None:
        """Returns the number of pairs whose keys and values are in place; None if the slots have none."""
        return self.slots.written(state)

    def finish(self, state: PairState) -> None:
        """Releases the resources of the request."""
        self.slots.finish(state)

    @torch.inference_mode()
    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request, at most as deep as the number of slots.

        It is the root alone before the target has run a token.
        """
        self.slots.settle(work.states)
        for state in work.states:
            state.carried = None
        assert self.grower is not None
        return self.grower.grow(self, work.capped([self.slots.room(state) for state in work.states]))

    @torch.inference_mode()
    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns the draft logits at the depths of the nodes. The first call of a step fills the slots."""
        owners, depths, _ = paths_of(partial, node_ids)
        live = np.unique(owners)
        self._begin([states[b] for b in live.tolist() if states[b].carried is None])
        filled = torch.stack([states[b].carried for b in live.tolist()])
        places = (torch.from_numpy(index).to(filled.device) for index in (np.searchsorted(live, owners), depths))
        return filled[tuple(places)]

    @torch.inference_mode()
    def observe(self, state: PairState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Adds the new pairs."""
        self.slots.observe(state, tokens, features)

    def _begin(self, states: Sequence[PairState]) -> None:
        """Fills the slots of requests whose first nodes are requested."""
        if states:
            for state, filled in zip(states, self.slots.fill(states), strict=True):
                state.carried = self._held(filled)

    def _held(self, filled: Float[Tensor, "k w"]) -> Any:
        """Converts the slots of a request to the form that is stored while its tree grows."""
        return filled[:, : self.vocab_size].cpu()  # on the CPU, since it is read row by row


class LayerSlotDrafter(SlotDrafter):
    """Drafts with the layer of the CTC paper without collapsing, so that every slot is one token."""

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = QUANTIZED) -> LayerSlotDrafter:
        """Builds the drafter of a speculative config; see `SlotDrafter.build`.

        Raises:
            ValueError: as in `SlotDrafter.build`, or `weight_bits` is neither 4 nor 16.
        """
        loaded = load_head(setting, also=("ctc",), force=force)
        assert setting.grower is not None
        slots = LayerSlots(loaded.head, loaded.config, setting.target, weight_bits=weight_bits)
        return cls(slots, setting.grower, setting.target.vocab_size)
