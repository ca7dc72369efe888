"""The automatic choice: the fastest candidate by what was measured, the same output whatever it is."""

from __future__ import annotations

import logging
from datetime import date
from itertools import chain, repeat
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from exact import MEASURED
from foredraft import LLM, SamplingParams
from foredraft.core.costs import MARGIN, Costs
from foredraft.core.output_kind import RequestOutputKind
from foredraft.drafters.ngram import NgramDrafter
from foredraft.models.table import TableTarget, random_law
from foredraft.plan import choose as auto
from foredraft.plan import measure
from foredraft.plan.build import MEMORY, Plan
from foredraft.plan.choice import Choice
from foredraft.plan.choose import Candidate, choose, tokens_per_step
from foredraft.plan.config import parse
from foredraft.plan.costs import catch_up_s
from foredraft.plan.measure import Full
from foredraft.plan.speculation import AUTO, Way
from foredraft.plan.store import recalled
from foredraft.rules import RULES
from foredraft.trees import GROWERS

DATA = Path(__file__).parent / "data"
PAIR = sorted(path.parent for path in DATA.glob("*/config.json"))
A, B = Way("lm", "a"), Way("lm", "b")
PROMPTS = ["The cat sat on", "Once upon a time there was", "She said", "It was a dark night and the children"]


def test_the_most_tokens_a_second_win() -> None:
    tokens = {("a", 2): 1.5, ("a", 4): 2.0, ("a", 8): 2.2, ("b", 2): 1.8, ("b", 4): 2.1, ("b", 8): 2.6}
    cost = {2: 1.1, 4: 1.2, 8: 1.9}
    asked = []

    def slowdown(candidate: Candidate) -> float:
        asked.append(candidate)
        return cost[candidate.nodes]

    best = choose([A, B], (2, 4, 8), lambda one: tokens[one.way.tree or "", one.nodes], slowdown, fallback=True)
    assert best == Choice(B, 4, 2.1, 1.2, 2.1 / 1.2)
    assert len(asked) == 6


def test_sizes_are_given_up_once_they_cost_more_than_they_bring() -> None:
    asked = []

    def slowdown(candidate: Candidate) -> float:
        asked.append(candidate.nodes)
        return float(candidate.nodes)

    choose([A], (1, 2, 4, 8, 16), lambda one: 1.5, slowdown, fallback=True)
    assert asked == [1, 2]


@pytest.mark.parametrize(("fallback", "nodes"), [(True, 0), (False, 4)])
def test_plain_decoding_where_nothing_pays(fallback: bool, nodes: int) -> None:
    best = choose([A], (4,), lambda one: 1.2, lambda one: 1.3, fallback=fallback)
    assert best.nodes == nodes


def test_a_tree_that_was_not_measured_is_left_out() -> None:
    measured = {"lm:a": {"2": 1.5, "4": 2.0}}
    assert tokens_per_step(measured, Candidate(B, 2)) is None
    assert [tokens_per_step(measured, Candidate(A, nodes)) for nodes in (1, 2, 3, 4, 9)] == [1.25, 1.5, 1.75, 2.0, 2.0]
    assert tokens_per_step({"suffix": {"4": 1.7}}, Candidate(Way("suffix", None), 4)) == 1.7
    typical = [tokens_per_step(None, Candidate(A, nodes)) or 0 for nodes in (1, 2, 4, 8, 16)]
    assert typical == sorted(typical)
    assert typical[0] == pytest.approx(1.55)


