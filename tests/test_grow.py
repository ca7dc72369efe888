"""Tree policies against references: the heap of DySpec, brute force, published figures."""

from __future__ import annotations

import heapq
import json
import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from tree_shapes import bfs_order, dfs_order, heavy_path_order

from exact import MEASURED, TableExpander, any_table, expected_tokens, tree_law
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch, ancestor_mask
from foredraft.models.table import Law, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS
from foredraft.trees.acceptance import PROB_EDGES, AcceptanceTable, Trial, as_drafted
from foredraft.trees.base import GREEDY_DRAFT_TEMPERATURE
from foredraft.trees.budget import Costs, best_paths, tree_values
from foredraft.trees.dyspec import DySpec, DySpecThreshold
from foredraft.trees.options import LARGE_CUT, LARGE_VOCABULARY
from foredraft.trees.topk import Opt

PREFIX = (0,)


def grow(grower: Any, law: Law, vocab_size: int, budget: Budget, seed: int = 0, temperature: float = 1.0) -> DraftTree:
    drafter = TableExpander(law, vocab_size, PREFIX)
    sampling = SamplingParams(temperature=temperature)
    return grower.grow(drafter, Work([None], [PREFIX[-1]], [budget], [sampling], [Draws(seed)]))[0]


def nodes_of(tree: DraftTree) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every node as (address, tokens on its path): what a tree is, whatever the order it was made in."""
    return {(tree.ranks[i], tuple(int(tree.tokens[j]) for j in tree.path_to(i))) for i in range(tree.num_nodes)}


def heap_tree(law: Law, vocab_size: int, budget: Budget, seed: int) -> tuple[set[Any], list[float]]:
    """Algorithm 1 of DySpec with its heap, one draw at a time; ties as in the package. Returns nodes and popped values."""
    draws, popped, nodes = Draws(seed), [], {((), ())}
    heap: list[Any] = [(-1.0, 1, (0,), ())]  # (-value of the draw, its depth, its address, tokens of its parent)
    orders: dict[Any, Any] = {}
    while heap and len(nodes) <= budget.nodes:
        value, depth, address, path = heapq.heappop(heap)
        if depth > budget.depth:
            continue
        parent, rank = address[:-1], address[-1]
        probs = torch.from_numpy(law((*PREFIX, *path)))
        if parent not in orders:
            above = nodes_value[parent] if parent else 1.0
            orders[parent] = (draws.order(probs, ("draft", parent, 0), vocab_size), above)
        order, above = orders[parent]
        if rank >= len(order):
            continue
        token = order[rank]
        popped.append(-value)
        nodes.add((address, (*path, token)))
        spent = float(sum(float(probs[t]) for t in order[:rank]))
        child = min(above * float(probs[token]), -value)
        nodes_value[address] = child
        following = min(-value, above * max(0.0, 1 - (spent + float(probs[token]))))
        if rank + 1 < len(order):
            heapq.heappush(heap, (-following, depth, (*parent, rank + 1), path))
        heapq.heappush(heap, (-child, depth + 1, (*address, 0), (*path, token)))
    return nodes, popped


nodes_value: dict[Any, float] = {}


def tied_law(vocab_size: int) -> Law:
    """Every row uniform over a power of two of tokens: all priorities are equal many times over."""
    row = np.zeros(vocab_size)
    row[: 1 << (vocab_size.bit_length() - 1)] = 1 / (1 << (vocab_size.bit_length() - 1))
    return lambda prefix: row


@pytest.mark.parametrize("width", [1, 3, 8, 16])
@pytest.mark.parametrize("nodes", [1, 5, 16, 64])
def test_dyspec_is_the_tree_of_the_heap(nodes: int, width: int) -> None:
    for seed in range(12):
        for vocab_size, law in (
            (3, random_law(3, seed)),
            (12, random_law(12, seed, zeros=0.3)),
            (4, tied_law(4)),
            (6, tied_law(6)),
        ):
            budget = Budget(nodes, 2 + seed % 5)
            tree = grow(DySpec(width=width), law, vocab_size, budget, seed)
            reference, popped = heap_tree(law, vocab_size, budget, seed)
            assert nodes_of(tree) == reference
            assert popped == sorted(popped, reverse=True)


@pytest.mark.parametrize("nodes", [8, 64])
def test_threshold_variant_at_the_last_popped_value_is_the_greedy_tree(nodes: int) -> None:
    for seed in range(10):
        law, budget = random_law(6, seed), Budget(nodes, 64)
        reference, popped = heap_tree(law, 6, budget, seed)
        tree = grow(DySpecThreshold(threshold=popped[-1] * (1 - 1e-9)), law, 6, budget, seed)
        assert nodes_of(tree) == reference


def test_dyspec_passes_do_not_grow_with_the_tree() -> None:
    """Passes of the drafter, where the heap makes one call a node. The figures stand in docs/dyspec.md."""
    law = random_law(64, 5, concentration=0.05)
    for nodes in (16, 64, 256):
        drafter = TableExpander(law, 64, PREFIX)
        DySpec(width=16).grow(drafter, Work([None], [0], [Budget(nodes, 64)], [SamplingParams()], [Draws(1)]))
        assert drafter.num_passes <= 6 + nodes / 8
        assert drafter.num_evaluated <= nodes + 1


@pytest.mark.parametrize("tree_counts", [[3, 7, 15], pytest.param([3, 7, 15, 34], marks=pytest.mark.slow)])
def test_tree_counts_and_expected_tokens_of_algorithm_1(tree_counts: list[int]) -> None:
    """Law 3 over 3 tokens, depth 3: 3, 7, 15 and 34 trees of 1 to 4 nodes, each size accepting more."""
    draft, target = random_law(3, 3), random_law(3, 1003)
    counts, expected = [], []
    for nodes in range(1, len(tree_counts) + 1):
        trees = tree_law(DySpec(), draft, 3, Budget(nodes, 3), 1.0, PREFIX)
        counts.append(len(trees))
        expected.append(expected_tokens(trees, RULES["multiround"].rule, target, 1.0, PREFIX))
    assert counts == tree_counts
    assert all(after > before + 1e-6 for before, after in pairwise(expected))


@pytest.mark.parametrize(
    ("nodes", "insertion", "dfs", "bfs", "heavy"),
    [
        (256, 35.8, 22.8, 35.6, 21.4),
        (512, 133.6, 53.4, 114.4, 50.2),
        (1024, 485.0, 116.6, 347.4, 111.2),
        (2048, 1647.4, 270.6, 1084, 237.8),
    ],
)
def test_block_counts_of_table_5(nodes: int, insertion: float, dfs: float, bfs: float, heavy: float) -> None:
    """Non-empty 32 x 32 blocks of the mask of random recursive trees (DySpec, Table 5); means of 5, within 10 %."""
    rng = np.random.default_rng(nodes)
    counts = []
    for _ in range(5):
        parents = [-1, *(int(rng.integers(0, i)) for i in range(1, nodes))]
        tree = TreeBatch.chains([[0] * nodes], [parents])[0]
        mask = ancestor_mask(tree.parents)
        orders = [list(range(nodes)), dfs_order(tree), bfs_order(tree), heavy_path_order(tree)]
        counts.append([blocks(mask[np.ix_(order, order)]) for order in orders])
    assert np.mean(counts, axis=0) == pytest.approx([insertion, dfs, bfs, heavy], rel=0.1)


def blocks(mask: np.ndarray, size: int = 32) -> int:
    return int(mask.reshape(len(mask) // size, size, -1, size).any(axis=(1, 3)).sum())


def path_probs(law: Law, vocab_size: int, depth: int) -> dict[tuple[int, ...], float]:
    """Probability of every path up to `depth`."""
    probs, layer = {}, {(): 1.0}
    for _ in range(depth):
        layer = {(*path, t): p * float(law((*PREFIX, *path))[t]) for path, p in layer.items() for t in range(vocab_size)}
        probs |= layer
    return probs


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_opt_is_the_best_subtree(nodes: int) -> None:
    """Brute force over every connected set of n nodes (OPT-Tree, Theorem 3.1)."""
    for seed in range(5):
        law = random_law(3, seed)
        probs = path_probs(law, 3, 3)
        best = max(
            sum(probs[path] for path in chosen)
            for chosen in combinations(probs, nodes)
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
        )
        tree = grow(Opt(delta=0.0, draft_temperature=1.0), law, 3, Budget(nodes, 3))
        total = sum(probs[tuple(int(tree.tokens[j]) for j in tree.path_to(i))] for i in range(1, tree.num_nodes))
        assert total == pytest.approx(best, abs=1e-12)


SEQUOIA = (0.6, 0.2, 0.1, 0.05)


@pytest.mark.parametrize(("nodes", "value"), [(2, 1.6), (4, 2.176), (8, 2.7456), (16, 3.30936), (32, 3.86849)])
def test_sequoia_values(nodes: int, value: float) -> None:
    """The published numbers of the programme; without a depth limit it equals greedy expansion by path product."""
    budget = Budget(nodes - 1, nodes - 1)
    assert tree_values(SEQUOIA, budget)[nodes - 1, :, nodes].max() == pytest.approx(value, abs=6e-6)
    paths = best_paths(SEQUOIA, budget)
    assert 1 + sum(np.prod([SEQUOIA[rank] for rank in path]) for path in paths) == pytest.approx(value, abs=6e-6)
    assert len(set(paths)) == nodes - 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sequoia_obeys_the_depth_limit(depth: int) -> None:
    vector = (0.7, 0.4, 0.3)
    paths = best_paths(vector, Budget(9, depth))
    assert max(map(len, paths)) == depth
    weights: dict[Any, float] = {}
    layer = {(): 1.0}
    for _ in range(depth):
        layer = {(*path, rank): p * vector[rank] for path, p in layer.items() for rank in range(3)}
        weights |= layer
    assert sum(weights[path] for path in paths) == pytest.approx(sum(sorted(weights.values())[-9:]))


def test_sequoia_with_costs_stops_where_it_no_longer_pays() -> None:
    flat = Costs(draft=0.0, verify=((1, 1.0), (64, 1.0)))
    steep = Costs(draft=0.0, verify=((1, 1.0), (2, 1.01), (3, 3.0), (64, 64.0)))
    deep = Costs(draft=5.0, verify=((1, 1.0), (64, 1.0)))
    assert len(best_paths(SEQUOIA, Budget(15, 15), flat)) == 15
    assert best_paths(SEQUOIA, Budget(15, 15), steep) == [(0,)]
    assert best_paths(SEQUOIA, Budget(15, 15), deep) == []


def test_sequoia_without_a_vector_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="acceptance"):
        grow(GROWERS["sequoia"].grower(), random_law(3, 0), 3, Budget(3, 3))


@pytest.mark.parametrize("name", GROWERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [Budget(0, 0), Budget(1, 1), Budget(7, 1), Budget(16, 3), Budget(300, 64)])
def test_every_tree_is_well_formed_and_within_budget(name: str, temperature: float, budget: Budget) -> None:
    options = MEASURED.get(name, {})
    for vocab_size in (1, 2, 40):
        tree = grow(
            GROWERS[name].grower(**options), random_law(vocab_size, 8, concentration=0.2), vocab_size, budget, 3, temperature
        )
        assert tree.num_nodes <= budget.nodes + 1
        assert tree.depths.max() <= budget.depth
        assert tree.parents[0] == -1 and all(tree.parents[i] < i for i in range(1, tree.num_nodes))
        assert tree.tokens[0] == PREFIX[-1]
        for node, siblings in enumerate(tree.children):
            assert (tree.law(node) is not None) == bool(siblings and tree.drawn[node])


@pytest.mark.parametrize("name", [name for name in GROWERS if name != "chain"])
def test_trees_branch_at_temperature_0(name: str) -> None:
    options = MEASURED.get(name, {})
    tree = grow(GROWERS[name].grower(**options), random_law(20, 1), 20, Budget(16, 8), temperature=0.0)
    assert any(len(siblings) > 1 for siblings in tree.children)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dyspec", {"width": 0}, "width"),
        ("dyspec-calibrated", {"width": 0}, "width"),
        ("dyspec-calibrated", {"acceptance_by_prob": {"sampled": {"share": [[0.5]], "mean": [0.5]}}}, "acceptance_by_prob"),
        ("dyspec", {"draft_temperature": 0.0}, "draft_temperature"),
        ("dyspec", {"draft_sampling": "maybe"}, "draft_sampling"),
        ("dyspec-threshold", {"threshold": 1.5}, "threshold"),
        ("branching", {"num_chains": 0}, "num_chains"),
        ("branching", {"expansion": [2, 0]}, "expansion"),
        ("static", {"paths": [[0, 0]]}, "parent"),
        ("static", {"paths": [[1]]}, "siblings"),
        ("sequoia", {"acceptance": [1.5]}, "acceptance"),
        ("sequoia", {"acceptance": {"foo": [1.0]}}, "sampled and greedy, got foo"),
        ("static", {"paths": [[0], []]}, "an empty path"),
        ("topk", {"topk": 0}, "topk"),
        ("opt", {"delta": -1.0}, "delta"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GROWERS[name].grower(**options)


@pytest.mark.parametrize("nodes", [1, 4, 9, 30])
def test_greedy_dyspec_has_the_largest_draft_mass(nodes: int) -> None:
    for seed in range(6):
        law, budget = random_law(5, seed, zeros=0.2), Budget(nodes, 4)
        tree = grow(DySpec(width=2), law, 5, budget, seed, temperature=0.0)
        best = grow(Opt(delta=0), law, 5, budget, seed, temperature=0.0)
        masses = [mass(law, one) for one in (tree, best)]
        assert masses[0] == pytest.approx(masses[1], abs=1e-12)


def mass(law: Law, tree: DraftTree) -> float:
    """Sum over the nodes of the draft probability of their paths, at the draft temperature of a greedy request."""
    total, values = 0.0, {0: 1.0}
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[node])
        above = [int(tree.tokens[i]) for i in tree.path_to(parent)]
        probs = np.asarray(law((*PREFIX, *above)), np.float64) ** (1 / GREEDY_DRAFT_TEMPERATURE)
        values[node] = values[parent] * float(probs[tree.tokens[node]] / probs.sum())
        total += values[node]
    return total


def test_sequoia_fills_its_budget_where_later_ranks_are_never_accepted() -> None:
    assert len(best_paths([0.5, 0.2, 0.1, 0.0, 0.0], Budget(12, 4))) == 12


@pytest.mark.parametrize("name", ["dyspec", "branching", "chain"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_laws_over_a_large_vocabulary_are_cut(name: str, temperature: float) -> None:
    """To the likeliest tokens, and the row that a rule is given is the law that was drawn from, over all tokens."""
    vocab_size = LARGE_VOCABULARY + 1
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0)) * 3

    class Drafter:
        def __init__(self) -> None:
            self.vocab_size = vocab_size

        def expand(self, states, partial, node_ids):
            return logits.expand(len(node_ids), -1)

    sampling = SamplingParams(temperature=temperature)
    [tree] = GROWERS[name].grower().grow(Drafter(), Work([None], [5], [Budget(8, 8)], [sampling], [Draws(3)]))
    likeliest = logits.topk(LARGE_CUT).indices
    assert set(tree.tokens[1:].tolist()) <= set(likeliest.tolist())
    drawn = [node for node, siblings in enumerate(tree.children) if siblings and tree.drawn[node]]
    assert bool(drawn) == bool(temperature)
    for node in drawn:
        law = tree.law(node)
        assert law.shape == (vocab_size,)
        assert tree.draft_probs.shape[1] == LARGE_CUT
        torch.testing.assert_close(law[likeliest], logits[likeliest].softmax(-1))
        assert law.sum() == pytest.approx(1, abs=1e-5)
        assert int((law > 0).sum()) == LARGE_CUT


@pytest.mark.parametrize(
    ("given", "vocab_size", "entries"), [(None, 100, 100), (None, 10**5, 256), (0, 10**5, 10**5), (7, 5, 5)]
)
def test_cut(given: int | None, vocab_size: int, entries: int) -> None:
    assert DySpec(draft_top_k=given).cut(vocab_size) == entries


def test_a_negative_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="draft_top_k must be at least 0"):
        DySpec(draft_top_k=-1)


def test_the_calibrated_tree_without_a_table_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="foredraft calibrate"):
        grow(GROWERS["dyspec-calibrated"].grower(), random_law(3, 0), 3, Budget(3, 3))


def test_worth_by_measured_acceptance() -> None:
    """The first child of probability .5 is accepted with .6, the second, of .25 / .5, with .4 where it is tested."""
    table = AcceptanceTable(np.zeros((7, 13)), np.array([0.5, 0.25, 0, 0, 0, 0, 0]))
    table.share[0, 8], table.share[1, 8] = 0.6, 0.4
    assert PROB_EDGES[8] == 0.5
    np.testing.assert_allclose(table.worth(np.array([0.5, 0.25]), sampled=False), ([0.6, 0.16], [0.6, 0.16]))
    np.testing.assert_allclose(table.worth(np.array([0.5, 0.25]), sampled=True), ([1.0, 0.4 * 0.5], [0.6, 0.16]))
    np.testing.assert_array_equal(as_drafted(np.array([0.5, 0.25]), sampled=True), ([1.0, 0.5], [0.5, 0.25]))
    np.testing.assert_array_equal(as_drafted(np.array([0.5, 0.25]), sampled=False), ([0.5, 0.25], [0.5, 0.25]))


def test_a_table_from_trials() -> None:
    """Shares are drawn to the mean of their ranks as if by 20 trials; written and read again it is the same table."""
    trials = [Trial(0, 0.55, True)] * 30 + [Trial(0, 0.55, False)] * 10 + [Trial(0, 0.005, False)] * 40 + [Trial(20, 0.3, True)]
    table = AcceptanceTable.measured(trials)
    assert table.mean == pytest.approx([30 / 80, 0, 0, 0, 0, 0, 1])
    assert table.share[0, 8] == pytest.approx((30 + 20 * 30 / 80) / 60)
    assert table.share[0, 0] == pytest.approx(20 * 30 / 80 / 60)
    assert table.share[6, 5] == pytest.approx(1)
    again = AcceptanceTable.read(json.loads(json.dumps(table.written())))
    np.testing.assert_allclose(again.share, table.share, atol=1e-4)


def test_the_calibrated_tree_follows_the_table() -> None:
    """Where first children are always accepted it is a chain; where all ranks are alike and unlikely, a star."""
    sure = {"share": np.eye(7, 1) * np.ones((7, 13)), "mean": np.eye(1, 7)[0]}
    never = {"share": np.full((7, 13), 0.01), "mean": np.full(7, 0.01)}
    for table, depth in ((sure, 6), (never, 1)):
        options = {"acceptance_by_prob": {"sampled": {key: value.tolist() for key, value in table.items()}}}
        tree = grow(GROWERS["dyspec-calibrated"].grower(**options), random_law(20, 1), 20, Budget(6, 6))
        assert tree.depths.max() == depth


def test_worth_never_looks_at_a_token_before_it_is_drawn() -> None:
    """What a draw promises depends on its rank and on the earlier siblings only."""
    table = AcceptanceTable.read(any_table()["sampled"])
    one, other = (table.worth(np.array([0.4, 0.3, last]), sampled=True).promises for last in (0.01, 0.25))
    np.testing.assert_array_equal(one, other)
