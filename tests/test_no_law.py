"""Where no token can follow: the output ends with an error, what is before stands, and its neighbours do not notice."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exact import decoded, enumerate_branches
from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.core.contracts import Budget
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw, lawful
from foredraft.core.tree import TreeBatch
from foredraft.models.table import TableTarget
from foredraft.rules import RULES
from test_decode import CASES, PROMPT, TARGET, assert_equal_laws, lm_drafter

DATA = Path(__file__).parent / "data"
MODEL, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
STORY = "Once upon a time"
INF, NAN = math.inf, math.nan

# --- The law of outputs that end with an error, every branch enumerated

LENGTH = 3
DEAD = {(1,), (0, 0), (0, 1, 1)}
"""Outputs after which nothing may follow; the last one is as long as an output can be."""


def forbid(dead: set[tuple[int, ...]], value: float) -> Any:
    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        output = (*committed_ids[len(PROMPT) :], *path_ids)
        return torch.full_like(logits, value) if output in dead else logits

    return process


def law_of(tree: str | None, options: dict[str, Any], rule: str, temperature: float, value: float) -> dict[Any, float]:
    law: dict[Any, float] = defaultdict(float)

    def run(draws: Any) -> tuple[Any, ...]:
        sampling, more = SamplingParams(temperature=temperature, max_tokens=LENGTH), {}
        if tree is not None:
            more = {"drafter": lm_drafter(tree, options), "rule": RULES[rule].rule, "budget": Budget(3, 3)}
        length, processors = len(PROMPT) + LENGTH, [forbid(DEAD, value)]
        one = decoded(TableTarget(TARGET, 2), PROMPT, sampling, draws, length, processors=processors, **more)
        assert (one.finish_reason == "error") == (one.error is not None)
        assert len(one.kinds) == len(one.output_ids) == sum(record.num_tokens for record in one.records)
        return (*one.output_ids, one.finish_reason)

    for prob, output, _ in enumerate_branches(run):
        law[output] += prob
    return law


def answer() -> dict[Any, float]:
    """The target's law up to the first place where nothing may follow."""
    law: dict[Any, float] = defaultdict(float)
    for tokens in product(range(2), repeat=LENGTH):
        prob = 1.0
        for i, token in enumerate(tokens):
            prob *= TARGET((*PROMPT, *tokens[:i]))[token]
        cut = next((i for i in range(LENGTH) if tokens[:i] in DEAD), None)
        law[(*tokens, "length") if cut is None else (*tokens[:cut], "error")] += prob
    return law


LOSSY = [("chain", {}, "tolerance"), ("chain", {}, "uno"), ("topk", {"topk": 2}, "typical")]


@pytest.mark.parametrize("value", [-INF, NAN])
@pytest.mark.parametrize(("tree", "options", "rule"), [(None, {}, ""), *CASES])
def test_law_of_outputs_that_end_with_an_error(tree: Any, options: dict[str, Any], rule: str, value: float) -> None:
    assert_equal_laws(law_of(tree, options, rule, 1.0, value), answer())


@pytest.mark.parametrize(("tree", "options", "rule"), [*CASES, *LOSSY])
def test_nothing_is_ever_emitted_behind_such_a_node(tree: Any, options: dict[str, Any], rule: str) -> None:
    """By lossy rules too; and at temperature 0 plain decoding has one answer, which all but the over-accepting rules give."""
    for output in law_of(tree, options, rule, 1.0, -INF):
        place = next((i for i in range(LENGTH) if output[:i] in DEAD), None)
        assert (output[-1], len(output) - 1) == (("length", LENGTH) if place is None else ("error", place))
    if rule not in ("tolerance", "uno"):
        assert law_of(tree, options, rule, 0.0, NAN) == law_of(None, {}, "", 0.0, NAN)


# --- The law itself