def test_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"x": 1.5}

    assert [recalled("kind", {"a": 1}, measure) for _ in range(3)] == [{"x": 1.5}] * 3
    assert len(calls) == 1
    recalled("kind", {"a": 2}, measure)
    assert len(calls) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{")
    recalled("kind", {"a": 1}, measure)
    assert len(calls) == 3
    monkeypatch.setenv("FOREDRAFT_CACHE", "/proc/nothing/can/be/written/here")
    assert recalled("kind", {"a": 1}, measure) == {"x": 1.5}


def fixed(monkeypatch: pytest.MonkeyPatch, greedy: Choice, sampled: Choice) -> None:
    """Stands in for the measurement."""
    monkeypatch.setattr(auto.Chooser, "choose", lambda self: {"greedy": greedy, "sampled": sampled})


TREES = [name for name in GROWERS if name not in MEASURED]


@pytest.mark.parametrize("sampled", TREES)
def test_a_batch_of_greedy_and_sampled_requests_is_each_alone(monkeypatch: pytest.MonkeyPatch, sampled: str) -> None:
    greedy = TREES[(TREES.index(sampled) + 3) % len(TREES)]
    fixed(monkeypatch, Choice(Way("lm", greedy), 3, 2.0, 1.0, 2.0), Choice(Way("lm", sampled), 5, 2.0, 1.0, 2.0))
    llm = LLM(PAIR[0], {"model": str(PAIR[1])}, dtype="float64")
    sampling = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12) for i in range(4)]
    together = llm.generate(PROMPTS, sampling)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, sampling, strict=True)]
    assert [one.outputs[0].token_ids for one in together] == [one.outputs[0].token_ids for one in alone]
    most = [max(record.num_draft_tokens for record in one.outputs[0].records) for one in together]
    assert most[0] <= 3 < max(most[1], most[3]) <= 5
    plain = llm.with_speculation({"method": "ar"}).generate(PROMPTS[::2], sampling[::2])
    assert [one.outputs[0].token_ids for one in together[::2]] == [one.outputs[0].token_ids for one in plain]
    rules = [llm.drafting(one)["rule"] for one in sampling[:2]]
    assert rules == [GROWERS[greedy].rule, GROWERS[sampled].rule]


def test_a_choice_is_logged_once_for_each_kind_of_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "choose", lambda trees, *rest, **more: Choice(next(iter(trees)), 0, 1.0, 1.0, 1.0))
    monkeypatch.setattr(auto, "recalled", lambda kind, facts, measure, **more: measure())
    today = date.today().isoformat()
    with caplog.at_level(logging.INFO, "foredraft"):
        llm = LLM(PAIR[0], {"model": str(PAIR[1])}, dtype="float64")
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=4))
    assert [one.getMessage() for one in caplog.records if one.name != MEMORY] == [
        f"{kind} requests: drafting: off (no method expected above plain: best lm, {tree} 1.00x; timed here on {today}; "
        "not calibrated, so a typical drafter is assumed); num_speculative_tokens drafts all the same"
        for kind, tree in (("greedy", "opt"), ("sampled", "chain"))
    ]
    assert llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].kinds == ["plain"] * 4


@pytest.mark.timed
@pytest.mark.parametrize("method", ["lm", "suffix"])
def test_it_is_really_measured(method: str) -> None:
    model = {"model": str(PAIR[1])} if method == "lm" else {}
    llm = LLM(PAIR[0], {"method": method, "num_speculative_tokens": AUTO, **model}, max_num_seqs=2)
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        chosen = llm.drafting(SamplingParams(temperature=temperature))
        assert chosen["budget"] == llm.choices[kind].nodes
        assert 0 < llm.choices[kind].slowdown < 1000
    assert llm.generate("The cat", SamplingParams(max_tokens=8, ignore_eos=True))[0].outputs[0].token_ids


