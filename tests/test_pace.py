"""How the nodes of a request follow the load and its acceptance, and that the law of its tokens does not change thereby.

Also how the rows of a step are divided among trees and prompts.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import count, pairwise, product
from typing import Any

import numpy as np
import pytest

from exact import decoded, enumerate_branches
from foredraft.core.contracts import Budget
from foredraft.core.costs import Costs, interpolated
from foredraft.core.params import SamplingParams
from foredraft.core.tree import TreeBatch
from foredraft.drafters.lm import LMDrafter
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.engine.pace import Pace, allot
from foredraft.engine.request import Request
from foredraft.models.table import TableTarget, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS
from test_isolation import run, tokens_of
from test_schedules import bundled

COSTS = Costs(
    forward=((1.0, 1.0), (4.0, 1.1), (8.0, 1.4), (16.0, 2.6), (64.0, 10.0)),
    outside=((0.0, 0.05, 0.01), (2.0, 0.3, 0.05), (6.0, 0.6, 0.1)),
    tokens=((1.0, 1.7), (2.0, 2.2), (4.0, 2.8), (6.0, 3.1)),
)
MOST = COSTS.for_all(1)
CASES = [*product((1, 2, 4, 8, 16, 64), (0, 20, 500), (0.0, 0.3, 1.0, 1.5))]


def test_curves_are_linear_between_and_behind_their_points() -> None:
    curve = ((1.0, 2.0), (3.0, 6.0), (5.0, 7.0))
    assert [interpolated(curve, at)[0] for at in (0, 1, 2, 3, 4, 5, 9)] == [2, 2, 4, 6, 6.5, 7, 9]
    assert interpolated(((4.0, 1.0, 2.0),), 9) == (1.0, 2.0)


def test_costs_survive_storage() -> None:
    assert Costs.read(COSTS.written()) == COSTS


def speeds_of(costs: Costs, shares: list[float], requests: int, besides: int) -> dict[tuple[int, int], float]:
    """Tokens per second, relative to plain decoding, by how many requests draft, and how many nodes each. Only what pays.

    Prompts are computed in any case, so their time does not count, but drafts may take longer beside them.
    """
    plain_s, found, prompts_s = costs.step_s(requests, 0), {}, costs.step_s(requests, 0, besides) - costs.step_s(requests, 0)
    for drafting, (size, _) in product(range(1, len(shares) + 1), costs.tokens):
        drafted = sum(shares[:drafting]) * costs.gain(int(size))
        step_s = costs.step_s(requests, int(size), besides, drafting) - prompts_s
        if drafted / requests > 1.4 * (step_s / plain_s - 1):
            found[drafting, int(size)] = (requests + drafted) / step_s * plain_s / requests
    return found


@pytest.mark.parametrize(("requests", "besides", "share"), CASES)
def test_no_chosen_budget_predicts_less_than_plain(requests: int, besides: int, share: float) -> None:
    rng = np.random.default_rng(requests + besides)
    for shares in ([share] * requests, sorted(share * rng.random(1 + requests // 2), reverse=True)):
        speeds, chosen = speeds_of(COSTS, shares, requests, besides), COSTS.best(shares, requests, besides)
        if chosen == (0, 0):
            assert not speeds
        else:
            assert 1 < speeds[chosen] == pytest.approx(max(speeds.values()))
            drafting, nodes = chosen
            drafted = requests + sum(shares[:drafting]) * COSTS.gain(nodes)
            with_prompts = COSTS.step_s(requests, nodes, besides, drafting) / COSTS.step_s(requests, 0, besides)
            assert drafted / requests > with_prompts  # also where the prompts count


def test_budgets_of_several_kinds_count_the_rows_of_each_other() -> None:
    """48 rows cost nothing beside one, each further row is dear. Two kinds of requests have equal costs, but each its own."""
    curves = ((1.0, 10.0), (48.0, 10.0), (80.0, 30.0)), ((0.0, 0.0, 0.0), (4.0, 0.0, 0.0)), ((4.0, 2.0),)
    kinds = Costs(*curves), Costs(*curves)
    nodes = allot([Pace(kinds[i % 2]) for i in range(16)], 16, 0)
    plain_s, step_s = kinds[0].step_s(16, 0), interpolated(kinds[0].forward, 16 + sum(nodes))[0]
    assert 0 < sum(nodes) <= 32
    assert (16 + sum(map(bool, nodes))) / step_s > 16 / plain_s
    assert allot([Pace(kinds[0]) for _ in range(8)], 16, 32) == [0] * 8  # others have fixed trees of 4 nodes


def test_one_that_must_catch_up_stops_nobody_else() -> None:
    costs = Costs(((1.0, 10.0), (64.0, 10.0)), ((0.0, 0.0, 0.0), (4.0, 2.0, 0.0)), ((4.0, 1.6),), catch_up_s=5.0)
    paces = [Pace(costs) for _ in range(4)]
    for pace in paces[1:]:
        pace.gained *= 0.97
    paces[0].pending = 5
    assert allot(paces, 4, 0) == [0, 4, 4, 4]


def test_of_equal_requests_those_that_waited_longest_draft() -> None:
    """Two trees fit before rows get dear. Every request has its turn."""
    costs = Costs(((1.0, 10.0), (16.0, 10.0), (32.0, 60.0)), ((0.0, 0.0, 0.0), (4.0, 0.1, 0.0)), ((4.0, 3.0),))
    paces, drafted = [Pace(costs) for _ in range(8)], [0] * 8
    for _ in range(40):
        nodes = allot(paces, 8, 0)
        for i, (pace, size) in enumerate(zip(paces, nodes, strict=True)):
            pace.saw(size, size, 2 if size else 0, 3 if size else 1)
            drafted[i] += size > 0
    assert sum(drafted) == 80 and min(drafted) >= 8


@pytest.mark.parametrize(("requests", "besides"), [*product((1, 2, 4, 8, 16), (0, 20, 500))])
def test_the_least_share_is_the_one_from_which_on_drafting_pays(requests: int, besides: int) -> None:
    least = COSTS.least(requests, besides)
    assert COSTS.best([1.001 * least] * requests, requests, besides)[0] > 0
    assert COSTS.best([0.999 * least] * requests, requests, besides) == (0, 0)


def test_costs_of_a_step_in_which_some_requests_draft() -> None:
    """Rows beyond 8 cost 0.15 s, drafting 2 nodes 0.25 s for the first request and 0.04 s for each further one."""
    assert COSTS.step_s(8, 0) == pytest.approx(1.4 + 0.05 + 7 * 0.01)
    assert COSTS.step_s(8, 2, drafting=2) == pytest.approx(COSTS.step_s(8, 0) + 4 * 0.15 + 0.25 + 0.04)
    assert COSTS.step_s(8, 2) == COSTS.step_s(8, 2, drafting=8)


def test_nodes_fall_with_the_load_and_with_acceptance() -> None:
    by_load = [COSTS.for_all(requests) for requests in (1, 2, 4, 8, 16, 64)]
    assert by_load == sorted(by_load, reverse=True) and by_load[0] == MOST and by_load[-1] == 0
    by_share = [COSTS.best([share], 1, 0)[1] for share in (1.0, 0.7, 0.4, 0.2, 0.0)]
    assert by_share == sorted(by_share, reverse=True) and by_share[-1] == 0
    assert COSTS.least(1, 2000) > 1.5 * COSTS.least(1, 0)  # beside a prompt, no row is as cheap as the first ones of a step


def test_one_of_many_requests_waits_until_others_draft_too() -> None:
    """Drafting takes half the time of a plain step, for one request or for eight."""
    costs = Costs(((1.0, 1.0), (64.0, 1.0)), ((0.0, 0.0, 0.0), (4.0, 0.5, 0.0)), ((4.0, 3.0),))
    paces = [Pace(costs) for _ in range(8)]
    assert allot(paces[:2], 8, 0) == [0] * 2 and allot(paces[:3], 8, 0) == [4] * 3 and allot(paces[:1], 1, 0) == [4]
    for pace in paces[1:]:
        for _ in range(9):
            pace.saw(4, 4, 0, 1)
    assert allot(paces, 8, 0) == [0] * 8
    assert [pace.pause > 0 for pace in paces] == [False] + 7 * [True]
    steps = [allot(paces, 8, 0) for _ in range(16)]
    assert steps == 15 * [[0] * 8] + [[4] * 8]  # the probes of all come together


def test_a_request_without_acceptance_is_probed_ever_more_rarely() -> None:
    pace, drafted = Pace(COSTS), list[int]()
    for step in range(400):
        [nodes] = allot([pace], 1, 0)
        pace.saw(nodes, nodes, 0, 1)
        drafted += [step] if nodes else []
    gaps = [after - before for before, after in pairwise(drafted) if after - before > 1]
    assert gaps == sorted(gaps) and gaps[0] >= 16 and gaps[-1] >= 64
    assert len(drafted) < 40
    assert pace.pending == 400 - 1 - drafted[-1]


def test_a_request_that_is_accepted_again_drafts_again() -> None:
    pace = Pace(COSTS)
    for _ in range(100):
        [nodes] = allot([pace], 1, 0)
        pace.saw(nodes, nodes, 0, 1)
    drafted = []
    for _ in range(300):
        [nodes] = allot([pace], 1, 0)
        pace.saw(nodes, nodes, nodes, nodes + 1)
        drafted.append(nodes)
    assert drafted[-50:] == [MOST] * 50


def test_a_load_that_does_not_pay_is_no_fault_of_the_request() -> None:
    pace = Pace(COSTS)
    assert [allot([pace], 64, 0) for _ in range(50)] == [[0]] * 50
    assert allot([pace], 1, 0) == [MOST]


def test_catching_up_must_pay_within_as_many_tokens_as_were_missed() -> None:
    nodes = COSTS.best([0.7], 1, 0)[1]
    drafted, plain_s = 0.7 * COSTS.gain(nodes), COSTS.step_s(1, 0)
    saved = (plain_s + drafted * plain_s / 1.4 - COSTS.step_s(1, nodes)) / (1 + drafted)  # seconds a token
    assert nodes and saved > 0
    for part, drafts in ((0.0, True), (0.9, True), (5.0, False)):
        costs = replace(COSTS, catch_up_s=part * saved)
        assert costs.best([0.7], 1, 0) == (1, nodes)
        assert (costs.best([0.7], 1, 0, behind=[True]) != (0, 0)) == drafts


def test_a_drafter_that_catches_up_too_slowly_stays_off() -> None:
    pace = Pace(replace(COSTS, catch_up_s=1.0))
    assert allot([pace], 1, 0) == [MOST]
    pace.saw(0, 0, 0, 1)  # the load did not allow a tree
    assert [allot([pace], 1, 0) for _ in range(20)] == [[0]] * 20


def test_what_lookup_does_not_find_says_nothing() -> None:
    pace = Pace(COSTS)
    before = pace.share
    for _ in range(50):
        pace.saw(*allot([pace], 1, 0), 0, 0, 1)
    assert pace.share == before and not pace.pending


VOCAB, LENGTH, PROMPT = 2, 5, (0, 1)
LAW, DRAFT = random_law(VOCAB, 11), random_law(VOCAB, 12)
EAGER = Costs(((1.0, 1.0), (4.0, 1.2)), ((0.0, 0.0, 0.0), (2.0, 0.45, 0.0)), ((1.0, 1.5), (2.0, 1.9)))


def drafting(tree: str, rule: str) -> dict[str, Any]:
    drafter = LMDrafter(TableTarget(DRAFT, VOCAB), GROWERS[tree].grower(), VOCAB)
    return {"drafter": drafter, "rule": RULES[rule].rule, "budget": Budget(2, 2), "costs": lambda _: EAGER}


@pytest.mark.unchecked
@pytest.mark.parametrize(("tree", "rule"), [("chain", "chain"), ("chain", "block"), ("dyspec", "multiround")])
def test_the_law_of_budgets_that_depend_on_acceptance(tree: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch of every step. The second budget depends on what the first step accepted, and several budgets occur."""
    monkeypatch.setattr("foredraft.engine.pace._PRIOR", 1.0)
    monkeypatch.setattr("foredraft.engine.pace._FIRST_PAUSE", 1)
    law, budgets = defaultdict[tuple[int, ...], float](float), set[tuple[int, ...]]()

    def run(draws: Any) -> tuple[int, ...]:
        one = decoded(TableTarget(LAW, VOCAB), PROMPT, SamplingParams(), draws, len(PROMPT) + LENGTH, **drafting(tree, rule))
        budgets.add(tuple(record.budget for record in one.records))
        return tuple(one.output_ids)

    for prob, output, _ in enumerate_branches(run):
        law[output] += prob
    assert len({found[1] for found in budgets if len(found) > 1}) > 1
    for tokens in product(range(VOCAB), repeat=LENGTH):
        prob = 1.0
        for i, token in enumerate(tokens):
            prob *= LAW((*PROMPT, *tokens[:i]))[token]
        assert law[tokens] == pytest.approx(prob, abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"reproducible": True}])