@pytest.mark.parametrize("row", [[-INF] * 4, [NAN] * 4, [0.0, 1.0, NAN, 0.0], [0.0, INF, 1.0, 0.0], [INF] * 4])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}, {"temperature": 2.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_rows_without_a_law_are_replaced(row: list[float], sampling: dict[str, Any], dtype: torch.dtype) -> None:
    good = [3.0, 1.0, -INF, 2.0]
    law = TargetLaw(torch.tensor([good, row, good], dtype=dtype), SamplingParams(**sampling))
    assert [law.failure(node) is None for node in range(3)] == [True, False, True]
    assert "NaN or infinity" in str(law.failure(1))
    rows = law.rows(range(3))
    assert torch.equal(rows[0], rows[2])
    assert all(float(one.sum()) == pytest.approx(1.0, abs=1e-3) for one in rows)
    assert float(rows[0][2]) == 0.0
    if law.is_certain:
        assert (law.token(0), law.token(2)) == (0, 0)


BROKEN = {"forbidden": [-INF] * 3, "nan": [0.0, NAN, -1.0], "negative nan": [1.0, -NAN, 0.0], "infinity": [0.0, INF, -INF]}
LIMITS = ({}, {"top_k": 1}, {"top_k": 2, "top_p": 0.5}, {"min_p": 0.4}, {"temperature": 1e-20}, {"temperature": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_rows_without_a_law_are_found_under_all_limits(dtype: torch.dtype, limits: dict[str, float]) -> None:
    """Compiled and plain, whatever the limits cut. The law that stands in sums to 1."""
    good = [0.0, -INF, -1.0]
    logits = torch.tensor([good, *BROKEN.values(), good], dtype=dtype)
    probs, is_empty = lawful(logits, SamplingParams(**{"temperature": 1.0, **limits}))
    assert is_empty == [False, True, True, True, True, False]
    assert torch.equal(probs[0], probs[-1]) and float(probs[0, 1]) == 0.0
    assert probs.sum(-1).tolist() == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_reason_names_what_forbids(temperature: float) -> None:
    from foredraft.core.processors import prefix_processors

    sampling = SamplingParams(temperature=temperature, allowed_token_ids=[1], min_tokens=3)
    processors = prefix_processors(sampling, 1, [1])
    tree = TreeBatch.chains([[0, 2]])[0]
    law = TargetLaw(torch.zeros(2, 4), sampling, tree, [0], processors)
    said = law.failure(0)
    assert said is not None and said.message == "every token is forbidden by allowed_token_ids and min_tokens"


# --- Requests

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"method": "ar"},
    "chain": {"method": "lm", "model": str(MODEL), "tree": "chain", "num_speculative_tokens": 5},
    "tree": {"method": "lm", "model": str(OTHER), "tree": "dyspec", "num_speculative_tokens": 8},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
methods = pytest.mark.parametrize("method", CONFIGS)
ANY = SamplingParams(max_tokens=8, ignore_eos=True, seed=4)


@cache
def model(method: str) -> LLM:
    return LLM(str(MODEL), CONFIGS[method], dtype="float64")


def everything() -> list[int]:
    return list(range(model("plain").target.vocab_size))


@cache
def contradictions() -> dict[str, SamplingParams]:
    return {
        "allowed and eos": replace(ANY, allowed_token_ids=[2], min_tokens=4, ignore_eos=False),
        "bias": replace(ANY, logit_bias=dict.fromkeys(everything(), -INF)),
        "allowed and bias": replace(ANY, allowed_token_ids=[7, 8], logit_bias={7: -INF, 8: -INF}),
        "stop tokens": replace(ANY, allowed_token_ids=[50, 51], stop_token_ids=[50, 51], min_tokens=2),
    }


@methods
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_contradictory_bans(method: str, temperature: float) -> None:
    llm = model(method)
    cases = {name: replace(one, temperature=temperature) for name, one in contradictions().items()}
    usual = replace(ANY, temperature=temperature)
    expected = llm.generate(STORY, usual)[0].outputs[0]
    results = llm.generate([STORY] * (len(cases) + 2), [usual, *cases.values(), usual])
    for name, result in zip(cases, results[1:-1], strict=True):
        [found] = result.outputs
        assert (found.finish_reason, found.stop_reason, found.token_ids, found.text) == ("error", None, [], ""), name
        assert found.error is not None and "every token is forbidden by" in found.error.message
        assert found.error.hint == "allow at least one token"
        assert result.finished and found.kinds == []
    for result in (results[0], results[-1]):
        [found] = result.outputs
        assert (found.token_ids, found.text, found.error) == (expected.token_ids, expected.text, None)
        assert found.finish_reason == "length"


@methods
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_in_the_middle_of_an_output(method: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits after one token of the text are NaN: what comes before it stands, in every batch."""
    llm, sampling = model(method), replace(ANY, temperature=temperature, max_tokens=12)
    whole = llm.generate(STORY, sampling)[0].outputs[0].token_ids
    bad = next(token for token in whole[4:] if token not in llm.tokenizer(STORY)["input_ids"])
    forward = llm.target.forward

    def poisoned(batch: TreeBatch, caches: Any, rows: Any = None, **more: Any) -> Any:
        scores = forward(batch, caches, rows, **more)
        first = more.get("start") or [0] * len(batch)
        ran = [i for b in range(len(batch)) for i in range(int(batch.offsets[b]) + first[b], int(batch.offsets[b + 1]))]
        places = [i for i, node in enumerate(ran if rows is None else rows.tolist()) if batch.tokens[node] == bad]
        logits = scores.logits.clone()
        logits[places] = NAN
        return scores._replace(logits=logits)

    monkeypatch.setattr(llm.target, "forward", poisoned)
    usual = replace(sampling, allowed_token_ids=[one for one in everything() if one != bad])
    first, second = (result.outputs[0] for result in llm.generate([STORY] * 2, [sampling, usual]))
    assert first.token_ids == whole[: whole.index(bad) + 1]
    assert first.finish_reason == "error" and "NaN or infinity" in str(first.error)
    assert (second.finish_reason, len(second.token_ids)) == ("length", 12)
    assert first.records[-1].kind == "error"
    assert first.metrics.num_accepted_tokens == first.kinds.count("accepted")


def test_outputs_of_one_request_end_each_by_itself() -> None:
    """With n outputs, and in a stream; afterwards every slot is free."""
    llm = model("tree")
    outputs = list(llm.stream(STORY, replace(contradictions()["bias"], n=3)))[-1]
    assert outputs.finished
    assert [one.finish_reason for one in outputs.outputs] == ["error"] * 3
    assert len(llm.generate([STORY] * 8, ANY)) == 8


def test_an_unheard_of_token_of_a_drafter_only_drafts_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(MODEL), CONFIGS["tree"], dtype="float64")
    drafter: Any = llm.engine.drafter
    expand = drafter.expand
    monkeypatch.setattr(drafter, "expand", lambda *given: torch.full_like(expand(*given), NAN))
    greedy = replace(ANY, temperature=0.0)
    assert llm.generate(STORY, greedy)[0].outputs[0].token_ids == model("plain").generate(STORY, greedy)[0].outputs[0].token_ids
    assert llm.generate(STORY, ANY)[0].outputs[0].finish_reason == "length"


# --- The command line


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize("method", ["ar", "suffix"])
def test_the_command_line_says_why(
    temperature: str, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    banned = SamplingParams(allowed_token_ids=[2], min_tokens=4)
    monkeypatch.setattr(LLM, "default_params_for", lambda self, prompt, given, **more: replace(banned, **given))
    monkeypatch.setattr(sys, "stdin", StringIO(""))
    given = ["generate", STORY, "--model", str(MODEL), "--method", method, "--temperature", temperature, "--budget", "4"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*given[: 8 if method == "ar" else None], *more])
        out, err = capsys.readouterr()
        assert ended.value.code == 1
        assert "error: no token can follow" in err and "hint: " in err and "Traceback" not in err
        if more:
            found = json.loads(out)
            assert (found["finish_reason"], found["text"]) == ("error", "")
            assert "allowed_token_ids and min_tokens" in found["error"]
        else:
            assert out == "\n"


def test_json_has_no_error_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", STORY, "--model", str(MODEL), "--method", "ar", "--max-tokens", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["error"] is None


def test_figures_are_not_made_of_outputs_with_an_error() -> None:
    from foredraft.bench.run import Ours

    with pytest.raises(ValueError, match="every token is forbidden"):
        Ours("ar", model("plain"), ANY).run([[5, 6]], [contradictions()["bias"]])


def test_draws_stay_addressed() -> None:
    """A law that stands in is drawn from like any other: nothing else of the step moves."""
    assert Draws(0).categorical(lawful(torch.full((1, 3), NAN), SamplingParams()).probs[0], ("next", (), 0)) in range(3)
