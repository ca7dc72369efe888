"""Grows trees of a fixed shape. The shape is chosen before the draft law is known."""

from __future__ import annotations

from collections.abc import Sequence

from foredraft.core.errors import UserError
from foredraft.trees.base import Policy, Sapling
from foredraft.trees.budget import Costs, Path, best_paths
from foredraft.trees.options_fixed import Sequoia as Sequoia
from foredraft.trees.options_fixed import Static as Static

TYPICAL_ACCEPTANCE = tuple(0.55 * 0.45**rank for rank in range(10))
"""Acceptance by sibling rank that the default shape is optimal for. A small drafter reaches 0.55 for the first child, and each
further child is less than half as likely. `Sequoia` takes a measured vector, which gives better trees."""


def static(options: Static, tree: Sapling) -> Policy:
    """Grows the tree of `Static`."""
    if options.paths is None:
        return fill(tree, best_paths(TYPICAL_ACCEPTANCE, tree.budget))
    paths = sorted((tuple(path) for path in options.paths), key=lambda path: (len(path), path))
    return fill(tree, [path for path in paths if len(path) <= tree.budget.depth][: tree.budget.nodes])


def sequoia(options: Sequoia, tree: Sapling) -> Policy:
    """Grows the tree of `Sequoia`.

    Raises:
        ValueError: there is no acceptance vector.
    """
    vectors = options.vectors()
    if not vectors:
        raise UserError(
            "tree 'sequoia' needs a measured acceptance vector by sibling rank",
            "give it as the config key 'acceptance' (such as [0.6, 0.15, 0.07]), or measure it with `foredraft calibrate`",
        )
    seconds = options.seconds()
    vector = vectors.get("sampled" if tree.sampled else "greedy") or next(iter(vectors.values()))
    return fill(tree, best_paths(vector, tree.budget, Costs(*seconds) if seconds else None))


def fill(tree: Sapling, paths: Sequence[Path]) -> Policy:
    """Grows the shape `paths`, one layer per pass. A node whose law has too few tokens gets fewer children."""
    at: dict[Path, int] = {(): 0}
    for depth in range(1, max(map(len, paths), default=0) + 1):
        wanted: dict[Path, int] = {}
        for path in paths:
            if len(path) == depth and path[:-1] in at:
                wanted[path[:-1]] = wanted.get(path[:-1], 0) + 1
        if not wanted:
            break
        nodes = [at[parent] for parent in wanted]
        laws = yield nodes
        picked = tree.pick(nodes, laws, max(wanted.values()))
        for (parent, count), node, children in zip(wanted.items(), nodes, picked, strict=True):
            for rank, (token, prob) in enumerate(children.pairs()[:count]):
                at[(*parent, rank)] = tree.add(node, token, prob, tree.way)
