"""Key-value caches: one pool tensor for all requests, a handle per request, and the prefill of prompts."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.blocks import BLOCK, Blocks, num_blocks
from foredraft.cache.layout import Layout, lay_out
from foredraft.core.contracts import Scores, Target
from foredraft.core.tree import TreeBatch
from foredraft.kernels.attention import attend

_ALONE = 64
"""Number of full contexts that fit into the blocks of a drafter that is used without a target."""


@dataclass(eq=False)
class KVCache:
    """A request's handle into a pool: its blocks, and how many tokens they hold.

    Attributes:
        blocks: numbers of the blocks, in the order of their tokens. A drafter's handle shares this list with the target's.
        length: number of committed tokens in the cache, which are all tokens of the request except the root.
    """

    pool: KVPool
    blocks: list[int] = field(default_factory=list)
    length: int = 0

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} tokens to {length}")
        self.length = length

    def reserve(self, length: int) -> None:
        """Takes the blocks that are missing for `length` tokens.

        Raises:
            OutOfBlocksError: too few blocks are free.
        """
        missing = num_blocks(length) - len(self.blocks)
        if missing > 0:
            self.blocks += self.pool.blocks.take(missing, self.blocks[-1] if self.blocks else None)

    def place(self, position: int) -> int:
        """Returns the place of a token in the pool: its block times `BLOCK`, plus its index in the block."""
        return self.blocks[position // BLOCK] * BLOCK + position % BLOCK


class KVPool:
    """Keys and values of all requests in a single tensor of shape [2, L, H, blocks, `BLOCK`, D].

    A captured forward (`foredraft.models.graphs`) can run on any pool whose tensor has the same address as the captured one.
    For this reason, a pool has no other tensor, and its tensor never moves. On a CPU, the system provides the memory page by
    page, when a page is first written.

    Tree nodes are stored behind the committed tokens of a request, node i at ``length + i``, until `keep` commits a path.

    Args:
        blocks: number of blocks, or the blocks of another pool: a drafter's pool shares those of the target's pool.
    """

    def __init__(
        self, blocks: int | Blocks, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.blocks = Blocks(blocks) if isinstance(blocks, int) else blocks
        shape = 2, num_layers, num_heads, self.blocks.count + 1, BLOCK, head_dim
        self.kv = torch.zeros(shape, dtype=dtype, device=device) if device.type != "cpu" else _zeros(shape, dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token."""
        planes, layers, heads, _, _, size = self.kv.shape
        return planes * layers * heads * size * self.kv.element_size()

    @cached_property
    def address(self) -> tuple[int, int, int, int]:
        """Where compiled code finds keys and values: their addresses, and the strides of layers and of heads in elements."""
        keys, (pairs, layers, heads, *_) = self.kv.data_ptr(), self.kv.stride()
        return keys, keys + pairs * self.kv.element_size(), layers, heads

    def allocate(self) -> KVCache:
        """Returns a new empty cache, which holds no blocks yet."""
        return KVCache(self)

    def free(self, cache: KVCache) -> None:
        """Releases the blocks of a cache, and thus those of the drafters' caches that share its list of blocks."""
        self.blocks.release(cache.blocks)
        cache.blocks.clear()

    def reserve(self, caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
        """Takes the blocks that are missing for some tokens of each request.

        Raises:
            OutOfBlocksError: too few blocks are free.
        """
        for cache, length in zip(caches, lengths, strict=True):
            cache.reserve(length)

    def write(self, layer: int, layout: Layout, key: Float[Tensor, "m h e"], value: Float[Tensor, "m h e"]) -> None:
        """Stores the keys and values of the new nodes in one layer."""
        first, places = layout.first_place, self.kv[:, layer].flatten(2, 3)  # [2, H, T, D], a view
        if first is not None:
            region = places[:, :, first : first + layout.count]
            region[0], region[1] = key.transpose(0, 1), value.transpose(0, 1)
        else:
            places = places.transpose(1, 2)
            places[0].index_put_((layout.place,), key)
            places[1].index_put_((layout.place,), value)

    def read(self, layer: int, layout: Layout) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t e"]]:
        """Returns the keys and values of one layer for the requests of `layout`, up to ``layout.length`` positions."""
        if layout.first_block is not None:
            begin = layout.first_block * BLOCK
            key, value = self.kv[:, layer].flatten(2, 3)[:, None, :, begin : begin + layout.length]
            return key, value
        size = self.kv.shape[5]
        shape = len(layout.lengths), self.kv.shape[2], -1, size
        rows = self.kv[:, layer].view(2, -1, BLOCK * size)  # a block of a head each, which is the fastest unit to copy
        key, value = (part.index_select(0, layout.block_rows).view(shape)[:, :, : layout.length] for part in rows)
        return key, value

    def behind(self, batch: TreeBatch, caches: Sequence[KVCache], start: Sequence[int] | None) -> Layout:
        """Lays out the new nodes behind the caches, and takes the blocks that are missing.

        Raises:
            OutOfBlocksError: too few blocks are free.
        """
        sizes = np.diff(batch.offsets).tolist()
        self.reserve(caches, [cache.length + size for cache, size in zip(caches, sizes, strict=True)])
        return lay_out(batch, caches, start, self.kv.device)

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

    def keep(self, caches: Sequence[KVCache], paths: Sequence[Sequence[int]]) -> None:
        """Commits node 0 and the path of every request, with one gather over all requests and layers."""
        sources, places = [], []
        for cache, path in zip(caches, paths, strict=True):
            for place, node in enumerate(path, start=1):
                if node != place:
                    sources.append(cache.place(cache.length + node))
                    places.append(cache.place(cache.length + place))
            cache.length += 1 + len(path)
        if sources:
            self._move(sources, places)

    @torch.inference_mode()
    def _move(self, sources: Sequence[int], places: Sequence[int]) -> None:
        from_there, there = torch.tensor([sources, places], device=self.kv.device)
        tokens = self.kv.flatten(3, 4)  # a view
        tokens[:, :, :, there] = tokens[:, :, :, from_there]


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns zeros in memory that the system provides page by page, when a page is first written.

    So short requests do not pay for a long context.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    size = prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, size), **private)
    with torch.inference_mode(False):  # written inside and outside of this mode
        return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(*shape)