@pytest.mark.parametrize("seed", [None, 3])
def test_seeds_and_reproducible_engines_keep_their_nodes(options: dict[str, Any], seed: int | None) -> None:
    engine = Engine(
        TableTarget(LAW, VOCAB),
        max_model_len=100,
        options=EngineOptions(max_num_seqs=1, **options),
        **drafting("chain", "block"),
    )
    request = engine.add_request(None, list(PROMPT), SamplingParams(seed=seed))
    while engine.has_unfinished_requests():
        engine.step()
    budgets = {record.budget for record in request.sequences[0].records[:-3]}
    assert (budgets == {2}) == (bool(options) or seed is not None)


# --- The budgets of several requests

STEEP = Costs(((1.0, 1.0), (8.0, 1.1), (16.0, 6.0)), ((0.0, 0.0, 0.0), (2.0, 0.05, 0.0)), ((1.0, 1.5), (2.0, 1.9)))
"""Trees pay for few requests, and with eight running not even for one whose drafts are always accepted."""
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
FIRST = replace(GREEDY, max_tokens=90)
crowded = pytest.mark.parametrize("interrupted", [False, True], ids=["", "preempted"])


def met(engine: Engine, vocab_size: int, *, interrupted: bool) -> tuple[list[Request], list[tuple[int, int]]]:
    """A long request alone, then beside seven short ones, which join at different steps, then alone again.

    Args:
        interrupted: whether the long request is preempted twice: while it pauses, and soon after it drafts again.

    Returns:
        The requests, and for every step without prompts the number of requests that decode and the budget of the first one.
    """
    rng = np.random.default_rng(5)
    prompts = [rng.integers(vocab_size // 2, vocab_size, size=5 + 3 * i).tolist() for i in range(8)]
    requests, steps = [engine.add_request(None, prompts[0], FIRST)], list[tuple[int, int]]()
    [first], moments = requests[0].sequences, [[0, 0, 0], [2, 2, 2]] if interrupted else []
    for number in count():
        for i in range(1, 8):
            if number == 4 + i // 3:
                requests.append(engine.add_request(None, prompts[i], replace(GREEDY, max_tokens=12 + 2 * i)))
        has_prompts = bool(engine.scheduler.waiting or any(one.num_missing for one in engine.scheduler.running))
        before, decoding = len(first.records), len(engine.scheduler.running)
        engine.step()
        if len(first.records) > before and not has_prompts:
            steps.append((decoding, first.records[-1].budget))
        if moments and [budget for _, budget in steps[-3:]] == moments[0]:
            engine.scheduler.preempt(first)
            del moments[0]
        if not engine.has_unfinished_requests():
            break
    assert not moments and len(requests) == 8
    return requests, steps


def check_budgets(steps: list[tuple[int, int]]) -> None:
    """They are 0 with eight requests, and the largest for one alone, before and after."""
    by_load = {load: {budget for other, budget in steps if other == load} for load, _ in steps}
    assert by_load[8] == {0} and 2 in by_load[1]
    at_eight = [number for number, (load, _) in enumerate(steps) if load == 8]
    assert 2 in [budget for _, budget in steps[: at_eight[0]]]
    assert [budget for _, budget in steps[at_eight[-1] + 1 :]].count(2) > 5


@crowded
def test_tables_pause_and_catch_up(interrupted: bool) -> None:
    """The draft model has the target's law. So every draft is accepted, also right after a pause, if nothing was missed."""
    law = random_law(20, 3, concentration=0.3)
    drafter = LMDrafter(TableTarget(law, 20), GROWERS["chain"].grower(), 20)
    parts = {"drafter": drafter, "rule": RULES["block"].rule, "budget": Budget(2, 2), "costs": lambda _: STEEP}
    engine, plain = (Engine(TableTarget(law, 20), max_model_len=120, **more) for more in (parts, {}))
    requests, steps = met(engine, 20, interrupted=interrupted)
    check_budgets(steps)
    for request in requests:
        [sequence] = request.sequences
        alone = plain.add_request(None, request.prompt_ids, request.sampling)
        while not alone.is_finished:
            plain.step()
        assert sequence.output_ids == alone.sequences[0].output_ids
        assert all(record.num_accepted_tokens == record.num_draft_tokens for record in sequence.records)


@crowded
def test_heads_pause_and_catch_up(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tree is that of a drafter which has never paused, and starts at this place of the text."""
    llm = bundled("fspad", "chain")
    parts = llm.plan.engine_options() | {"budget": Budget(2, 2), "max_nodes": None}  # type: ignore[union-attr]
    ways = (parts | {"costs": lambda _: STEEP}, parts | {"costs": None}, {})
    engine, steady, plain = (Engine(llm.target, max_model_len=120, num_kv_blocks=40, **more) for more in ways)
    trees, drafter = list[tuple[list[int], list[int]]](), engine.drafter
    assert drafter is not None
    propose = drafter.propose

    def noted(work: Any) -> Any:
        found, texts = propose(work), [one.token_ids for one in engine.scheduler.running if one.draft_state in work.states]
        trees.extend(([*text], tree.tokens.tolist()) for text, tree in zip(texts, found, strict=True))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(drafter, "propose", noted)
        requests, steps = met(engine, 200, interrupted=interrupted)
    check_budgets(steps)
    for request in requests:
        alone = plain.add_request(None, request.prompt_ids, request.sampling)
        while not alone.is_finished:
            plain.step()
        assert request.sequences[0].output_ids == alone.sequences[0].output_ids
    assert len(trees) > 20
    for text, tokens in trees:
        [fresh] = steady.add_request(None, text, replace(GREEDY, max_tokens=3)).sequences
        while not fresh.records:
            steady.step()
        assert fresh.last_tree is not None and fresh.last_tree.tokens.tolist()[: len(tokens)] == tokens
        steady.abort_request(fresh.request.request_id)


# --- The rows of a step


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every forward of the target."""
    forward, rows = engine.target.forward, list[int]()

    def noted(batch: TreeBatch, *given: Any, **more: Any) -> Any:
        rows.append(int(batch.offsets[-1]))
        return forward(batch, *given, **more)

    monkeypatch.setattr(engine.target, "forward", noted)
    return rows


def test_a_step_has_at_most_the_rows_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without trees. Every step is full while prompts are left."""
    options = EngineOptions(max_num_seqs=6, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine = Engine(TableTarget(random_law(20, 3), 20), max_model_len=400, options=options)
    rows, rng = counted(engine, monkeypatch), np.random.default_rng(0)
    early = [engine.add_request(None, [1, 2, 3, 4], replace(GREEDY, max_tokens=30)) for _ in range(2)]
    engine.step()
    for _ in range(3):
        engine.add_request(None, rng.integers(20, size=150).tolist(), GREEDY)
    while any(one.num_missing for one in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
        assert [len(tokens_of(request)[0]) for request in early] == [len(rows)] * 2  # no prompt delays them
    assert rows[1:-1] == [64] * (len(rows) - 2) and len(rows) == 9
    run(engine)
    assert max(rows) == 64


def test_prompts_advance_beside_trees_that_fill_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = LMDrafter(TableTarget(random_law(20, 4), 20), GROWERS["dyspec"].grower(), 20)
    parts = {"drafter": drafter, "rule": RULES["multiround"].rule, "budget": Budget(15, 3)}
    options = EngineOptions(max_num_seqs=5, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine = Engine(TableTarget(random_law(20, 3), 20), max_model_len=400, options=options, **parts)
    rows = counted(engine, monkeypatch)
    for i in range(4):
        engine.add_request(None, [i, 2, 3], replace(GREEDY, max_tokens=200))
    while len(engine.scheduler.running) < 4 or any(not one.records for one in engine.scheduler.running):
        engine.step()
    [late] = engine.add_request(None, 101 * [5], GREEDY).sequences
    lengths = list[int]()
    while not lengths or late.num_missing:
        before = [len(one.records) for one in engine.scheduler.running[:4]]
        engine.step()
        lengths.append(late.cache.length)
        assert [len(one.records) for one in engine.scheduler.running[:4]] == [count + 1 for count in before]
    assert lengths == [32, 64, 96, 100]
    assert max(rows) == 64 + 32
