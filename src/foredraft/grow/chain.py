"""Chains and independent chains: the trees of speculative sampling, of Algorithm 4 of Yin et al., and of SpecInfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foredraft.grow.base import Laws, Options, Policy, Sapling
from foredraft.protocols import Budget
from foredraft.tree import Drawn


@dataclass(frozen=True, kw_only=True)
class Chain(Options):
    """One drafted token after another, as deep as the budget allows.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    def policy(self, tree: Sapling) -> Policy:
        node = 0
        for _ in range(min(tree.budget)):
            laws = yield [node]
            [node] = _draw(tree, node, laws, 1)


@dataclass(frozen=True, kw_only=True)
class Branching(Options):
    """Independent draws with replacement.

    With ``merge=False``, `num_chains` disjoint chains below the root (Yin et al., Algorithm 4). With ``merge=True``,
    SpecInfer's tree: at depth d every draw that reached a node makes ``expansion[d]`` draws below it; a repeated sibling stays
    as a leaf, and what would grow below it hangs under the first of its kind.

    Attributes:
        num_chains: how many chains.
        draft_depth: their length; None is budget // num_chains.
        expansion: draws per node and depth, as ``[2, 2, 1]``; None is `num_chains` at the root and 1 below.
        merge: whether equal prefixes share nodes.
    """

    num_chains: int = 4
    draft_depth: int | None = None
    expansion: Sequence[int] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chains < 1 or (self.draft_depth is not None and self.draft_depth < 1):
            raise ValueError(f"num_chains and draft_depth must be at least 1, got {self.num_chains}, {self.draft_depth}")
        if self.expansion is not None and (not self.expansion or min(self.expansion) < 1):
            raise ValueError(f"expansion must list a number of draws, at least 1, for every depth; got {self.expansion}")

    def policy(self, tree: Sapling) -> Policy:
        left = tree.budget.nodes
        layer = {0: 1}  # node -> how many draws reached it
        for num_draws in self._expansion(tree.budget)[: tree.budget.depth]:
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
                    if self.merge:
                        first = next(one for one in children if tree.tokens[one] == tree.tokens[child])
                    reached[first] = reached.get(first, 0) + 1
            layer = reached

    def _expansion(self, budget: Budget) -> list[int]:
        if self.expansion is not None:
            return list(self.expansion)
        chains = min(self.num_chains, max(budget.nodes, 1))
        return [chains] + [1] * ((self.draft_depth or budget.nodes // chains) - 1)


def _cut_to(layer: dict[int, int], num_draws: int, left: int) -> dict[int, int]:
    """As many nodes of a layer, first come first served, as may all make their draws within `left` nodes."""
    fitting = {}
    for node, count in layer.items():
        if count * num_draws <= left:
            fitting[node] = count
            left -= count * num_draws
    return fitting


def _draw(tree: Sapling, node: int, laws: Laws, k: int) -> list[int]:
    """`k` independent draws below `node`; the k most likely tokens where nothing is sampled. `laws` is its law alone."""
    if tree.sampled:
        return tree.draw(node, laws, k)
    [picked] = tree.pick([node], laws, k)
    return [tree.add(node, token, prob, Drawn.DETERMINISTIC) for token, prob in picked.pairs()]
