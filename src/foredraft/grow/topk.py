"""Trees of the most likely tokens, expanded by the confidence of whole paths: EAGLE-2 and OPT-Tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import ClassVar

from foredraft.grow.base import Options, Policy, Sapling, Siblings
from foredraft.tree import Drawn


@dataclass(frozen=True, kw_only=True)
class TopK(Options):
    """EAGLE-2's dynamic tree: the k best nodes of a layer are expanded into their k likeliest children; the nodes of the
    highest path probability over all layers are kept.

    Attributes:
        topk: k.
        draft_depth: layers; 6 is the depth of EAGLE-2's released code (5 expansions after the first).

    Source: Li et al., EAGLE-2 (arXiv 2406.16858), section 4.
    """

    topk: int = 10
    draft_depth: int = 6

    can_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk < 1 or self.draft_depth < 1:
            raise ValueError(f"topk and draft_depth must be at least 1, got {self.topk}, {self.draft_depth}")

    def policy(self, tree: Sapling) -> Policy:
        k = min(self.topk, tree.budget.nodes)
        layer = [0]
        for _ in range(min(self.draft_depth, tree.budget.depth) if k else 0):
            laws = yield layer
            layer = best_nodes(tree, add_layer(tree, layer, tree.pick(layer, laws, k), tree.budget.nodes), k)
        keep_best(tree)


@dataclass(frozen=True, kw_only=True)
class Opt(Options):
    """OPT-Tree: layers are added while the expected acceptance of the best tree of n nodes still grows by more than `delta`.

    Attributes:
        delta: least gain in expected accepted tokens that pays for one more draft pass: between the cost of a draft pass in
            target passes and 1.

    Source: Wang et al., OPT-Tree (arXiv 2406.17276), Algorithm 1.
    """

    delta: float | int = 0.2

    can_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")

    def policy(self, tree: Sapling) -> Policy:
        size, expected, layer = tree.budget.nodes, 0.0, [0]
        for _ in range(tree.budget.depth if size else 0):
            laws = yield layer
            layer = add_layer(tree, layer, tree.pick(layer, laws, size), size)
            before, expected = expected, sum(tree.values[node] for node in best_nodes(tree, range(1, len(tree.tokens)), size))
            if expected - before <= self.delta:
                break
        keep_best(tree)


def add_layer(tree: Sapling, layer: Sequence[int], picked: Sequence[Siblings], most: int) -> list[int]:
    """Adds the `most` best of the picked children of `layer`, of equal ones the first; returns them in tree order. Worse ones
    cannot be among the best `most` nodes of the tree, so they are never made."""
    offered = [
        (-tree.values[node] * prob, place, rank, node, token, prob)
        for place, (node, children) in enumerate(zip(layer, picked, strict=True))
        for rank, (token, prob) in enumerate(children.pairs())
    ]
    best = sorted(nsmallest(most, offered), key=lambda one: one[1:3])
    return [tree.add(node, token, prob, Drawn.DETERMINISTIC) for _, _, _, node, token, prob in best]


def best_nodes(tree: Sapling, nodes: Sequence[int] | range, size: int) -> list[int]:
    """The `size` nodes of highest path probability, in tree order. Of equal ones the older, so that parents come first."""
    return sorted(sorted(nodes, key=lambda node: (-tree.values[node], node))[:size])


def keep_best(tree: Sapling) -> None:
    """Keeps the budget's number of best nodes: connected, because no child is more likely than its parent."""
    tree.keep_only([0, *best_nodes(tree, range(1, len(tree.tokens)), tree.budget.nodes)])
