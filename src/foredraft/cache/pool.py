"""Key-value caches: one pool tensor for all requests, a handle per request, and the prefill of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import Layout, lay_out
from foredraft.core.contracts import Pool, Scores, Target
from foredraft.core.errors import UserError
from foredraft.core.tree import TreeBatch
from foredraft.kernels.attention import attend

_GROWTH, _GROWTH_ON_CARD = 256, 1024
"""Slots grow by at least this many positions, so that short requests do not pay for a long context. They grow by more on a GPU,
because every captured CUDA graph must be captured again when the memory moves."""


@dataclass(eq=False)
class KVCache:
    """A request's slot in a pool.

    Attributes:
        length: number of committed tokens in the cache, which are all tokens of the request except the root.
    """

    pool: KVPool
    slot: int
    length: int = 0

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length


class KVPool:
    """Keys and values of up to `num_slots` requests in a single tensor of shape [2, L, slots, H, T, D].

    A captured forward (`foredraft.models.graphs`) can run on any pool whose tensor has the same address as the captured one.
    For this reason, a pool has no other tensor.

    Tree nodes are stored behind the committed tokens of a request, node i at ``length + i``, until `keep` commits a path.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.kv = torch.zeros(2, num_layers, num_slots, num_heads, 0, head_dim, dtype=dtype, device=device)
        self._free = list(range(num_slots))[::-1]
        self._growth = _GROWTH_ON_CARD if device.type == "cuda" else _GROWTH

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        planes, layers, _, heads, _, size = self.kv.shape
        return planes * layers * heads * size * self.kv.element_size()

    def allocate(self) -> KVCache:
        """Returns a new empty cache.

        Raises:
            RuntimeError: every slot is in use.
        """
        if not self._free:
            raise RuntimeError(f"all {self.kv.shape[2]} slots of the cache are in use: raise max_num_seqs")
        return KVCache(self, self._free.pop())

    @torch.inference_mode()
    def copy(self, cache: KVCache) -> KVCache:
        """Returns a new cache with the contents of another."""
        new = self.allocate()
        new.length = cache.length
        self.kv[:, :, new.slot, :, : cache.length] = self.kv[:, :, cache.slot, :, : cache.length]
        return new

    def free(self, cache: KVCache) -> None:
        """Releases the slot of a cache."""
        self._free.append(cache.slot)

    def reserve(self, length: int) -> None:
        """Extends every slot to at least `length` positions."""
        capacity = self.kv.shape[4]
        if length > capacity:
            more = max(length - capacity, self._growth, capacity // 2)
            self.kv = torch.cat([self.kv, self.kv.new_zeros(*self.kv.shape[:4], more, self.kv.shape[5])], dim=4)

    def write(self, layer: int, layout: Layout, key: Float[Tensor, "m h e"], value: Float[Tensor, "m h e"]) -> None:
        """Stores the keys and values of the new nodes in one layer."""
        first = layout.first_place
        if first is not None and len(layout.slots) == 1:
            region = self.kv[:, layer, layout.slots[0], :, first : first + layout.count]
            region[0], region[1] = key.transpose(0, 1), value.transpose(0, 1)
        else:
            places = self.kv[:, layer].transpose(2, 3)  # [2, slots, T, H, D]
            places[0].index_put_((layout.slot, layout.place), key)
            places[1].index_put_((layout.slot, layout.place), value)

    def read(self, layer: int, layout: Layout) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t e"]]:
        """Returns the keys and values of one layer for the slots of `layout`, up to ``layout.length`` positions."""
        first, count = layout.slots[0], len(layout.slots)
        if layout.slots == list(range(first, first + count)):
            key, value = self.kv[:, layer, first : first + count, :, : layout.length]
        else:
            key, value = self.kv[:, layer, layout.slots, :, : layout.length]
        return key, value

    def behind(self, batch: TreeBatch, caches: Sequence[KVCache], start: Sequence[int] | None) -> Layout:
        """Lays out the new nodes behind the caches, and extends the slots if necessary."""
        layout = lay_out(batch, caches, start, self.kv.device)
        self.reserve(layout.length)
        return layout

    def attend(
        self, layer: int, states: Sequence[Float[Tensor, "m _ e"]], mask: Tensor | None, layout: Layout
    ) -> Float[Tensor, "m he"]:
        """Stores the keys and values of the new nodes, then computes attention of the new nodes over the cache.

        Args:
            layer: index of the layer.
            states: queries, keys and values of the new nodes. Queries and keys are rotated.
            mask: one of `Layout.masks`.
            layout: places of the new nodes.
        """
        query, key, value = states
        self.write(layer, layout, key, value)
        return layout.unpad(attend(layout.pad(query), *self.read(layer, layout), mask))

    @torch.inference_mode()
    def keep(self, caches: Sequence[KVCache], paths: Sequence[Sequence[int]]) -> None:
        """Commits node 0 and the path of every request, with one gather over all requests and layers."""
        slots, sources, places = [], [], []
        for cache, path in zip(caches, paths, strict=True):
            for place, node in enumerate(path, start=1):
                if node != place:
                    slots.append(cache.slot)
                    sources.append(cache.length + node)
                    places.append(cache.length + place)
            cache.length += 1 + len(path)
        if slots:
            index = torch.tensor([slots, sources, places], device=self.kv.device)
            self.kv[:, :, index[0], :, index[2]] = self.kv[:, :, index[0], :, index[1]]


def check_pool(target: Target, num_slots: int) -> None:
    """Checks that the smallest possible pool fits into memory. Call this before the pool is allocated.

    Raises:
        ValueError: the pool does not fit.
    """
    on_gpu = target.device.type == "cuda"
    positions = _GROWTH_ON_CARD if on_gpu else _GROWTH
    needed = target.new_pool(1, 1).bytes_per_token * positions * num_slots
    memory = torch.cuda.mem_get_info(target.device)[1] if on_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"max_num_seqs {num_slots} needs {needed / 2**30:.1f} GiB for the keys and values of {positions} tokens each, but "
            f"the memory has {memory / 2**30:.1f} GiB",
            "Lower max_num_seqs: more prompts wait for their turn",
        )


PREFILL_CHUNK = 512
"""Number of prompt tokens per forward. It limits the mask and the scratch memory of a long prompt."""


def prefill(
    target: Target,
    pool: Pool,
    caches: Sequence[Any],
    token_lists: Sequence[Sequence[int]],
    *,
    scored: bool = False,
    feature_layers: Sequence[int] = (),
) -> list[list[Scores]]:
    """Runs a chain of tokens for each cache, in chunks, and commits it.

    Args:
        scored: whether to compute the logits of all tokens; otherwise none are computed.
        feature_layers: the layers whose features are returned.

    Returns:
        For each request, the scores of its chunks.
    """
    found: list[list[Scores]] = [[] for _ in caches]
    for first in range(0, max(map(len, token_lists), default=0), PREFILL_CHUNK):
        live = [b for b, tokens in enumerate(token_lists) if len(tokens) > first]
        chunk = TreeBatch.chains([list(token_lists[b][first : first + PREFILL_CHUNK]) for b in live])
        some = [caches[b] for b in live]
        scores = target.forward(chunk, some, None if scored else np.empty(0, np.int64), feature_layers=feature_layers)
        pool.keep(some, [range(1, int(size)) for size in np.diff(chunk.offsets)])
        for i, b in enumerate(live):
            mine = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            features = None if scores.features is None else scores.features[mine]
            found[b].append(Scores(scores.logits[mine] if scored else scores.logits, features))
    return found
