"""Bookkeeping for drafters with a cache: the nodes that a drafter runs in one step.

First come the committed tokens that are not in the cache yet, as a chain. The nodes of the growing tree follow, in the order
in which the tree policy requests them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from foredraft.core.tree import Ids, TreeBatch


@dataclass(eq=False)
class Growing:
    """The nodes that one request has run in this step.

    Attributes:
        cache: the drafter's cache.
        pending: committed tokens that are not in the cache yet. The last one is the root.
        tokens, parents: the nodes run in this step: `pending` as a chain, then the expanded nodes.
        place: maps a node of the growing tree to its index in `tokens`.
    """

    cache: Any
    pending: list[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)

    def add(self, node: int, token: int, parent: int) -> None:
        """Adds a node to the run. The first call adds the pending tokens before it, the last of which is the root."""
        if not self.tokens:
            self.tokens = list(self.pending)
            self.parents = list(range(-1, len(self.pending) - 1))
            self.place = {0: len(self.pending) - 1}
        if node:
            self.place[node] = len(self.tokens)
            self.parents.append(self.place[parent])
            self.tokens.append(token)

    def clear(self) -> None:
        """Clears the run."""
        self.tokens, self.parents, self.place = [], [], {}


class Pass(NamedTuple):
    """One forward for the expanded nodes of a batch.

    Attributes:
        live: indices of the requests that take part.
        batch: their runs as trees.
        start: number of nodes of each run that were run before.
        rows: packed indices of the expanded nodes, in the requested order.
    """

    live: list[int]
    batch: TreeBatch
    start: list[int]
    rows: Ids


def next_pass(runs: Sequence[Growing], partial: TreeBatch, node_ids: Ids) -> Pass:
    """Adds the packed nodes `node_ids` of the growing trees `partial` to the runs. Returns the forward that runs them."""
    begins, packed = partial.offsets.tolist(), node_ids.tolist()
    owners = [bisect_right(begins, node) - 1 for node in packed]
    live = sorted(set(owners))
    start = [len(runs[b].tokens) for b in live]
    for b, node, token, parent in zip(
        owners, packed, partial.tokens[node_ids].tolist(), partial.parents[node_ids].tolist(), strict=True
    ):
        runs[b].add(node - begins[b], token, parent)
    batch = TreeBatch.chains([runs[b].tokens for b in live], [runs[b].parents for b in live])
    first = dict(zip(live, batch.offsets.tolist(), strict=False))
    rows = [first[b] + runs[b].place[node - begins[b]] for b, node in zip(owners, packed, strict=True)]
    return Pass(live, batch, start, np.array(rows, np.int64))


class Paths(NamedTuple):
    """The paths from some nodes of growing trees up to their roots.

    Attributes:
        owners: index of the request of each node.
        depths: depth of each node.
        nodes: packed nodes from each node upwards, one path per row. The root is repeated to fill a row.
    """

    owners: Ids
    depths: Ids
    nodes: Int[np.ndarray, "n d"]


def paths_of(partial: TreeBatch, node_ids: Ids) -> Paths:
    """Returns the paths from the packed nodes `node_ids` to their roots."""
    owners = np.searchsorted(partial.offsets, node_ids, side="right") - 1
    roots, climbed = partial.offsets[owners], [node_ids]
    while (climbed[-1] != roots).any():
        climbed.append(roots + np.maximum(partial.parents[climbed[-1]], 0))
    nodes = np.stack(climbed, axis=1)
    return Paths(owners, (nodes != roots[:, None]).sum(axis=1), nodes)
