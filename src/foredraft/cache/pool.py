"""Key-value caches: one pool tensor for all requests, a handle per request, and the layout of each step in the pool."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.core.contracts import Pool, Scores, Target
from foredraft.core.tree import Ids, TreeBatch, ancestor_mask, depths_of

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
        self,
        *,
        num_slots: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
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
        raise ValueError(
            f"max_num_seqs {num_slots} needs {needed / 2**30:.1f} GiB for the keys and values of {positions} tokens each, but "
            f"the memory has {memory / 2**30:.1f} GiB. Lower max_num_seqs: more prompts wait for their turn"
        )


@dataclass(frozen=True)
class Layout:
    """The layout of one forward: where its nodes are in the batch and in the pool. M nodes are new, in packed order.

    Attributes:
        numbers: six values for each new node, in rows: token id, position, `request`, `column`, `slot` and `place`. The
            position of a node is the length of its cache plus its depth. The node is in row `request` and column `column`
            of the padded [B, N] batch. Its key and value are written to `place` of `slot`.
        device: the device of the forward.
        new: packed index of each new node.
        count: M, the number of new nodes.
        slots: slot of each request.
        first_place: the place of the first new node; None if it is not known before the step runs.
        width: N, the largest number of new nodes of a request.
        length: number of positions read per slot, given by the longest request.
        visible: which positions of its slot each padded query may attend to.
        lengths: number of committed positions of each request.
        depths: depth of each node, per request.
        lying: `numbers` on the device, if they are there already.
    """

    numbers: Int[np.ndarray, "6 m"]
    device: torch.device
    new: Int[np.ndarray, " _"]
    count: int
    slots: list[int]
    first_place: int | None
    width: int
    length: int
    visible: Bool[np.ndarray, "b n t"]
    lengths: list[int]
    depths: list[Int[np.ndarray, " _"]]
    lying: Int[Tensor, "6 m"] | None = None

    @cached_property
    def _on_device(self) -> Int[Tensor, "6 m"]:
        """`numbers` on the device, copied in one transfer."""
        return torch.from_numpy(self.numbers).to(self.device) if self.lying is None else self.lying

    @property
    def token_ids(self) -> Int[Tensor, " m"]:
        """Token id of each new node."""
        return self._on_device[0]

    @property
    def positions(self) -> Int[Tensor, " m"]:
        """Position of each new node: cache length plus depth."""
        return self._on_device[1]

    @property
    def request(self) -> Int[Tensor, " m"]:
        """Row of each new node in the padded batch."""
        return self._on_device[2]

    @property
    def column(self) -> Int[Tensor, " m"]:
        """Column of each new node in the padded batch."""
        return self._on_device[3]

    @property
    def slot(self) -> Int[Tensor, " m"]:
        """Slot of each new node in the pool."""
        return self._on_device[4]

    @property
    def place(self) -> Int[Tensor, " m"]:
        """Index of each new node within its slot."""
        return self._on_device[5]

    @property
    def ends(self) -> list[int]:
        """The first place behind the tree of each request."""
        return [length + len(depths) for length, depths in zip(self.lengths, self.depths, strict=True)]

    @property
    def key_positions(self) -> Int[np.ndarray, "b t"]:
        """The token position at each place of a slot."""
        positions = np.tile(np.arange(self.length), (len(self.lengths), 1))
        for row, length, depths in zip(positions, self.lengths, self.depths, strict=True):
            row[length : length + len(depths)] = length + depths
        return positions

    def seen(self, window: int | None = None) -> Bool[np.ndarray, "b n t"]:
        """Returns `visible` without keys that are `window` or more positions back. Positions count depth, not node index."""
        if window is None:
            return self.visible
        queries = np.zeros(self.visible.shape[:2], np.int64)
        queries[self.numbers[2], self.numbers[3]] = self.numbers[1]
        seen = self.visible & (self.key_positions[:, None, :] > queries[:, :, None] - window)
        seen[:, :, 0] |= ~seen.any(-1)  # a padding row that attends to nothing would give NaN
        return seen

    def mask(self, dtype: torch.dtype, device: torch.device, window: int | None = None) -> Float[Tensor, "b 1 n t"] | None:
        """Returns the additive attention mask of `seen`; None if every query sees every key."""
        seen = self.seen(window)
        return None if seen.all() else additive(torch.from_numpy(seen).to(device), dtype)

    def rows_of(self, rows: Ids) -> Int[Tensor, " r"]:
        """Returns the indices of the packed nodes `rows` among the new nodes."""
        return torch.from_numpy(np.searchsorted(self.new, rows)).to(self.device)

    def pad(self, states: Float[Tensor, "m h e"]) -> Float[Tensor, "b n h e"]:
        """Converts states of new nodes to the padded batch."""
        if len(self.slots) * self.width == self.count:
            return states.view(len(self.slots), self.width, *states.shape[1:])
        padded = states.new_zeros(len(self.slots), self.width, *states.shape[1:])
        padded[self.request, self.column] = states
        return padded

    def unpad(self, states: Float[Tensor, "b n d"]) -> Float[Tensor, "m d"]:
        """Converts the padded batch back to states of new nodes."""
        if len(self.slots) * self.width == self.count:
            return states.flatten(0, 1)
        return states[self.request, self.column]


def additive(seen: Bool[Tensor, "b n t"], dtype: torch.dtype) -> Float[Tensor, "b 1 n t"]:
    """Returns the additive attention mask that hides all positions that are not `seen`."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def lay_out(batch: TreeBatch, caches: Sequence[KVCache], start: Sequence[int] | None, device: torch.device) -> Layout:
    """Plans one forward of `batch`. The first ``start[b]`` nodes of tree b are in the cache already."""
    sizes = np.diff(batch.offsets)
    first = np.zeros(len(batch), np.int64) if start is None else np.asarray(start, np.int64)
    lengths = np.asarray([cache.length for cache in caches], np.int64)
    width, length = int((sizes - first).max()), int((lengths + sizes).max())
    visible = np.zeros((len(batch), width, length), dtype=bool)
    nodes, depths = [], []
    for b, size in enumerate(sizes.tolist()):
        parents = batch.parents[batch.offsets[b] : batch.offsets[b + 1]]
        begin, end = int(lengths[b]), int(lengths[b]) + size
        visible[b, :, :begin] = True
        visible[b, size - first[b] :, 0] = True  # a padding row that attends to nothing would give NaN
        visible[b, : size - first[b], begin:end] = ancestor_mask(parents)[first[b] :]
        nodes.append(np.arange(first[b], size))
        depths.append(depths_of(parents))
    request = np.repeat(np.arange(len(batch)), sizes - first)
    local = np.concatenate(nodes)
    new = local + batch.offsets[request]
    slots = np.asarray([cache.slot for cache in caches], np.int64)

    positions = np.concatenate([tree_depths[f:] for tree_depths, f in zip(depths, first, strict=True)]) + lengths[request]
    numbers = batch.tokens[new], positions, request, local - first[request], slots[request], lengths[request] + local
    return Layout(
        numbers=np.stack(numbers),
        device=device,
        new=new,
        count=len(new),
        slots=slots.tolist(),
        first_place=int(lengths[0] + first[0]),
        width=width,
        length=length,
        visible=visible,
        lengths=lengths.tolist(),
        depths=depths,
    )


