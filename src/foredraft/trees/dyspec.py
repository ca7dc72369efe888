"""Grows DySpec's dynamic trees, which make the draws of highest value.

The value of *making* the i-th draw below node u is ``v(u) * (1 - S)``, where S is the draft mass of the earlier children of u.
The value of the resulting node is ``v(u) * p(token)``. The priority of a draw is the value of making it.

The priority does not depend on the token of the draw, and it never rises from a node to its descendants. So the N draws of
highest priority are those that the paper's heap pops one by one. This module draws the children of many nodes in one pass.
It is lossless because it decides whether to make a draw without looking at the token.

If nothing is sampled (temperature 0), the most likely children are known beforehand. The value of a draw is then
``v(u) * p(token)``, which gives the tree of largest draft mass.

Source: Xiong et al., DySpec (arXiv 2410.11744), Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.core.errors import UserError
from foredraft.trees.acceptance import Worth, as_drafted
from foredraft.trees.base import Policy, Sapling, Siblings
from foredraft.trees.options_dynamic import DySpec as DySpec
from foredraft.trees.options_dynamic import DySpecCalibrated as DySpecCalibrated
from foredraft.trees.options_dynamic import DySpecThreshold as DySpecThreshold

MOST_AT_ONCE = 8
"""Largest default number of nodes that one pass expands."""

Judge = Callable[[Float[np.ndarray, " k"], bool], Worth]
"""(draft probabilities of siblings in draw order, whether they are sampled) -> their values."""


def dyspec(options: DySpec, tree: Sapling) -> Policy:
    """Grows the tree of `DySpec`."""
    return greedy(tree, options.width, as_drafted)


def dyspec_calibrated(options: DySpecCalibrated, tree: Sapling) -> Policy:
    """Grows the tree of `DySpecCalibrated`.

    Raises:
        ValueError: no acceptance was measured for this kind of request.
    """
    kind = "sampled" if tree.sampled else "greedy"
    if kind not in options.tables:
        raise UserError(
            f"tree 'dyspec-calibrated' needs the measured acceptance of {kind} requests",
            "give it as the config key 'acceptance_by_prob', or measure it with `foredraft calibrate`",
        )
    return greedy(tree, options.width, options.tables[kind].worth)


def greedy(tree: Sapling, width: int | None, judge: Judge) -> Policy:
    """Grows the tree with the draws of highest priority. Each pass expands the `width` best frontier nodes; see `DySpec`."""
    size = tree.budget.nodes
    width = width or max(1, min(MOST_AT_ONCE, size // 2))
    expanded: set[int] = set()
    best: list[_Draw] = []
    while size:
        least = best[-1].priority if len(best) == size else 0.0
        frontier = [
            node
            for node in [0, *(draw.node for draw in best)]
            if node not in expanded and tree.depths[node] < tree.budget.depth and tree.values[node] >= least
        ]
        frontier = sorted(frontier, key=lambda node: -tree.values[node])[:width]
        if not frontier:
            break
        laws = yield frontier
        expanded.update(frontier)
        for node, siblings in zip(frontier, tree.pick(frontier, laws, size), strict=True):
            best += _make_draws(tree, node, siblings, judge, least)
        best = sorted(best)[:size]  # a dropped draw can never be among the best again
    tree.keep_only([0, *sorted((draw.node for draw in best), key=lambda node: (tree.depths[node], tree.ranks[node]))])


def dyspec_threshold(options: DySpecThreshold, tree: Sapling) -> Policy:
    """Grows the tree of `DySpecThreshold`."""
    size = tree.budget.nodes
    kept, layer = [0], [0]
    for _ in range(tree.budget.depth):
        left = size + 1 - len(kept)
        layer = [node for node in layer if tree.values[node] >= options.least(size)]
        if not left or not layer:
            break
        laws = yield layer
        made = []
        for node, siblings in zip(layer, tree.pick(layer, laws, left), strict=True):
            made += _make_draws(tree, node, siblings, as_drafted, options.least(size))
        layer = sorted((draw.node for draw in sorted(made)[:left]), key=lambda node: tree.ranks[node])
        kept += layer
    tree.keep_only(kept)


class _Draw(NamedTuple):
    """A finished draw. Draws sort by falling priority, then by depth and sibling ranks, but never by token or age."""

    loss: float
    depth: int
    ranks: tuple[int, ...]
    node: int

    @property
    def priority(self) -> float:
        """Value of making this draw."""
        return -self.loss


def _make_draws(tree: Sapling, node: int, siblings: Siblings, judge: Judge, least: float) -> list[_Draw]:
    """Makes the draws below `node` in draw order. Stops before the first whose priority is below `least`.

    Priorities are computed in float64: in float32 ``1 - S`` is not monotone, so nodes could lose their parents.
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
