"""The parts of the measurements that could be wrong without anyone seeing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import load
from batches import counted_moves, moved_nodes, node_bytes
from draft_cost import settings
from ideal import CHUNKS, DECODING, Costs, ideal_seconds, measured_costs
from measuring import INSTRUCTIONS, interval, report, rounds, table
from peers import ratio
from tables import of_seeds
from tree_attention import BLOCK, case_of, dense, skipping, visible_blocks
from tree_shapes import ORDERS, HeapOrder, random_tree, reordered
from waves import lengths_of, ordered

from foredraft.cache.pool import KVPool
from foredraft.core.contracts import Budget
from foredraft.core.draws import Draws
from foredraft.core.tree import ancestor_mask
from foredraft.kernels import library
from foredraft.trees.base import Laws, Sapling


@pytest.mark.parametrize(
    "given", [{}, {"FOREDRAFT_KERNELS": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": ""}], ids=len
)
def test_results_record_the_variables_that_choose_instructions(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that are set and not empty, and no field if there are none."""
    for name in INSTRUCTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    report(tmp_path / "out.jsonl", [{"ms": 1.0}], ["ms"], device=torch.device("cpu"), dtype="bfloat16")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row.get("environment") == ({name: value for name, value in given.items() if value} or None)
    assert (row["ms"], row["dtype"]) == (1.0, "bfloat16")
    assert row["command"].startswith("python benchmarks/")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nodes", [64, 100])
def test_skipping_hidden_blocks_changes_nothing(order: str, nodes: int) -> None:
    tree = random_tree(nodes, 1)
    case = case_of(reordered(tree, ORDERS[order](tree)), 2 * BLOCK, torch.float32, torch.device("cpu"))
    assert (dense(case)() - skipping(case)()).abs().max() < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_the_same_tree(order: str) -> None:
    tree = random_tree(70, 2)
    places = list(ORDERS[order](tree))
    assert (reordered(tree, places).parents[1:] < np.arange(1, 70)).all()
    assert (ancestor_mask(reordered(tree, places).parents) == ancestor_mask(tree.parents)[np.ix_(places, places)]).all()


def test_blocks_are_those_of_the_paper() -> None:
    """DySpec, table 5: 36 blocks in insertion order and 22.5 depth first, at 256 nodes; means of random trees."""
    found = {"insertion": [], "depth first": []}
    for seed in range(10):
        tree = random_tree(256, seed)
        for order, counts in found.items():
            mask = ancestor_mask(reordered(tree, ORDERS[order](tree)).parents)
            counts.append(int(visible_blocks(mask).sum()))
    assert abs(np.mean(found["insertion"]) - 36) < 1
    assert abs(np.mean(found["depth first"]) - 22.5) < 2


def test_heap_order_is_that_of_one_draw_at_a_time() -> None:
    laws = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)  # a law a node: no ties
    sapling, grower = Sapling(0, Budget(9, 9), Draws(3), True), HeapOrder()
    policy = grower.policy(sapling)
    wanted = next(policy)
    with pytest.raises(StopIteration):
        while True:
            wanted = policy.send(Laws(laws[wanted]))
    heap, popped = [(1.0, 0)], []  # (value of the next draw below a node, the node)
    children = {node: [i for i, parent in enumerate(sapling.parents) if parent == node] for node in range(len(sapling.parents))}
    while len(popped) < 9:
        value, node = max(heap)
        heap.remove((value, node))
        child = children[node][sum(sapling.parents[one] == node for one in popped)]
        popped.append(child)
        heap += [(value - sapling.values[child], node), (sapling.values[child], child)]
    [tree] = grower.trees
    place = {node: i for i, node in enumerate([0, *popped])}
    assert tree.parents.tolist() == [-1, *(place[sapling.parents[node]] for node in popped)]


