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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.grow.acceptance import AcceptanceTable, Worth, as_drafted
from foredraft.grow.base import Options, Policy, Sapling, Siblings

MOST_AT_ONCE = 8
"""Nodes expanded in a pass, unless it is said."""

Judge = Callable[[Float[np.ndarray, " k"], bool], Worth]
"""(draft probabilities of siblings in draw order, whether they were drawn) -> what they are worth."""


@dataclass(frozen=True, kw_only=True)
class DySpec(Options):
    """The greedy tree of Algorithm 1, exactly, in a few batched passes.

    Attributes:
        width: how many of the best frontier nodes are expanded a pass; 1 is the paper's sequential order. The tree is the
            same for every width. More nodes a pass cost fewer passes and some nodes evaluated in vain. None is half of the
            budget, at most 8.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)

    def policy(self, tree: Sapling) -> Policy:
        return greedy(tree, self.width, as_drafted)


@dataclass(frozen=True, kw_only=True)
class DySpecCalibrated(Options):
    """The greedy tree by measured acceptance: a draw is made where acceptance, not draft probability, promises most.

    DySpec takes the draft probability of a child for the chance that it is accepted. At temperature 1 a first child is accepted
    far more often than that, and a second one tested far less often (`docs/dyspec.md`), so its trees are too flat.

    Attributes:
        acceptance_by_prob: `sampled` and `greedy`, each as `foredraft calibrate` writes it; see `AcceptanceTable`.
        width: as in `DySpec`.
    """

    acceptance_by_prob: Mapping[str, Any] | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)
        _ = self.tables  # says now what is wrong with them

    @cached_property
    def tables(self) -> dict[str, AcceptanceTable]:
        """By kind of request."""
        return {kind: AcceptanceTable.read(given) for kind, given in (self.acceptance_by_prob or {}).items()}

    def policy(self, tree: Sapling) -> Policy:
        kind = "sampled" if tree.sampled else "greedy"
        if kind not in self.tables:
            raise ValueError(
                f"tree 'dyspec-calibrated' needs the measured acceptance of {kind} requests: give it as the config key "
                "'acceptance_by_prob', or measure it with `foredraft calibrate`"
            )
        return greedy(tree, self.width, self.tables[kind].worth)


def greedy(tree: Sapling, width: int | None, judge: Judge) -> Policy:
    """Grows the tree of the draws of highest priority, `width` of the best frontier nodes a pass; see `DySpec`."""
    size = tree.budget.nodes
    width = width or max(1, min(MOST_AT_ONCE, size // 2))
    expanded: set[int] = set()
    best: list[_Draw] = []
    while size:
        least = best[-1].priority if len(best) == size else 0.0
        frontier = [
            node
            for node in [0, *(one.node for one in best)]
            if node not in expanded and tree.depths[node] < tree.budget.depth and tree.values[node] >= least
        ]
        frontier = sorted(frontier, key=lambda node: -tree.values[node])[:width]
        if not frontier:
            break
        laws = yield frontier
        expanded.update(frontier)
        for node, siblings in zip(frontier, tree.pick(frontier, laws, size), strict=True):
            best += _make_draws(tree, node, siblings, judge, least)
        best = sorted(best)[:size]  # the others can never come back
    tree.keep_only([0, *sorted((one.node for one in best), key=lambda node: (tree.depths[node], tree.ranks[node]))])


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
        kept, layer = [0], [0]
        for _ in range(tree.budget.depth):
            left = size + 1 - len(kept)
            layer = [node for node in layer if tree.values[node] >= self.least(size)]
            if not left or not layer:
                break
            laws = yield layer
            made = []
            for node, siblings in zip(layer, tree.pick(layer, laws, left), strict=True):
                made += _make_draws(tree, node, siblings, as_drafted, self.least(size))
            layer = sorted((one.node for one in sorted(made)[:left]), key=lambda node: tree.ranks[node])
            kept += layer
        tree.keep_only(kept)

    def least(self, size: int) -> float:
        """The threshold for a budget of `size` nodes."""
        return self.threshold if self.threshold is not None else 1 / max(size, 1)


def _check_width(width: int | None) -> None:
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 (or None), got {width}")


class _Draw(NamedTuple):
    """A draw that was made. Sorts best first; ties go to the smaller depth and the smaller address, never by token or age."""

    loss: float
    depth: int
    ranks: tuple[int, ...]
    node: int

    @property
    def priority(self) -> float:
        """The value of having made it."""
        return -self.loss


def _make_draws(tree: Sapling, node: int, siblings: Siblings, judge: Judge, least: float) -> list[_Draw]:
    """Makes the draws below `node`, in draw order, up to the first whose priority is below `least`.

    Priorities are computed in float64: in float32 ``1 - S`` is not monotone and would orphan nodes.
    """
    promises, values = judge(siblings.probs, tree.sampled)
    made, promised = [], 1.0
    for token, promise, value in zip(siblings.tokens.tolist(), promises.tolist(), values.tolist(), strict=True):
        promised = min(promised, promise)
        priority = promised * tree.values[node]
        if priority < least:
            break
        child = tree.add(node, token, value, tree.way)
        tree.values[child] = min(tree.values[child], priority)
        made.append(_Draw(-priority, tree.depths[child], tree.ranks[child], child))
    return made