def test_two_drafters_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy requests by suffix, sampled ones by the bundled head: each is what it is alone with its drafter."""
    fixed(monkeypatch, Choice(Way("suffix", None), 6, 2.0, 1.0, 2.0), Choice(Way("fspad", "sequoia"), 5, 2.0, 1.0, 2.0))
    llm = LLM(dtype="float64", max_model_len=128)
    sampling = [SamplingParams(temperature=i % 2, seed=i, max_tokens=16) for i in range(4)]
    together = [one.outputs[0] for one in llm.generate(PROMPTS, sampling)]
    assert [llm.drafting(one)["method"] for one in sampling[:2]] == ["suffix", "fspad"]
    parts = [{"method": "suffix", "num_speculative_tokens": 6}, {"tree": "sequoia", "num_speculative_tokens": 5}]
    alone = [llm.with_speculation(part) for part in parts]
    for i, (prompt, one) in enumerate(zip(PROMPTS, sampling, strict=True)):
        output = alone[i % 2].generate(prompt, one)[0].outputs[0]
        assert output.token_ids == together[i].token_ids
        assert [record.num_draft_tokens for record in output.records] == [r.num_draft_tokens for r in together[i].records]


def test_a_head_can_be_chosen_and_plain_decoding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method auto with a head: its trees, the same behind a lookup, lookups alone."""
    head = str(DATA / "heads" / "fspad")
    found = parse({"method": "auto", "model": head})
    assert found is not None
    names = {way.drafter for way in found.ways(has_model=True)}
    assert (names, found.calibrated) == ({"fspad", "fspad-lookup", "ngram", "suffix"}, "fspad")
    assert parse({"model": head}).drafter == "fspad"  # type: ignore[union-attr]
    fixed(monkeypatch, Choice(Way("fspad", "topk"), 6, 2.0, 1.0, 2.0), Choice(Way("ngram", None), 0, 1.0, 1.0, 1.0))
    llm = LLM(PAIR[0], {"method": "auto", "model": head}, dtype="float64")
    greedy, sampled = (llm.generate("The cat", SamplingParams(temperature=t, max_tokens=12, seed=0))[0] for t in (0.0, 1.0))
    assert greedy.metrics.num_draft_tokens > 0 == sampled.metrics.num_draft_tokens
    plain = llm.with_speculation({"method": "ar"}).generate("The cat", SamplingParams(temperature=0, max_tokens=12))
    assert greedy.outputs[0].token_ids == plain[0].outputs[0].token_ids


@pytest.mark.timed
@pytest.mark.parametrize("method", ["fspad", "ctc", "hydra-lookup"])
def test_steps_of_heads_are_really_timed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    grown_by = Plan.grown_by
    monkeypatch.setattr(Plan, "grown_by", lambda self, *rest: built.append(rest[-1]) or grown_by(self, *rest))
    model = str(DATA / "heads" / method.removesuffix("-lookup"))
    llm = LLM(PAIR[0], {"method": method, "model": model, **({"lookup_min_match": 2} if "-" in method else {})})
    assert method.removesuffix("-lookup") in built  # what drafts most of the time is what costs
    assert set(llm.choices) == {"greedy", "sampled"}
    assert all(0 < one.slowdown < 1000 for one in llm.choices.values())


@pytest.mark.parametrize(("greedy", "sampled"), [("eagle", "ngram"), ("suffix", "eagle-lookup"), ("eagle-lookup", "eagle")])
def test_a_head_and_another_drafter_in_one_batch(monkeypatch: pytest.MonkeyPatch, greedy: str, sampled: str) -> None:
    """Greedy requests by one, sampled ones by the other, more than there are places at once: each is what it is alone."""
    ways = [Way(name, "dyspec" if "eagle" in name else None) for name in (greedy, sampled)]
    fixed(monkeypatch, Choice(ways[0], 6, 2.0, 1.0, 2.0), Choice(ways[1], 5, 2.0, 1.0, 2.0))
    config = {"model": str(DATA / "heads" / "eagle"), "tree": "dyspec"}
    llm = LLM(PAIR[0], {"method": "auto", "model": config["model"]}, dtype="float64", max_num_seqs=3)
    sampling = [SamplingParams(temperature=i % 2, seed=i, max_tokens=16 + i, ignore_eos=True) for i in range(4)]
    together = [one.outputs[0] for one in llm.generate(PROMPTS, sampling)]
    for way, nodes, mine in zip(ways, (6, 5), (slice(0, 4, 2), slice(1, 4, 2)), strict=True):
        own = {"method": way.drafter, "num_speculative_tokens": nodes} | (config if way.tree else {})
        alone = LLM(PAIR[0], own, dtype="float64").generate(PROMPTS[mine], sampling[mine])
        for one, other in zip(alone, together[mine], strict=True):
            assert one.outputs[0].token_ids == other.token_ids
            drafted = [[record.num_draft_tokens for record in found.records] for found in (one.outputs[0], other)]
            assert drafted[0] == drafted[1]
            assert way.tree is None or sum(drafted[0]) > 0


