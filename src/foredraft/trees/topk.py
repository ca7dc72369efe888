"""Grows trees of the most likely tokens by the probability of whole paths: EAGLE-2 and OPT-Tree."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from foredraft.core.shape import Drawn
from foredraft.trees.base import Policy, Sapling, Siblings
from foredraft.trees.options_dynamic import Opt as Opt
from foredraft.trees.options_dynamic import TopK as TopK


def topk(options: TopK, tree: Sapling) -> Policy:
    """Grows the tree of `TopK`."""
    k = min(options.topk, tree.budget.nodes)
    layer = [0]
    for _ in range(min(options.draft_depth, tree.budget.depth) if k else 0):
        laws = yield layer
        layer = best_nodes(tree, add_layer(tree, layer, tree.pick(layer, laws, k), tree.budget.nodes), k)
    keep_best(tree)


def opt(options: Opt, tree: Sapling) -> Policy:
    """Grows the tree of `Opt`."""
    size, expected, layer = tree.budget.nodes, 0.0, [0]
    for _ in range(tree.budget.depth if size else 0):
        laws = yield layer
        layer = add_layer(tree, layer, tree.pick(layer, laws, size), size)
        before, expected = expected, sum(tree.values[node] for node in best_nodes(tree, range(1, len(tree.tokens)), size))
        if expected - before <= options.delta:
            break
    keep_best(tree)


def add_layer(tree: Sapling, layer: Sequence[int], picked: Sequence[Siblings], most: int) -> list[int]:
    """Adds the `most` best of the picked children of `layer` and returns them in tree order. Ties go to the earlier child.

    The other children are not made, because they cannot be among the `most` best nodes of the tree.
    """
    offered = [
        (-tree.values[node] * prob, place, rank, node, token, prob)
        for place, (node, children) in enumerate(zip(layer, picked, strict=True))
        for rank, (token, prob) in enumerate(children.pairs())
    ]
    best = sorted(nsmallest(most, offered), key=lambda offer: offer[1:3])
    return [tree.add(node, token, prob, Drawn.DETERMINISTIC) for _, _, _, node, token, prob in best]


def best_nodes(tree: Sapling, nodes: Sequence[int] | range, size: int) -> list[int]:
    """Returns the `size` nodes of highest path probability, in tree order. Ties go to the older node, so to the parent."""
    return sorted(sorted(nodes, key=lambda node: (-tree.values[node], node))[:size])


def keep_best(tree: Sapling) -> None:
    """Keeps the best nodes within the budget. They are connected, because no child is more likely than its parent."""
    tree.keep_only([0, *best_nodes(tree, range(1, len(tree.tokens)), tree.budget.nodes)])
