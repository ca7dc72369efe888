"""Grows chains: the tree of speculative sampling, of Algorithm 4 of Yin et al., and of SpecInfer."""

from __future__ import annotations

from foredraft.core.shape import Budget, Drawn
from foredraft.trees.base import Laws, Policy, Sapling
from foredraft.trees.options_fixed import Branching as Branching
from foredraft.trees.options_fixed import Chain as Chain


def chain(options: Chain, tree: Sapling) -> Policy:
    """Grows the tree of `Chain`."""
    node = 0
    for _ in range(min(tree.budget)):
        laws = yield [node]
        [node] = _draw(tree, node, laws, 1)


def branching(options: Branching, tree: Sapling) -> Policy:
    """Grows the tree of `Branching`."""
    left = tree.budget.nodes
    layer = {0: 1}  # node -> number of draws that reached it
    for num_draws in _expansion(options, tree.budget)[: tree.budget.depth]:
        layer = _cut_to(layer, num_draws, left)
        if not layer:
            break
        laws = yield list(layer)
        reached: dict[int, int] = {}
        for row, (node, count) in enumerate(layer.items()):
            children = _draw(tree, node, laws[row : row + 1], count * num_draws)
            left -= len(children)
            for child in children:
                first = child
                if options.merge:
                    first = next(other for other in children if tree.tokens[other] == tree.tokens[child])
                reached[first] = reached.get(first, 0) + 1
        layer = reached


def _expansion(options: Branching, budget: Budget) -> list[int]:
    """Returns the number of draws per node, by depth."""
    if options.expansion is not None:
        return list(options.expansion)
    chains = min(options.num_chains, max(budget.nodes, 1))
    return [chains] + [1] * ((options.draft_depth or budget.nodes // chains) - 1)


def _cut_to(layer: dict[int, int], num_draws: int, left: int) -> dict[int, int]:
    """Keeps the nodes of a layer, in order, whose draws fit into `left` nodes."""
    fitting = {}
    for node, count in layer.items():
        if count * num_draws <= left:
            fitting[node] = count
            left -= count * num_draws
    return fitting


def _draw(tree: Sapling, node: int, laws: Laws, k: int) -> list[int]:
    """Adds `k` independent draws below `node`, or its `k` most likely tokens if nothing is sampled. `laws` is its law only."""
    if tree.sampled:
        return tree.draw(node, laws, k)
    [picked] = tree.pick([node], laws, k)
    return [tree.add(node, token, prob, Drawn.DETERMINISTIC) for token, prob in picked.pairs()]