def test_a_drafter_that_asks_another_costs_what_calibration_saw_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its steps draft with the model (2 seconds), half look up (1 second); a plain step takes 1."""
    curve = {"4": 3.0}
    measured = {
        "tokens_per_step": {"greedy": {"lm:dyspec": curve, "lm-lookup:dyspec": {"4": 3.3}, "ngram": curve}},
        "drafted_share": {"greedy": {"lm-lookup:dyspec": {"4": 0.5}}},
    }
    speculation = parse({"method": "auto"})
    assert speculation is not None

    monkeypatch.setattr(auto, "SIZES", (4,))
    monkeypatch.setattr(auto, "slowdown_of", lambda timed, plain: 1.1 if isinstance(timed.drafter, Full) else 2.0)
    build: Any = lambda way: NgramDrafter()  # noqa: E731
    chooser = auto.Chooser(TableTarget(random_law(2, 0), 2), speculation, True, build, measured, [1])
    slow = chooser._choose("greedy", build)
    assert (slow.way, slow.speedup) == (Way("ngram", None), pytest.approx(3.0 / 1.1))
    measured["tokens_per_step"]["greedy"]["lm-lookup:dyspec"] = {"4": 5.0}
    fast = chooser._choose("greedy", build)
    assert (fast.way, fast.slowdown, fast.speedup) == (
        Way("lm-lookup", "dyspec"),
        pytest.approx(1.55),
        pytest.approx(5.0 / 1.55),
    )


@pytest.mark.parametrize(
    ("head", "way"),
    [("ctc", Way("ctc-lookup", None)), ("fspad", Way("fspad-lookup", "opt")), ("medusa", Way("medusa-lookup", "opt"))],
)
def test_a_head_that_was_not_calibrated_is_timed(head: str, way: Way) -> None:
    speculation = parse({"method": "auto", "model": str(DATA / "heads" / head)})
    assert speculation is not None
    build: Any = lambda way: NgramDrafter()  # noqa: E731
    chooser = auto.Chooser(TableTarget(random_law(2, 0), 2), speculation, True, build, {}, [1])
    assert chooser._worth_timing("greedy") == [way]


@pytest.mark.timed
def test_slower_steps_are_slower_than_plain_ones() -> None:
    """A drafter that waits makes steps slower, by what it waits."""
    target = TableTarget(random_law(2, 0), 2, max_len=4000)
    plain = measure.Timed(target, None, None, 0, [1], SamplingParams(temperature=0), 2)

    class Slow(Full):
        def propose(self, work: Any) -> Any:
            sleep(0.01)
            return super().propose(work)

    slow = measure.Timed(target, Slow(), RULES["deterministic"].rule, 2, [1], SamplingParams(temperature=0), 2)
    assert measure.slowdown_of(slow, plain) > 2


@pytest.mark.timed
@pytest.mark.unchecked
def test_the_time_to_catch_up_is_that_of_the_prompt() -> None:
    class Behind(Full):
        def start(self, tokens: Any, *_: Any) -> list[int]:
            return [tokens[-1], len(tokens) - 1]

        def propose(self, work: Any) -> Any:
            sleep(0.002 * sum(state.pop() for state in work.states if len(state) > 1))
            return super().propose(work)

    params = SamplingParams(temperature=0).giving(RequestOutputKind.FINAL_ONLY)
    options = RULES["deterministic"].rule, 2, [1] * 11, params, 1
    seconds = catch_up_s(measure.Timed(TableTarget(random_law(2, 0), 2, max_len=4000), Behind(), *options))
    assert 0.0015 < seconds < 0.01


@pytest.mark.parametrize(("in_time", "timed"), [(0, 1), (1, 1), (3, 3), (100, 6)])
def test_no_candidate_is_timed_after_the_deadline(in_time: int, timed: int) -> None:
    """At least one is timed; those that were timed before the deadline are compared."""
    count = []

    def slowdown(candidate: Candidate) -> float:
        count.append(candidate)
        return 1.0

    ways = [Way("lm", "chain"), Way("lm", "opt")]
    chosen = auto.choose(
        ways, (2, 4, 8), lambda one: 1.0 + one.nodes, slowdown, fallback=True, in_time=lambda: len(count) < in_time
    )
    assert len(count) == timed
    assert chosen.nodes == max(one.nodes for one in count)


def test_a_line_announces_that_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[None] = []
    monkeypatch.setattr(auto, "announce", lambda: announced.append(None))
    monkeypatch.setattr(auto, "recalled", lambda kind, facts, measure, **more: measure())
    LLM(PAIR[0], {"model": str(PAIR[1])}, dtype="float64")
    assert len(announced) == 1


def test_a_lookup_that_was_not_calibrated_is_expected_to_find_little() -> None:
    for nodes, tokens in ((1, 1.2), (2, 1.3), (64, 1.4)):
        assert tokens_per_step(None, Candidate(Way("suffix", None), nodes)) == pytest.approx(tokens)
        assert tokens_per_step(None, Candidate(Way("lm", "chain"), nodes)) > tokens


@pytest.mark.parametrize(("speedup", "nodes"), [(MARGIN - 0.05, 0), (MARGIN + 0.05, 4)])
@pytest.mark.parametrize("drafter", ["ngram", "lm"])
def test_a_gain_within_the_margin_is_no_reason_to_draft(drafter: str, speedup: float, nodes: int) -> None:
    found = choose([Way(drafter, None)], [4], lambda one: speedup, lambda one: 1.0, fallback=True)
    assert (found.nodes, found.speedup) == (nodes, speedup)
    if nodes == 0:
        assert "within the error of this estimate" in found._replace(timed_on="today").reason


def test_a_slower_candidate_that_pays_is_chosen_before_a_faster_one_that_does_not() -> None:
    cost = {2: 1.25, 4: 3.0}  # the larger tree gains more, but loses much where its drafts are accepted a little less often
    tokens = {2: 1.5, 4: 3.66}
    found = choose([A], (2, 4), lambda one: tokens[one.nodes], lambda one: cost[one.nodes], fallback=True)
    assert (found.nodes, found.speedup) == (2, 1.2)
    assert choose([A], (2, 4), lambda one: tokens[one.nodes], lambda one: cost[one.nodes], fallback=False).nodes == 4


@pytest.mark.parametrize(("seconds", "nodes"), [((5.0, 5.0), 0), ((5.0, 1.01), 4), ((1.01, 5.0), 4)])
def test_the_choice_and_the_steps_follow_the_same_costs(
    seconds: tuple[float, float], nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the costs of the steps, drafting may not pay although it did in the timing of candidates. They are measured twice."""
    given = [Costs(((1.0, 1.0), (5.0, several)), ((0.0, 0.0, 0.0),), ((4.0, 2.5),)) for several in seconds]
    measured = chain(given, repeat(given[-1]))  # the first ones are for greedy requests
    monkeypatch.setattr(auto, "costs_of", lambda *_: next(measured))
    monkeypatch.setattr(auto, "recalled", lambda kind, facts, measure, **more: measure())
    llm = LLM(PAIR[0], {"model": str(PAIR[1])}, dtype="float64")
    greedy = SamplingParams(temperature=0, max_tokens=8)
    assert llm.drafting(greedy)["budget"] == nodes
    assert ("drafting: off" in llm.drafting(greedy)["reason"]) is (nodes == 0)
    assert (llm.generate(PROMPTS, greedy)[0].metrics.num_draft_tokens > 0) is (nodes > 0)


@pytest.mark.parametrize(("method", "level"), [("suffix", "WARNING"), ("auto", "INFO")])
def test_python_says_that_a_named_method_drafts_nothing(
    method: str, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "slowdown_of", lambda timed, plain: 2.0)
    monkeypatch.setattr(auto, "recalled", lambda kind, facts, measure, **more: measure())
    with caplog.at_level(logging.INFO, auto.CHOICES):
        llm = LLM(PAIR[0], {"method": method})
    assert {one.levelname for one in caplog.records} == {level}
    assert llm.drafting() == llm.drafting(SamplingParams())


def test_chains_and_the_best_trees_of_each_drafter_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "TRIED_TREES", 2)
    tokens = {
        Way("lm", "dyspec"): 3.0,
        Way("lm", "opt"): 2.8,
        Way("lm", "topk"): 2.7,
        Way("lm", "chain"): 2.5,
        Way("lm-lookup", "chain"): 3.5,
        Way("lm-lookup", "dyspec"): 3.6,
    }
    best = [Way("lm-lookup", "dyspec"), Way("lm-lookup", "chain"), Way("lm", "dyspec"), Way("lm", "opt"), Way("lm", "chain")]
    assert auto.best_ways(tokens) == best