def test_moves_are_counted() -> None:
    pool = KVPool(2, num_layers=3, num_heads=2, head_dim=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    caches = [pool.allocate(), pool.allocate()]
    for cache in caches:
        cache.reserve(16)
    paths = [[1, 2, 5], [3]]
    assert moved_nodes(paths) == 2
    with counted_moves() as moved:
        pool.keep(caches, paths)
    pool.keep(caches, paths)
    assert moved.take() == (2, 2 * node_bytes(pool))
    assert node_bytes(pool) == 2 * 3 * 2 * 4 * 2


def test_rounds_and_tables() -> None:
    assert list(rounds(3, 1.0)) == [0, 1, 2]
    assert list(rounds(3, 0.0)) == [0]
    assert table([{"a": 1.23456, "b": None}, {"a": 2345.6, "b": "x"}], ["a", "b"]).splitlines()[2:] == [
        "| 1.23 | - |",
        "| 2346 | x |",
    ]


def test_heads_of_several_seeds_are_averaged() -> None:
    def row(name: str, length: float) -> dict[str, object]:
        return {"name": name, "acceptance_length": length, "not_looping": length - 1}

    rows = [row("ar", 1.0), row("fspad=a/fspad-0:topk:8", 4.0), row("ctc=a/ctc-0", 2.0), row("fspad=a/fspad-1:topk:8", 4.2)]
    assert of_seeds(rows)[2:] == [["`fspad=fspad-*:topk:8`", "4.00, 4.20", "4.100 ± 0.100", "3.100 ± 0.100"]]
    assert of_seeds(rows[:3]) == []


def test_a_ratio_above_one_means_that_foredraft_is_faster() -> None:
    """The ratio is taken within a round, so a slow round of both does not count."""
    assert ratio([1.0, 9.0, 2.0], [2.0, 27.0, 3.0]) == (2.0, 1.5, 3.0)


def test_the_interval_holds_the_median_19_times_of_20() -> None:
    """2,000 samples of 101: 95 % of them within 1.5 points, three standard errors."""
    low, high = interval(101)
    samples = np.sort(np.random.default_rng(0).exponential(size=(2000, 101)), axis=1)
    share = ((samples[:, low] <= np.log(2)) & (np.log(2) <= samples[:, high])).mean()
    assert abs(share - 0.95) < 0.015
    assert interval(1) == (0, 0)


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
def test_a_level_is_timed_beside_the_products_of_the_whole_head() -> None:
    """Every matrix that a level reads is among the products; EAGLE-3's fc, which is applied once a step, is not."""
    with torch.inference_mode():
        for one in settings([384]):
            turn = one.turn()
            assert 0 < turn.forward < turn.level <= turn.grown
            assert turn.forwards == (1 if one.method in ("ctc", "medusa") else 3)
            one.turns.append(turn)
            row = one.row()
            assert (row["rows"], row["width"]) == (one.rows, 384)
            if one.method == "medusa":
                continue
            drafter = one.drafter.slots if one.method == "ctc" else one.drafter
            matrices = [weight for name, weight in drafter.head.named_parameters() if weight.ndim > 1 and name != "slots"]
            wanted = sum(weight.numel() for weight in matrices)
            wanted += 4096 * 384 if one.method != "eagle3" else -drafter.head.fc.weight.numel()
            assert sum(linear.outputs * linear.inputs for linear in drafter.compiled.linears) == wanted


def test_costs_are_those_that_were_measured() -> None:
    """A step costs 1 for being run, a tenth a row, and a thousandth per row and token that it attends to."""

    def ask(decoding: int, rows: int, before: int) -> float:
        return 1 + 0.1 * (decoding + rows) + 0.001 * (decoding * before + rows * before + rows**2 / 2)

    costs = measured_costs(ask)
    assert costs.seconds([16] * 8, []) == pytest.approx(1.8)
    assert costs.seconds([16, 116], []) == pytest.approx(1.3)
    assert costs.seconds([16] * 16, [(0, 256)]) == pytest.approx(ask(16, 256, 0))
    assert costs.seconds([], [(100, 64)]) == pytest.approx(ask(0, 64, 100))
    assert costs.seconds([], [(0, 32), (0, 32)]) == pytest.approx(ask(0, 64, 0) - 0.001 * 32 * 32)


def test_the_ideal_scheduler_fills_its_steps() -> None:
    steps = Costs([1.0] * len(DECODING), [1.0] * len(CHUNKS), [1.0] * len(CHUNKS), 0.0, 0.0)
    rows = Costs(list(DECODING), list(CHUNKS), [16 + count for count in CHUNKS], 0.0, 0.0)
    assert ideal_seconds([(1, 5), (1, 5), (1, 5)], steps, 2, 512) == 1 + 5 + 1 + 5
    assert ideal_seconds([(1, 2), (1, 8), (1, 6)], steps, 2, 512) == 1 + 8 + 1  # the third takes the place of the first
    assert ideal_seconds([(1025, 1)], steps, 2, 512) == 2 + 1
    lengths = lengths_of("mixed", 64, 0)
    assert ideal_seconds(lengths, rows, 16, 512) == pytest.approx(sum(prompt - 1 + answer for prompt, answer in lengths))


def test_lengths_are_log_uniform() -> None:
    lengths = lengths_of("answers", 2000, 0)
    answers = sorted(answer for _, answer in lengths)
    assert {prompt for prompt, _ in lengths} == {16}
    assert (answers[0], answers[-1]) == pytest.approx((8, 1024), rel=0.02)
    assert answers[1000] == pytest.approx((8 * 1024) ** 0.5, rel=0.15)  # the seed is fixed; three standard errors
    longest_first = [lengths[number][1] for number in ordered(lengths, "sorted")]
    assert longest_first == answers[::-1]


def test_a_workload_has_the_same_lengths_for_every_seed_and_arrives_at_the_given_rate() -> None:
    first, second = (load.workload(seed, 50, 100, 2.0) for seed in ("a", "b"))
    for name in ("prompts", "limits"):
        one, other = ([len(item) if name == "prompts" else item for item in asked[name]] for asked in (first, second))
        assert sorted(one) == sorted(other)
        assert one != other
    assert all(load.PROMPTS[0] <= len(prompt) <= load.PROMPTS[1] for prompt in first["prompts"])
    assert first["arrivals"] == sorted(first["arrivals"])
    assert 15 < first["arrivals"][-1] <= 50 / 2.0
    assert load.workload("a", 50, 100, None)["arrivals"] is None


def test_throughput_counts_from_the_first_end_to_the_last_start() -> None:
    requests = [[0.0, [[1.0, 1], [2.0, 1]]], [0.0, [[1.5, 1], [3.0, 4], [6.0, 1]]], [2.0, [[4.0, 2]]], [4.0, [[7.0, 1]]]]
    assert load.throughput(requests) == (4 + 2) / 2


def test_times_of_requests() -> None:
    found = load.times([[1.0, [[1.5, 1], [1.75, 2], [2.5, 2]]], [0.0, [[2.0, 1], [3.0, 1]]]])
    assert (found["first_token_s_p50"], found["first_token_s_p95"]) == (0.5, 2.0)
    assert found["token_s_p50"] == 0.25
    assert found["token_s_p95"] == found["gap_s_p95"] == 1.0
    assert found["gap_s_p50"] == 0.75


def test_ratios_of_load_are_above_one_where_foredraft_is_better() -> None:
    names = [f"{name}_{short}" for name in load.TIMES for short in load.SHARES]
    mine, theirs = ({"load": "closed", "round": 0, **dict.fromkeys(names, seconds)} for seconds in (0.1, 0.2))
    rows = [{"engine": "foredraft", "tokens_per_s": 300.0, **mine}, {"engine": "other", "tokens_per_s": 100.0, **theirs}]
    found = load.summary(rows, "closed")
    assert [cells["times as good as other"] for cells in found] == ["3.00"] + ["2.00"] * 6
    assert load.summary(rows, 0.5) == []
