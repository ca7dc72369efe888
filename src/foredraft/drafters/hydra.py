"""The Hydra drafter: heads that read the drafted path, after a layer over the committed features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Features, Grower, Target, Work
from foredraft.core.setting import Setting
from foredraft.core.tree import Ids, TreeBatch
from foredraft.drafters.compiled import QUANTIZED, CompiledHead, can_compile, compile_linears
from foredraft.drafters.growing import paths_of
from foredraft.drafters.pairs import PairCaches, PairState
from foredraft.heads.folder import load_head
from foredraft.heads.hydra import HydraHeads


class HydraDrafter:
    """Drafts trees that are at most as deep as the number of heads. The law of a node depends on the path to it.

    Args:
        head: the heads, in the target's dtype and on its device.
        config: the Llama configuration of the prefix layer.
        target: provides the embedding.
        grower: the tree policy.
        compiled: whether to run the compiled prefix layer; None runs it if possible.
        weight_bits: bits of a stored weight of the compiled layer.

    Source: Hydra (arXiv 2402.05109), sections 3 and 4.
    """

    def __init__(
        self,
        head: HydraHeads,
        config: Any,
        target: Target,
        grower: Grower,
        *,
        compiled: bool | None = None,
        weight_bits: int = QUANTIZED,
    ):
        self.head, self.grower, self.vocab_size = head, grower, target.vocab_size
        self.feature_layers, self.ahead = head.feature_layers, 0
        self._embed = target.embed
        self._caches = PairCaches(config, target.dtype, target.device)
        self.bytes_per_token = self._caches.bytes_per_token
        compiled = can_compile(head, config, target) if compiled is None else compiled
        self._prefix = CompiledHead(head, config, target, bits=weight_bits) if compiled else None

    @classmethod
    def build(cls, setting: Setting, *, force: bool = False, weight_bits: int = QUANTIZED) -> HydraDrafter:
        """Builds the drafter of a speculative config.

        Raises:
            ValueError: the directory holds no head, or the head was trained for another target.
        """
        loaded = load_head(setting, force=force)
        assert setting.grower is not None
        given = loaded.head, loaded.config, setting.target, setting.grower
        drafter = cls(*given, weight_bits=weight_bits)
        for heads in (loaded.head.blocks, loaded.head.lm_heads):
            compile_linears(heads, setting.target, weight_bits)
        return drafter

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> PairState:
        """Returns the state of a new request. Nothing is run before its first tree."""
        return self._caches.start(tokens, features, cache, first)

    def written(self, state: PairState) -> int:
        """Returns the number of pairs whose keys and values are in place."""
        return self._caches.written(state)

    def finish(self, state: PairState) -> None:
        """Releases what the request held."""
        self._caches.finish(state)

    @torch.inference_mode()
    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request. It is the root alone before the target has run a token."""
        self._caches.settle(work.states, self._read)
        for state in work.states:
            state.carried = None
        room = [min(self._caches.room(state), self.head.num_slots) for state in work.states]
        return self.grower.grow(self, work.capped(room))

    @torch.inference_mode()
    def expand(self, states: Sequence[PairState], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns the draft logits after the packed nodes `node_ids`, with one call of a head per depth."""
        owners, depths, nodes = paths_of(partial, node_ids)
        live = np.unique(owners)
        self._begin([states[b] for b in live.tolist() if states[b].carried is None])
        read = torch.cat([states[b].carried for b in live.tolist()])  # type: ignore[misc]
        features = read[torch.from_numpy(np.searchsorted(live, owners)).to(read.device)]
        logits = features.new_empty(len(node_ids), self.vocab_size)
        for depth in np.unique(depths).tolist():
            rows = np.flatnonzero(depths == depth)
            tokens = torch.from_numpy(partial.tokens[nodes[rows, depth::-1]]).to(read.device)
            embeddings = self._embed(tokens.flatten()).view(len(rows), -1)
            logits[rows] = self.head(depth, features[rows], embeddings)
        return logits

    def observe(self, state: PairState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Adds the new pairs."""
        state.take(tokens, features)

    def _begin(self, states: Sequence[PairState]) -> None:
        """Runs the pending features of requests whose first nodes are requested. The heads read the last output of each."""
        if not states:
            return
        for state in states:
            state.tokens = list(state.pending)
        batch = TreeBatch.chains([state.tokens for state in states])
        read = self._read(batch, [state.cache for state in states], [state.features for state in states])
        for state, row in zip(states, read.split(1), strict=True):
            state.carried = row

    def _read(self, batch: TreeBatch, caches: Sequence[Any], features: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "b d"]:
        """Returns the input of the heads for chains of features, which is taken from the end of each chain."""
        if self._prefix is not None:
            return self.head.prefix_norm(self._prefix.read(batch, caches, features))
        layout = caches[0].pool.behind(batch, caches, None)
        read = self.head.read(
            torch.cat([*features]), self._caches.attention(caches[0].pool, layout, self._caches.masks(layout))
        )
        return read[torch.from_numpy(batch.offsets[1:] - 1).to(read.device)]