class DrafterPools:
    """The pools of one drafter, one beside each target pool that it is used with.

    They hold the drafter's own keys and values, in the target's blocks.

    Args:
        make: makes a pool over given blocks.
        max_len: the longest context of the drafter, in tokens.
    """

    def __init__(self, make: Callable[[Blocks], Any], max_len: int):
        self._make, self._max_len = make, max_len

    def cache(self, target: Any, length: int = 0) -> Any:
        """Returns the drafter's handle of a request, which shares the blocks of the target's handle.

        Args:
            target: the target's cache. None, for tests and tools, gives the request blocks of its own.
            length: number of tokens whose keys and values the drafter finds in these blocks.
        """
        blocks = self._own if target is None else target.pool.blocks
        pool = blocks.pools.get(self)
        if pool is None:
            pool = blocks.pools[self] = self._make(blocks)
        cache = pool.allocate()
        if target is not None:
            cache.blocks, cache.length = target.blocks, length
        return cache

    def finish(self, cache: Any) -> None:
        """Releases the blocks of a handle that has blocks of its own. Others belong to the target."""
        if cache.pool.blocks is self.__dict__.get("_own"):
            cache.pool.free(cache)

    @cached_property
    def _own(self) -> Blocks:
        return Blocks(num_blocks(self._max_len, _ALONE))


PREFILL_CHUNK = 512
"""Number of prompt tokens per forward. It limits the mask and the scratch memory of a long prompt."""


def prefill(
    target: Target,
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
        some[0].pool.keep(some, [range(1, int(size)) for size in np.diff(chunk.offsets)])
        for i, b in enumerate(live):
            mine = slice(int(chunk.offsets[i]), int(chunk.offsets[i + 1]))
            features = None if scores.features is None else scores.features[mine]
            found[b].append(Scores(scores.logits[mine] if scored else scores.logits, features))
    return found
