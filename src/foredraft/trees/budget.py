"""Finds the best tree shape for an acceptance vector, and its size and depth from measured costs.

The value of a tree is a sum over its nodes. Each node contributes the product of P[rank] on its path from the root, where P[k]
is the probability that the (k + 1)-th child is the accepted one.

Source: Chen et al., Sequoia (arXiv 2402.12374), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view

from foredraft.core.contracts import Budget

Path = tuple[int, ...]


class Costs(NamedTuple):
    """Measured costs in seconds.

    Attributes:
        draft: seconds of one pass of the drafter.
        verify: (number of nodes, seconds of one pass of the target) in ascending order of nodes.
    """

    draft: float
    verify: tuple[tuple[int, float], ...]

    def step(self, nodes: int, depth: int) -> float:
        """Returns the seconds of a step that verifies `nodes` tokens, root included, after `depth` draft passes."""
        sizes, seconds = zip(*self.verify, strict=True)
        return depth * self.draft + float(np.interp(nodes, sizes, seconds))


@lru_cache(maxsize=64)
def tree_values(acceptance: tuple[float, ...], budget: Budget) -> Float[np.ndarray, "l b m"]:
    """Returns T[l, b, m], the best value of a tree with m nodes (root included), depth at most l and b children of the root.

    ``T[l, b, m] = max_y T[l, b - 1, y] + P[b - 1] * max_b' T[l - 1, b', m - y]``; minus infinity if no such tree exists.
    Source: Sequoia, section 4.1.1.
    """
    size = budget.nodes + 1
    ranks = min(len(acceptance), budget.nodes)
    table = np.full((budget.depth + 1, ranks + 1, size + 1), -np.inf)
    table[:, 0, 1] = 1.0
    for depth in range(1, budget.depth + 1):
        below = table[depth - 1].max(axis=0)
        for b in range(1, ranks + 1):
            gain = np.concatenate([np.full(size, -np.inf), _scaled(below, acceptance[b - 1])])
            shifted = sliding_window_view(gain[::-1], size + 1)[::-1]  # [m, y]: gain of m - y nodes
            table[depth, b] = (table[depth, b - 1] + shifted).max(axis=1)
    return table


def best_paths(acceptance: Sequence[float], budget: Budget, costs: Costs | None = None) -> list[Path]:
    """Returns the most valuable tree within `budget` as paths of sibling ranks, parents first.

    Without `costs` the tree has the largest allowed size. With `costs` it has the size and depth of the highest value per
    second.
    """
    return _best_paths(tuple(float(p) for p in acceptance), budget, costs)


@lru_cache(maxsize=256)
def _best_paths(vector: tuple[float, ...], budget: Budget, costs: Costs | None) -> list[Path]:
    if budget.nodes < 1 or budget.depth < 1:
        return []
    deep = min(
        budget.nodes, 1 << (budget.depth - 1).bit_length()
    )  # rounded up, so that the shallower steps at the end of an output share a cached table
    table = tree_values(vector, Budget(budget.nodes, deep))[: budget.depth + 1]
    value = table.max(axis=1)  # [depth, size]
    depth, size = budget.depth, int(np.isfinite(value[budget.depth]).nonzero()[0].max())
    if costs is not None:
        rates = {
            (level, m): value[level, m] / costs.step(m, level)
            for level in range(budget.depth + 1)
            for m in range(1, size + 1)
            if np.isfinite(value[level, m])
        }
        depth, size = max(rates, key=lambda choice: rates[choice])
    return sorted(_unfold(table, vector, depth, size), key=lambda path: (len(path), path))


def _scaled(values: Float[np.ndarray, " m"], prob: float) -> Float[np.ndarray, " m"]:
    """Multiplies by `prob` and keeps minus infinity. A rank with probability 0 may still have children."""
    return np.multiply(values, prob, out=np.full_like(values, -np.inf), where=np.isfinite(values))


def _unfold(table: Float[np.ndarray, "l b m"], acceptance: tuple[float, ...], depth: int, size: int) -> list[Path]:
    """Returns the tree of the best value in `table`. It splits off the children of the root from the last to the first."""
    paths: list[Path] = []
    b = int(table[depth, :, size].argmax())
    while b > 0:
        below = table[depth - 1].max(axis=0)
        sums = table[depth, b - 1, 1:size] + _scaled(below, acceptance[b - 1])[size - 1 : 0 : -1]
        rest = int(sums.argmax()) + 1
        paths.append((b - 1,))
        paths += [(b - 1, *path) for path in _unfold(table, acceptance, depth - 1, size - rest)]
        size, b = rest, b - 1
    return paths
