"""What a token tree is worth under an acceptance model, and the best tree of N nodes under it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from foredraft.grow.budget import best_paths
from foredraft.protocols import Budget
from foredraft.theory.speedup import check_acceptance

Path = tuple[int, ...]
"""Sibling ranks from the root down to a node, which names it."""


def expected_tokens(paths: Sequence[Path], acceptance: Sequence[float]) -> float:
    """Tokens a step: 1 and, for every node, the product of the acceptances of the ranks on its path.

    Args:
        paths: the nodes below the root; a node's parent must be among them.
        acceptance: of a child by its sibling rank, given that its parent was accepted; 0 beyond the last.

    Source: Sequoia (arXiv 2402.12374), section 4.1, the positional acceptance assumption.

    Raises:
        ValueError: a node stands without its parent or its elder sibling, or an acceptance is outside 0 to 1.
    """
    rates = check_acceptance(acceptance)
    known = {(), *paths}
    for path in paths:
        elder = (*path[:-1], path[-1] - 1) if path[-1] else ()
        if path[:-1] not in known or elder not in known:
            raise ValueError(f"node {path} stands without its parent or its elder sibling")
    return 1.0 + sum(prod(rates[rank] if rank < len(rates) else 0.0 for rank in path) for path in set(paths))


def best_tree(acceptance: Sequence[float], nodes: int, depth: int | None = None) -> list[Path]:
    """The tree of at most `nodes` nodes below the root that is worth most, by Sequoia's dynamic programme.

    Source: Sequoia (arXiv 2402.12374), section 4.1.
    """
    return [tuple(path) for path in best_paths(tuple(check_acceptance(acceptance)), Budget(nodes, min(depth or nodes, nodes)))]


def best_by_search(acceptance: Sequence[float], nodes: int, depth: int) -> float:
    """The value of the best tree, by trying all of up to `nodes` nodes: the answer key, for a handful of nodes."""
    ranks = range(min(nodes, len(acceptance)))
    every = [path for length in range(1, depth + 1) for path in product(ranks, repeat=length)]

    def grow(tree: frozenset[Path], left: int) -> float:
        value = expected_tokens(sorted(tree), acceptance)
        if not left:
            return value
        return max([value] + [grow(tree | {path}, left - 1) for path in every if path not in tree and _fits(path, tree)])

    return grow(frozenset(), nodes)


def _fits(path: Path, tree: frozenset[Path]) -> bool:
    has_parent = len(path) == 1 or path[:-1] in tree
    return has_parent and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree)
