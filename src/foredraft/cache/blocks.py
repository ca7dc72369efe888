"""The blocks of a pool: which are free, which requests hold the others, and which hold a prefix that can be shared.

A block holds the keys and values of `BLOCK` consecutive tokens, of the target and of the drafters. A request holds a list of
blocks. Requests with equal prefixes can hold the same blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

BLOCK = 32
"""Tokens of a block. Larger blocks are faster to read where they are apart in memory, and waste more of the last block."""


class OutOfBlocksError(RuntimeError):
    """Every block is in use."""


def num_blocks(num_tokens: int, num_requests: int = 1) -> int:
    """Returns the number of blocks that hold `num_tokens` tokens of each of some requests."""
    return num_requests * -(-num_tokens // BLOCK)


class Blocks:
    """Gives out the blocks of one pool, by number. Block 0 is never given out: padding is written there.

    A block that nobody holds is free. A free block may keep its contents for later requests; see `keep`. Such blocks are
    given out last, the least recently released one first. The blocks of a request are consecutive where possible, because
    they are read faster then.

    Args:
        count: number of blocks.

    Attributes:
        forget: called with a kept block before it is given out with new contents.
        pools: further pools over the same blocks, by owner, such as those of drafters. A pool is dropped with its owner.
    """

    def __init__(self, count: int):
        self.count = count
        self.forget: Callable[[int], None] = lambda block: None
        self.pools: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._holders: dict[int, int] = {}
        self._is_empty = np.ones(count + 2, bool)  # free, and without contents that are kept
        self._is_empty[[0, -1]] = False
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._keeps: set[int] = set()

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds."""
        return self.count - len(self._holders)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Gives out `count` blocks. Their contents are arbitrary.

        Args:
            after: the last block of the request, whose next blocks are preferred; None for a new request.

        Raises:
            OutOfBlocksError: fewer blocks are free. None is given out in this case.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks of {BLOCK} tokens are needed, but {self.num_free} of {self.count} are free")
        taken: list[int] = []
        while len(taken) < count:
            block = 0 if after is None else after + 1
            if not self._is_empty[block]:
                block = self._somewhere(count - len(taken))
            self._is_empty[block] = False
            taken.append(block)
            after = block
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each block. A free block among them must have been kept."""
        for block in blocks:
            self._holders[block] = self._holders.get(block, 0) + 1
            self._kept.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Removes a holder of each block. Of kept ones, the last of a request is reused first, as its prefix is the longest."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if block in self._keeps:
                    self._kept[block] = None
                else:
                    self._is_empty[block] = True

    def release_all(self, kept: Iterable[int]) -> None:
        """Frees all blocks, even if other changes were interrupted anywhere.

        Args:
            kept: blocks whose contents are kept. Those that were held until now are given out later than the others, and the
                last one of `kept` first.
        """
        is_kept = dict.fromkeys(kept)
        earlier = [block for block in self._kept if block in is_kept]
        order = dict.fromkeys([*earlier, *reversed(is_kept)])
        self._is_empty[:] = True
        self._is_empty[[0, -1, *order]] = False
        self._holders, self._keeps, self._kept = {}, {*order}, OrderedDict(order)

    def keep(self, block: int) -> None:
        """Keeps the contents of a held block after its release, until the block is given out again."""
        self._keeps.add(block)

    def num_holders(self, block: int) -> int:
        """Number of requests that hold a block."""
        return self._holders.get(block, 0)

    def _somewhere(self, count: int) -> int:
        """Returns an empty block, with ``count - 1`` others behind it if possible. If none is empty, a kept one is forgotten.

        It lies in the middle of the longest run of empty blocks, so that the request before this run can grow too.
        """
        edges = np.flatnonzero(np.diff(self._is_empty)) + 1
        if len(edges):
            first, end = edges.reshape(-1, 2)[np.diff(edges)[::2].argmax()].tolist()
            return first if first == 1 else max(first, min((first + end) // 2, end - count))
        block, _ = self._kept.popitem(last=False)
        self._keeps.discard(block)
        self.forget(block)
        return block
