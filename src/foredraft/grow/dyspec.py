"""DySpec's dynamic trees: a draw is made where the draft distribution promises most.

Source: Xiong et al., DySpec (arXiv 2410.11744), Algorithms 1 and 2.

The value of *making* the i-th draw below node u is ``v(u) * (1 - S)``, S being the draft mass of u's earlier children; the
value of the node it gives is ``v(u) * p(token)``. The priority of a draw does not depend on the token it will give, and
priorities never rise along the tree, so the nodes of the N highest priorities are those that the paper's heap pops one by
one. Here the children of many nodes are drawn in one pass. Losslessness rests on deciding whether to draw without looking.
Where nothing is sampled (temperature 0) the likeliest children are known beforehand, and a draw is worth what it will give,
``v(u) * p(token)``: the tree of largest draft mass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nsmallest

from foredraft.grow.base import Options, Policy, Sapling


@dataclass(frozen=True, kw_only=True)
class DySpec(Options):
    """The greedy tree of Algorithm 1, exactly, in a few batched passes.

    Attributes:
        width: how many of the best frontier nodes are expanded a pass; 1 is the paper's sequential order. The tree is the
            same for every width. More nodes a pass cost fewer passes and some nodes evaluated in vain.
    """

    width: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")

    def policy(self, tree: Sapling) -> Policy:
        size = tree.budget.nodes
        draws = _Priorities(tree)
        expanded: set[int] = set()
        best: list[int] = []
        while size:
            least = draws.priority[best[-1]] if len(best) == size else 0.0
            frontier = [
                node
                for node in [0, *best]
                if node not in expanded and tree.depths[node] < tree.budget.depth and tree.values[node] >= least
            ]
            frontier = sorted(frontier, key=lambda node: -tree.values[node])[: self.width]
            if not frontier:
                break
            laws = yield frontier
            expanded.update(frontier)
            for node, picked in zip(frontier, tree.pick(frontier, laws, size), strict=True):
                draws.add_children(node, picked, least)
            best = draws.best(size)
        tree.keep_only([0, *sorted(best, key=lambda node: (tree.depths[node], tree.ranks[node]))])


@dataclass(frozen=True, kw_only=True)
class DySpecThreshold(Options):
    """The layer-wise variant of Algorithm 2: every draw whose value is not below a threshold, one pass a layer.

    The paper prints the test the other way round in both versions. If a layer would exceed the budget, the draws of lower
    value are left out before they are made.

    Attributes:
        threshold: least value of a draw that is made; None is 1 / budget.
    """

    threshold: float | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1 (or None), got {self.threshold}")

    def policy(self, tree: Sapling) -> Policy:
        size = tree.budget.nodes
        draws = _Priorities(tree)
        kept, layer = [0], [0]
        for _ in range(tree.budget.depth):
            left = size + 1 - len(kept)
            layer = [node for node in layer if tree.values[node] >= self.least(size)]
            if not left or not layer:
                break
            laws = yield layer
            made = []
            for node, picked in zip(layer, tree.pick(layer, laws, left), strict=True):
                made += draws.add_children(node, picked, self.least(size))
            layer = sorted(sorted(made, key=draws.rank)[:left], key=lambda node: tree.ranks[node])
            kept += layer
        tree.keep_only(kept)

    def least(self, size: int) -> float:
        """The threshold for a budget of `size` nodes."""
        return self.threshold if self.threshold is not None else 1 / max(size, 1)


@dataclass
class _Priorities:
    """The value of having made each draw, in float64 (in float32 ``1 - S`` is not monotone and would orphan nodes)."""

    tree: Sapling
    priority: dict[int, float] = field(default_factory=dict)

    def add_children(self, node: int, picked: Sequence[tuple[int, float]], least: float) -> list[int]:
        """Makes the draws below `node`, in draw order, up to the first whose priority is below `least`."""
        tree, spent, made = self.tree, 0.0, []
        ceiling = tree.values[node]
        for token, prob in picked:
            promise = max(0.0, 1 - spent) if tree.sampled else prob
            ceiling = min(ceiling, tree.values[node] * promise)
            if ceiling < least:
                break
            child = tree.add(node, token, prob, tree.way)
            self.priority[child] = ceiling
            tree.values[child] = min(tree.values[child], ceiling)
            spent += prob
            made.append(child)
        return made

    def rank(self, node: int) -> tuple[float, int, tuple[int, ...]]:
        """Sort key, best first. Ties go to the smaller depth and the smaller address, never by token or age."""
        return -self.priority[node], self.tree.depths[node], self.tree.ranks[node]

    def best(self, size: int) -> list[int]:
        """The `size` draws of highest priority, best first. The others can never come back, and are forgotten."""
        best = nsmallest(size, self.priority, key=self.rank)
        self.priority = {node: self.priority[node] for node in best}
        return best
