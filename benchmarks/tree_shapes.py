"""Token trees for measurements (random recursive trees, DySpec's trees and chains), and orders of their nodes.

Source: DySpec (arXiv 2410.11744), appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from measuring import read_prompts

from foredraft import LLM
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.folders import BUNDLED_LM
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.drafters.lm import LMDrafter
from foredraft.models.loading import load_target
from foredraft.trees.base import Policy, Sapling
from foredraft.trees.dyspec import DySpec


def bfs_order(tree: DraftTree) -> list[int]:
    """Returns the nodes level by level."""
    return sorted(range(tree.num_nodes), key=lambda node: (int(tree.depths[node]), node))


def dfs_order(tree: DraftTree) -> list[int]:
    """Returns the nodes depth first, with siblings in draw order (DySpec, appendix C)."""
    return _depth_first(tree.children)


def heavy_path_order(tree: DraftTree) -> list[int]:
    """Returns the nodes depth first, siblings with larger subtrees first (heavy-path decomposition; DySpec, appendix C)."""
    size = [1] * tree.num_nodes
    for node in range(tree.num_nodes - 1, 0, -1):
        size[tree.parents[node]] += size[node]
    return _depth_first([sorted(siblings, key=lambda node: -size[node]) for siblings in tree.children])


def _depth_first(children: list[list[int]]) -> list[int]:
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node]))
    return order


ORDERS: dict[str, Callable[[DraftTree], Sequence[int]]] = {
    "insertion": lambda tree: range(tree.num_nodes),
    "breadth first": bfs_order,
    "depth first": dfs_order,
    "heavy path": heavy_path_order,
}


def tree_of(parents: Sequence[int]) -> DraftTree:
    """Makes a tree of a shape. Its tokens have no meaning."""
    return TreeBatch.chains([[0] * len(parents)], [parents])[0]


def random_tree(nodes: int, seed: int) -> DraftTree:
    """Draws a uniform random recursive tree."""
    rng = np.random.default_rng(seed)
    return tree_of([-1, *(int(rng.integers(node)) for node in range(1, nodes))])


def reordered(tree: DraftTree, order: Sequence[int]) -> DraftTree:
    """Returns the tree with its nodes in another order, in which parents come before children."""
    place = {node: i for i, node in enumerate(order)} | {-1: -1}
    return tree_of([place[int(tree.parents[node])] for node in order])


@dataclass(frozen=True, kw_only=True)
class HeapOrder(DySpec):
    """DySpec that records its trees, with their nodes in the order in which the paper's heap pops them."""

    trees: list[DraftTree] = field(default_factory=list)

    def policy(self, tree: Sapling) -> Policy:
        """Grows a tree as `DySpec` does, and records it."""
        yield from super().policy(tree)
        assert tree.kept is not None
        priority, left = {0: 2.0}, dict(enumerate(tree.values))
        for node in range(1, len(tree.tokens)):  # the priority of a draw is the mass that its earlier siblings left
            parent = tree.parents[node]
            priority[node] = min(priority[parent], left[parent])
            left[parent] -= tree.values[node]
        order = sorted(tree.kept, key=lambda node: (-priority[node], node))
        place = {node: i for i, node in enumerate(order)} | {-1: -1}
        self.trees.append(tree_of([place[tree.parents[node]] for node in order]))


def grown_trees(nodes: int, count: int) -> list[DraftTree]:
    """Grows DySpec's trees after training prompts, with the bundled drafter.

    A tree is smaller than `nodes` if the draft distribution has too little mass.
    """
    grower, plain = HeapOrder(), LLM(None, {"method": "ar"})
    model = load_target(BUNDLED_LM)
    drafter = LMDrafter(model, grower, model.vocab_size)
    for number, prompt in enumerate(read_prompts(plain, count)):
        state = drafter.start(prompt, None)
        sampling = SamplingParams(temperature=0.6)
        drafter.propose(Work([state], [prompt[-1]], [Budget(nodes - 1, 64)], [sampling], [Draws(number)]))
        drafter.finish(state)
    return grower.trees


def all_trees(sizes: Sequence[int], count: int) -> Iterator[tuple[tuple[str, int], list[DraftTree]]]:
    """Yields `count` trees of each kind and size."""
    for nodes in sizes:
        yield ("random", nodes), [random_tree(nodes, seed) for seed in range(count)]
        yield ("dyspec", nodes), grown_trees(nodes, count)
        yield ("chain", nodes), [tree_of(range(-1, nodes - 1))] * count
