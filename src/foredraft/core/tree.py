"""Token trees, the single data type for drafts, prompts and plain decoding.

A tree is a list of nodes, each with a pointer to its parent. Node 0 is the *root*: the last committed token, which the target
has not run yet. A chain is a tree without branches. A prompt is a chain, and plain decoding uses a tree of one node. Masks,
depths and paths are computed here on demand and stored nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.core.shape import Drawn as Drawn

Ids = Int[np.ndarray, " n"]

_NO_LAWS = torch.empty(0, 0)


@dataclass(frozen=True, eq=False)
class DraftTree:
    """One request's tree.

    Attributes:
        tokens: token id of each node; ``tokens[0]`` is the root, which is already committed.
        parents: parent of each node, ``parents[0] == -1`` and ``parents[i] < i``. Siblings are stored in draw order.
        drawn: per *parent* node, how its children were drawn (a `Drawn` value, without meaning for a leaf).
        draft_row: per *parent* node, the row of `draft_probs` from which its children were drawn; -1 if none was drawn.
        draft_probs: the draft laws after all transformations (temperature, truncation). Entry j of a row is token j.
        draft_ids: for truncated laws, the token of each entry. All other tokens have probability 0.
        vocab_size: required only with `draft_ids`.
    """

    tokens: Ids
    parents: Ids
    drawn: Ids
    draft_row: Ids
    draft_probs: Float[Tensor, "r k"]
    draft_ids: Int[Tensor, "r k"] | None = None
    vocab_size: int = 0

    @property
    def num_nodes(self) -> int:
        """Number of nodes, including the root."""
        return len(self.tokens)

    @cached_property
    def children(self) -> list[list[int]]:
        """The children of every node, in draw order."""
        children: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parents[1:].tolist(), start=1):
            children[parent].append(node)
        return children

    @cached_property
    def depths(self) -> Ids:
        """Distance of every node from the root."""
        return depths_of(self.parents)

    @cached_property
    def ranks(self) -> list[tuple[int, ...]]:
        """The address of every node: the sibling ranks on the path from the root. It does not depend on tokens."""
        ranks: list[tuple[int, ...]] = [()] * self.num_nodes
        for parent, siblings in enumerate(self.children):
            for rank, child in enumerate(siblings):
                ranks[child] = (*ranks[parent], rank)
        return ranks

    def path_to(self, node: int) -> list[int]:
        """Returns the nodes from below the root down to `node`; empty for the root."""
        path = []
        while node > 0:
            path.append(node)
            node = int(self.parents[node])
        return path[::-1]

    def law(self, node: int) -> Float[Tensor, " v"] | None:
        """Returns the law over the whole vocabulary from which the children of `node` were drawn; None if none was drawn."""
        row = int(self.draft_row[node])
        if row < 0:
            return None
        probs = self.draft_probs[row]
        if self.draft_ids is None:
            return probs
        return probs.new_zeros(self.vocab_size).scatter_(0, self.draft_ids[row], probs)


def depths_of(parents: Ids) -> Ids:
    """Returns the depth of every node. Every parent must come before its children."""
    depths = [0] * len(parents)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            depths[node] = depths[parent] + 1
    return np.asarray(depths, dtype=np.int64)


def ancestor_mask(parents: Ids) -> Bool[np.ndarray, "n n"]:
    """Returns the attention mask within a tree: ``mask[i, j]`` is true iff node j is node i or one of its ancestors."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


@dataclass(frozen=True, eq=False)
class TreeBatch:
    """The trees of B requests, packed one after another. Growers, masks and targets use this form.

    Attributes:
        tokens, parents, drawn, draft_row: as in `DraftTree`, concatenated. `parents` remain local to their tree, and
            `draft_row` points into the common `draft_probs`.
        draft_probs, draft_ids, vocab_size: as in `DraftTree`.
        offsets: tree b holds the packed nodes ``offsets[b]`` to ``offsets[b + 1] - 1``.
    """

    tokens: Ids
    parents: Ids
    drawn: Ids
    draft_row: Ids
    offsets: Int[np.ndarray, " b1"]
    draft_probs: Float[Tensor, "r k"]
    draft_ids: Int[Tensor, "r k"] | None = None
    vocab_size: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def bounds(self) -> list[int]:
        """The `offsets` as a list."""
        return self.offsets.tolist()

    def __getitem__(self, b: int) -> DraftTree:
        part = slice(int(self.offsets[:-1][b]), int(self.offsets[1:][b]))
        laws = self.draft_probs, self.draft_ids, self.vocab_size
        return DraftTree(self.tokens[part], self.parents[part], self.drawn[part], self.draft_row[part], *laws)

    @staticmethod
    def chains(token_lists: Sequence[Sequence[int]], parents: Sequence[Sequence[int]] | None = None) -> TreeBatch:
        """Returns trees without sampled nodes. They are chains, or have the shapes given by `parents`."""
        if parents is None:
            parents = [range(-1, len(tokens) - 1) for tokens in token_lists]
        bounds = [*accumulate(map(len, token_lists), initial=0)]
        columns = np.zeros((4, bounds[-1]), np.int64)  # one array: every step makes one
        columns[0], columns[3] = [*chain.from_iterable(token_lists)], -1
        columns[1] = np.fromiter(chain.from_iterable(parents), np.int64, bounds[-1])
        return TreeBatch(*columns, offsets=np.array(bounds, np.int64), draft_probs=_NO_LAWS)

    @staticmethod
    def roots(token_ids: Sequence[int]) -> TreeBatch:
        """Returns trees of one node each, as plain decoding runs them."""
        return TreeBatch(np.array(token_ids, np.int64), *_shape_of_roots(len(token_ids)), draft_probs=_NO_LAWS)

    @staticmethod
    def joined(trees: Sequence[DraftTree]) -> TreeBatch:
        """Packs trees into one batch. Trees with draft laws must share one table `draft_probs`."""
        sampled = next((tree for tree in trees if len(tree.draft_probs)), trees[0])
        assert all(tree.draft_probs is sampled.draft_probs or not len(tree.draft_probs) for tree in trees)
        return TreeBatch(
            tokens=np.concatenate([tree.tokens for tree in trees]),
            parents=np.concatenate([tree.parents for tree in trees]),
            drawn=np.concatenate([tree.drawn for tree in trees]),
            draft_row=np.concatenate([tree.draft_row for tree in trees]),
            offsets=np.cumsum([0, *(tree.num_nodes for tree in trees)], dtype=np.int64),
            draft_probs=sampled.draft_probs,
            draft_ids=sampled.draft_ids,
            vocab_size=sampled.vocab_size,
        )


@lru_cache(maxsize=256)
def _shape_of_roots(count: int) -> tuple[Ids, Ids, Ids, Int[np.ndarray, " n1"]]:
    """Returns `parents`, `drawn`, `draft_row` and `offsets` of trees of one node. They are shared, so they are read-only."""
    shape = np.full(count, -1), np.zeros(count, np.int64), np.full(count, -1), np.arange(count + 1)
    for numbers in shape:
        numbers.flags.writeable = False
    return shape