def among_new(
    rows: Int[np.ndarray, " r"], offsets: Int[np.ndarray, " b1"], first: Sequence[int] | Int[np.ndarray, " b"]
) -> Int[np.ndarray, " r"]:
    """Returns the indices of the packed nodes `rows` among the new nodes.

    Args:
        offsets: offsets of the trees in packed order.
        first: number of nodes at the start of each tree that are not new.
    """
    if len(first) == 1:
        return rows - first[0]
    trees = np.searchsorted(offsets, rows, side="right") - 1
    return np.asarray(rows, np.int64) - np.cumsum(first)[trees]


def index_of(rows: Sequence[int] | Int[np.ndarray, " r"], device: torch.device) -> slice | Int[Tensor, " r"]:
    """Returns an index that selects `rows` of a tensor on `device`. For consecutive rows, it is a slice without a transfer."""
    listed = list(rows) if isinstance(rows, Sequence) else rows.tolist()
    first, count = listed[0] if listed else 0, len(listed)
    if listed == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(listed, device=device)


def rows_of(table: Float[Tensor, "n d"], rows: Sequence[int] | Int[np.ndarray, " r"]) -> Float[Tensor, "r d"]:
    """Returns `rows` of a table. For consecutive rows, the result is a view."""
    return table[index_of(rows, table.device)]


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
