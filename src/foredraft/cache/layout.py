"""The plan of one forward: where its nodes are in the batch and in the caches, and what each of them may attend to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.cache.blocks import BLOCK, num_blocks
from foredraft.core.tree import Ids, TreeBatch, ancestor_mask, depths_of


@dataclass(frozen=True)
class Layout:
    """The layout of one forward: where its nodes are in the batch and in the pool. M nodes are new, in packed order.

    Attributes:
        numbers: five values for each new node, in rows: token id, position, `request`, `column` and `place`. The position of a
            node is the length of its cache plus its depth. The node is in row `request` and column `column` of the padded
            [B, N] batch. Its key and value are written to `place` of the pool, see `KVCache.place`.
        device: the device of the forward.
        new: packed index of each new node.
        count: M, the number of new nodes.
        blocks: the blocks of each request, [B, ceil(T / BLOCK)]. Rows of shorter requests are filled with block 0.
        plane: number of heads, and of blocks, of the keys of one layer in the pool.
        first_block: the first block if there is one request whose blocks are consecutive; else None.
        first_place: the place of the first new node if `first_block` is not None.
        width: N, the largest number of new nodes of a request.
        length: T, the number of positions that are read of each request, which is that of the longest one.
        visible: which positions of its request each padded query may attend to.
        lengths: number of committed positions of each request.
        depths: depth of each node, per request.
        device_numbers, device_blocks: `numbers` and `blocks` on the device, if they are there already.
    """

    numbers: Int[np.ndarray, "5 m"]
    device: torch.device
    new: Int[np.ndarray, " _"]
    count: int
    blocks: Int[np.ndarray, "b k"]
    plane: tuple[int, int]
    first_block: int | None
    first_place: int | None
    width: int
    length: int
    visible: Bool[np.ndarray, "b n t"]
    lengths: list[int]
    depths: list[Int[np.ndarray, " _"]]
    device_numbers: Int[Tensor, "5 m"] | None = None
    device_blocks: Int[Tensor, "b k"] | None = None

    @cached_property
    def _on_device(self) -> Int[Tensor, "5 m"]:
        """`numbers` on the device, copied in one transfer."""
        return torch.from_numpy(self.numbers).to(self.device) if self.device_numbers is None else self.device_numbers

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
    def place(self) -> Int[Tensor, " m"]:
        """Place of each new node in the pool."""
        return self._on_device[4]

    @cached_property
    def table(self) -> Int[Tensor, "b k"]:
        """`blocks` on the device."""
        return torch.from_numpy(self.blocks).to(self.device) if self.device_blocks is None else self.device_blocks

    @cached_property
    def block_rows(self) -> Int[Tensor, " bhk"]:
        """For each request, head and block of the request, the row of this block among the rows [heads * blocks] of `plane`."""
        heads, blocks = self.plane
        return (self.table[:, None] + blocks * torch.arange(heads, device=self.device)[:, None]).flatten()

    @property
    def key_positions(self) -> Int[np.ndarray, "b t"]:
        """The token position of each key of a request."""
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

    def masks(self, windows: Iterable[int | None], dtype: torch.dtype, group: int) -> dict[int | None, Tensor | None]:
        """Returns the mask of each window, its rows repeated for the `group` query heads that share a key head."""
        masks = {window: self.mask(dtype, self.device, window) for window in windows}
        return {window: None if mask is None else mask.repeat(1, 1, group, 1) for window, mask in masks.items()}

    def rows_of(self, rows: Ids) -> Int[Tensor, " r"]:
        """Returns the indices of the packed nodes `rows` among the new nodes."""
        return torch.from_numpy(np.searchsorted(self.new, rows)).to(self.device)

    def pad(self, states: Float[Tensor, "m h e"]) -> Float[Tensor, "b n h e"]:
        """Converts states of new nodes to the padded batch."""
        if len(self.lengths) * self.width == self.count:
            return states.view(len(self.lengths), self.width, *states.shape[1:])
        padded = states.new_zeros(len(self.lengths), self.width, *states.shape[1:])
        padded[self.request, self.column] = states
        return padded

    def unpad(self, states: Float[Tensor, "b n d"]) -> Float[Tensor, "m d"]:
        """Converts the padded batch back to states of new nodes."""
        if len(self.lengths) * self.width == self.count:
            return states.flatten(0, 1)
        return states[self.request, self.column]


def additive(seen: Bool[Tensor, "b n t"], dtype: torch.dtype) -> Float[Tensor, "b 1 n t"]:
    """Returns the additive attention mask that hides all positions that are not `seen`."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]


def lay_out(batch: TreeBatch, caches: Sequence[Any], start: Sequence[int] | None, device: torch.device) -> Layout:
    """Plans one forward of `batch` behind caches of one pool. The first ``start[b]`` nodes of tree b were run before."""
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
    blocks = block_rows([cache.blocks for cache in caches], length)
    at = lengths[request] + local
    places = blocks[request, at // BLOCK] * BLOCK + at % BLOCK
    is_run = len(batch) == 1 and bool((np.diff(blocks[0]) == 1).all())

    positions = np.concatenate([tree_depths[f:] for tree_depths, f in zip(depths, first, strict=True)]) + lengths[request]
    return Layout(
        numbers=np.stack([batch.tokens[new], positions, request, local - first[request], places]),
        device=device,
        new=new,
        count=len(new),
        blocks=blocks,
        plane=tuple(caches[0].pool.kv.shape[2:4]),
        first_block=int(blocks[0, 0]) if is_run else None,
        first_place=int(places[0]) if is_run else None,
        width=width,
        length=length,
        visible=visible,
        lengths=lengths.tolist(),
        depths=depths,
    )


def block_rows(blocks: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "b k"]:
    """Returns the blocks of the first `length` positions of each request, one row per request, filled with block 0."""
    count = num_blocks(length)
    rows = np.zeros((len(blocks), count), np.int64)
    for row, mine in zip(rows, blocks, strict=True):
        row[: min(len(mine), count)] = mine[:count]
    return rows


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
