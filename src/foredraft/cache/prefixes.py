"""Prefixes that requests share: finds the blocks that hold the keys and values of the first tokens of a text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from foredraft.cache.blocks import BLOCK, Blocks

Key = tuple[Hashable, tuple[int, ...]]
"""What precedes a block, and the tokens of the block. The name of a namespace precedes the first block.

Keys are compared token by token, so equal hashes of different prefixes do no harm."""


@dataclass(eq=False)
class Published:
    """A block that later requests may find."""

    block: int
    key: Key


@dataclass
class Trail:
    """How far the blocks of one request are published.

    Attributes:
        last: the last of these blocks, or the name of the namespace.
        beyond: number of tokens behind a block on which its contents also depend. It is 1 for a drafter whose entry at a
            position holds the next token, else 0.
        count: number of published blocks.
    """

    last: Hashable
    beyond: int = 0
    count: int = 0

    def next_key(self, tokens: Sequence[int], length: int) -> Key | None:
        """Returns the key of the next block of a text; None if `length` tokens of the text do not fill it."""
        begin, end = self.count * BLOCK, (self.count + 1) * BLOCK
        known = end <= length and end + self.beyond <= len(tokens)
        return (self.last, tuple(tokens[begin : end + self.beyond])) if known else None


class Prefixes:
    """The published blocks of one pool.

    A block is published once all its keys and values are written, including those of the drafter. It is forgotten when it is
    given out again.
    """

    def __init__(self, blocks: Blocks):
        self._blocks = blocks
        self._found: dict[Key, Published] = {}
        self._by_block: dict[int, list[Published]] = {}
        blocks.forget = self._forget

    def match(self, trail: Trail, tokens: Sequence[int], length: int) -> list[int]:
        """Returns the published blocks of the first `length` tokens of a text, or of fewer tokens.

        Args:
            trail: how far the text is matched already; it is extended. Only blocks of its namespace are found.
        """
        blocks = list[int]()
        while (key := trail.next_key(tokens, length)) is not None and (found := self._found.get(key)) is not None:
            blocks.append(found.block)
            trail.last, trail.count = found, trail.count + 1
        return blocks

    def publish(self, trail: Trail, blocks: Sequence[int], tokens: Sequence[int], length: int) -> None:
        """Publishes the blocks of a request that `length` tokens fill. A block that was published for the same tokens stays.

        Args:
            trail: how far the request has published; it is extended.
            blocks: the blocks of the request.
            length: number of tokens whose keys and values are written.
        """
        while (key := trail.next_key(tokens, length)) is not None:
            published = self._found.get(key)
            if published is None:
                block = blocks[trail.count]
                published = self._found[key] = Published(block, key)
                self._by_block.setdefault(block, []).append(published)
                self._blocks.keep(block)
            trail.last, trail.count = published, trail.count + 1

    def release_all(self) -> None:
        """Frees all blocks, even if other changes were interrupted anywhere. What is published stays."""
        self._by_block = {}
        for published in self._found.values():
            self._by_block.setdefault(published.block, []).append(published)
        self._blocks.release_all(self._by_block)

    def _forget(self, block: int) -> None:
        for published in self._by_block.pop(block):
            del self._found[published.key]
