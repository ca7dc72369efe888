"""The expected tokens per step of a token tree under an acceptance model, and the best tree of N nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from foredraft.core.contracts import Budget
from foredraft.core.errors import UserError
from foredraft.theory.speedup import check_acceptance
from foredraft.trees.budget import best_paths

Path = tuple[int, ...]
"""A node, named by the sibling ranks on the path from the root to it."""


def expected_tokens(paths: Sequence[Path], acceptance: Sequence[float]) -> float:
    """Computes the tokens per step: 1, plus for every node the product of the acceptances on its path.

    Args:
        paths: the nodes below the root, with all parents and elder siblings.
        acceptance: probability that a child is accepted, by its sibling rank, given that its parent was accepted; 0 for
            higher ranks.

    Source: Sequoia (arXiv 2402.12374), section 4.1, the positional acceptance assumption.

    Raises:
        ValueError: a node's parent or elder sibling is missing, or an acceptance is outside 0 to 1.
    """
    rates = check_acceptance(acceptance)
    known = {(), *paths}
    for path in paths:
        elder = (*path[:-1], path[-1] - 1) if path[-1] else ()
        if path[:-1] not in known or elder not in known:
            raise UserError(f"node {path} is without its parent or its elder sibling")
    return 1.0 + sum(prod(rates[rank] if rank < len(rates) else 0.0 for rank in path) for path in set(paths))


def best_tree(acceptance: Sequence[float], nodes: int, depth: int | None = None) -> list[Path]:
    """Finds the tree with the most tokens per step among the trees of at most `nodes` nodes below the root.

    It uses Sequoia's dynamic programme.

    Source: Sequoia (arXiv 2402.12374), section 4.1.
    """
    return [tuple(path) for path in best_paths(tuple(check_acceptance(acceptance)), Budget(nodes, min(depth or nodes, nodes)))]


def best_by_search(acceptance: Sequence[float], nodes: int, depth: int) -> float:
    """Computes the tokens per step of the best tree, by trying all trees of up to `nodes` nodes.

    It is a reference for `best_tree`, for small numbers of nodes.
    """
    ranks = range(min(nodes, len(acceptance)))
    candidates = [path for length in range(1, depth + 1) for path in product(ranks, repeat=length)]

    def grow(tree: frozenset[Path], left: int) -> float:
        value = expected_tokens(sorted(tree), acceptance)
        if not left:
            return value
        return max([value] + [grow(tree | {path}, left - 1) for path in candidates if path not in tree and _fits(path, tree)])

    return grow(frozenset(), nodes)


def _fits(path: Path, tree: frozenset[Path]) -> bool:
    has_parent = len(path) == 1 or path[:-1] in tree
    return has_parent and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree)
