"""Trees: what is derived from parent pointers, against brute force; the packed form and its views."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from tree_shapes import bfs_order, dfs_order, heavy_path_order

from foredraft.core.tree import DraftTree, Drawn, TreeBatch, ancestor_mask, depths_of

ORDERS = [dfs_order, bfs_order, heavy_path_order]

ONE = [-1]
CHAIN = [-1, 0, 1, 2]
STAR = [-1, 0, 0, 0]
#          0
#       /  |  \
#      1   2   4
#      |  / \
#      3 5   6
#        |
#        7
BUSHY = [-1, 0, 0, 1, 0, 2, 2, 5]


def random_parents(nodes: int, seed: int) -> list[int]:
    rng = np.random.default_rng([nodes, seed])
    return [-1, *(int(rng.integers(0, i)) for i in range(1, nodes))]


SHAPES = [ONE, [-1, 0], CHAIN, STAR, BUSHY, *(random_parents(nodes, seed) for nodes in (3, 8, 40) for seed in range(3))]


def tree_of(parents: list[int]) -> DraftTree:
    return TreeBatch.chains([[10 + i for i in range(len(parents))]], [parents])[0]


def ancestors(parents: list[int], node: int) -> set[int]:
    """The node, its parent, and so on up to the root."""
    found = set()
    while node >= 0:
        found.add(node)
        node = parents[node]
    return found


@pytest.mark.parametrize("parents", SHAPES)
def test_everything_derived_against_brute_force(parents: list[int]) -> None:
    tree = tree_of(parents)
    mask = ancestor_mask(tree.parents)
    for node in range(len(parents)):
        above = ancestors(parents, node)
        assert set(np.flatnonzero(mask[node])) == above
        assert tree.depths[node] == len(above) - 1
        assert tree.path_to(node) == sorted(above - {0})
        assert tree.children[node] == [child for child, parent in enumerate(parents) if parent == node]
    assert tree.num_nodes == len(parents) == mask.shape[0] == mask.shape[1]
    np.testing.assert_array_equal(depths_of(tree.parents), tree.depths)


def test_a_tree_by_hand() -> None:
    tree = tree_of(BUSHY)
    assert tree.depths.tolist() == [0, 1, 1, 2, 1, 2, 2, 3]
    assert tree.children == [[1, 2, 4], [3], [5, 6], [], [], [7], [], []]
    assert tree.ranks == [(), (0,), (1,), (0, 0), (2,), (1, 0), (1, 1), (1, 0, 0)]
    assert tree.path_to(7) == [2, 5, 7] and tree.path_to(0) == []
    assert dfs_order(tree) == [0, 1, 3, 2, 5, 7, 6, 4]
    assert bfs_order(tree) == [0, 1, 2, 4, 3, 5, 6, 7]
    assert heavy_path_order(tree) == [0, 2, 5, 7, 6, 1, 3, 4]


@pytest.mark.parametrize("parents", SHAPES)
def test_ranks_lead_from_the_root_to_the_node(parents: list[int]) -> None:
    tree = tree_of(parents)
    for node, ranks in enumerate(tree.ranks):
        at = 0
        for rank in ranks:
            at = tree.children[at][rank]
        assert at == node


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parents", SHAPES)
def test_an_order_is_a_permutation_with_parents_first(order, parents: list[int]) -> None:
    nodes = order(tree_of(parents))
    assert sorted(nodes) == list(range(len(parents)))
    place = {node: i for i, node in enumerate(nodes)}
    assert all(place[parents[node]] < place[node] for node in nodes[1:])


@pytest.mark.parametrize("order", [dfs_order, heavy_path_order])
@pytest.mark.parametrize("parents", SHAPES)
def test_depth_first_orders_keep_subtrees_together(order, parents: list[int]) -> None:
    nodes = order(tree_of(parents))
    for top in range(len(parents)):
        places = [i for i, node in enumerate(nodes) if top in ancestors(parents, node)]
        assert places == list(range(places[0], places[0] + len(places)))


@pytest.mark.parametrize("parents", SHAPES)
def test_what_each_order_puts_first(parents: list[int]) -> None:
    """Siblings: draw order depth first and level by level, subtrees of falling size on the heavy path."""
    tree = tree_of(parents)
    sizes = ancestor_mask(tree.parents).sum(0)
    assert all(a <= b for a, b in pairwise(tree.depths[bfs_order(tree)]))
    dfs, heavy = dfs_order(tree), heavy_path_order(tree)
    for siblings in tree.children:
        assert sorted(siblings, key=dfs.index) == siblings
        assert sorted(siblings, key=heavy.index) == sorted(siblings, key=lambda node: (-sizes[node], node))


def test_a_long_chain_needs_no_recursion() -> None:
    parents = list(range(-1, 4999))
    tree = tree_of(parents)
    assert tree.depths[-1] == 4999 and tree.path_to(4999) == list(range(1, 5000))
    assert all(order(tree) == list(range(5000)) for order in ORDERS)


def test_chains_are_the_default_shape() -> None:
    batch = TreeBatch.chains([[7], [5, 6, 5], []])
    assert [list(batch[b].tokens) for b in range(3)] == [[7], [5, 6, 5], []]
    assert [list(batch[b].parents) for b in range(3)] == [[-1], [-1, 0, 1], []]
    assert batch.offsets.tolist() == [0, 1, 4, 4] and len(batch) == 3
    assert set(batch.drawn) == {Drawn.DETERMINISTIC} and set(batch.draft_row) == {-1}
    assert len(TreeBatch.chains([])) == 0


def sampled_batch(vocab_size: int = 3) -> TreeBatch:
    """Two trees with one common table of laws: a star with two equal siblings, and a chain."""
    return TreeBatch(
        tokens=np.array([0, 0, 0, 0, 0]),
        parents=np.array([-1, 0, 0, -1, 0]),
        drawn=np.array([Drawn.IID, 0, 0, Drawn.WITHOUT_REPLACEMENT, 0]),
        draft_row=np.array([1, -1, -1, 0, -1]),
        offsets=np.array([0, 3, 5]),
        draft_probs=torch.eye(2, vocab_size),
    )


@pytest.mark.parametrize("vocab_size", [1, 3])
def test_views_find_their_laws(vocab_size: int) -> None:
    batch = sampled_batch(vocab_size)
    first, second = batch[0], batch[1]
    assert first.children == [[1, 2], [], []] and second.children == [[1], []]
    assert first.drawn[0] == Drawn.IID and second.drawn[0] == Drawn.WITHOUT_REPLACEMENT
    assert torch.equal(first.law(0), batch.draft_probs[1]) and torch.equal(second.law(0), batch.draft_probs[0])
    assert [tree.law(node) for tree in (first, second) for node in range(1, tree.num_nodes)] == [None] * 3


def test_a_batch_is_a_sequence_of_trees() -> None:
    batch = sampled_batch()
    assert [tree.num_nodes for tree in batch] == [3, 2]
    assert [batch[b].num_nodes for b in (-2, -1)] == [3, 2]
    for b in (-3, 2):
        with pytest.raises(IndexError):
            batch[b]


def test_a_view_shares_memory_and_cannot_be_rebound() -> None:
    batch = sampled_batch()
    assert np.shares_memory(batch[1].tokens, batch.tokens) and batch[1].draft_probs is batch.draft_probs
    for frozen in (batch, batch[0]):
        with pytest.raises(AttributeError):
            frozen.tokens = np.array([1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parents", np.array([-1, 0])),
        ("draft_row", np.array([-1])),
        ("drawn", np.array([0.0, 0.0, 0.0])),
        ("tokens", [1, 2, 3]),
        ("draft_probs", torch.zeros(3)),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, value) -> None:
    """By the shapes in the signatures, which are checked under pytest."""
    tree = tree_of(STAR[:3])
    parts = {part: getattr(tree, part) for part in ("tokens", "parents", "drawn", "draft_row", "draft_probs")}
    assert DraftTree(**parts).num_nodes == 3
    with pytest.raises(TypeCheckError):
        DraftTree(**parts | {name: value})


def test_missing_parents_are_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        TreeBatch.chains([[1, 2, 3]], [[-1, 0]])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_roots_are_chains_of_one_node(count: int) -> None:
    roots, chains = TreeBatch.roots(range(7, 7 + count)), TreeBatch.chains([[7 + i] for i in range(count)])
    for name in ("tokens", "parents", "drawn", "draft_row", "offsets"):
        assert np.array_equal(getattr(roots, name), getattr(chains, name)), name
        assert getattr(roots, name).dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        TreeBatch.roots([1]).parents[0] = 0  # shared by all batches of this size
