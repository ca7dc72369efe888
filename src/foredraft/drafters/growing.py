"""What a drafter with a cache runs in a step: the committed tokens that the cache lacks, as a chain, and behind them the
nodes of the growing tree, in the order in which a grower asks for them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from foredraft.protocols import Budget
from foredraft.tree import Ids, TreeBatch


@dataclass(eq=False)
class Growing:
    """One request's run of this step.

    Attributes:
        cache: of the drafter.
        pending: committed tokens that are not in the cache yet; the last one is the root.
        tokens, parents: what was run this step behind the cache: `pending` as a chain, then the expanded nodes.
        place: node of the growing tree -> its place among `tokens`.
    """

    cache: Any
    pending: list[int]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)

    def add(self, node: int, token: int, parent: int) -> None:
        """Adds a node to what is run; before the first one, the pending tokens whose last is the root."""
        if not self.tokens:
            self.tokens = list(self.pending)
            self.parents = list(range(-1, len(self.pending) - 1))
            self.place = {0: len(self.pending) - 1}
        if node:
            self.place[node] = len(self.tokens)
            self.parents.append(self.place[parent])
            self.tokens.append(token)

    def clear(self) -> None:
        """Forgets the run."""
        self.tokens, self.parents, self.place = [], [], {}


class Pass(NamedTuple):
    """One forward for the expanded nodes of a batch.

    Attributes:
        live: the requests that take part.
        batch: their runs as trees.
        start: how many nodes of each were run before.
        rows: packed places of the expanded nodes, in the order asked for.
    """

    live: list[int]
    batch: TreeBatch
    start: list[int]
    rows: Ids


def next_pass(runs: Sequence[Growing], partial: TreeBatch, node_ids: Ids) -> Pass:
    """Adds the packed nodes `node_ids` of the growing trees `partial` to the runs, and plans the forward that runs them."""
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
    """Where some nodes of growing trees stand.

    Attributes:
        owners, depths: the request and the depth of each.
        nodes: packed nodes from each upwards; the root is repeated.
    """

    owners: Ids
    depths: Ids
    nodes: Int[np.ndarray, "n d"]


def paths_of(partial: TreeBatch, node_ids: Ids) -> Paths:
    """The paths to the packed nodes `node_ids`, all at once."""
    owners = np.searchsorted(partial.offsets, node_ids, side="right") - 1
    roots, climbed = partial.offsets[owners], [node_ids]
    while (climbed[-1] != roots).any():
        climbed.append(roots + np.maximum(partial.parents[climbed[-1]], 0))
    nodes = np.stack(climbed, axis=1)
    return Paths(owners, (nodes != roots[:, None]).sum(axis=1), nodes)


def capped(budgets: Sequence[Budget], room: Sequence[int]) -> list[Budget]:
    """Budgets no deeper than there is room."""
    return [
        Budget(nodes, min(depth, left)) if left else Budget(0, 0) for (nodes, depth), left in zip(budgets, room, strict=True)
    ]
