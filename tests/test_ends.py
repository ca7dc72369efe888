"""An output that ends inside an accepted path: every figure counts what reached the output and nothing else. In float64."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM, CompletionOutput, SamplingParams
from foredraft.core.metrics import StepRecord, summarize

DATA = Path(__file__).parent / "data"
TARGET, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
STORY = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"method": "ar"},
    "all accepted": {"method": "lm", "model": str(TARGET), "tree": "chain", "num_speculative_tokens": 7},
    "tree": {"method": "lm", "model": str(OTHER), "tree": "dyspec", "num_speculative_tokens": 8},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
    "lossy": {
        "method": "lm",
        "model": str(OTHER),
        "tree": "chain",
        "num_speculative_tokens": 6,
        "rule": "tolerance",
        "epsilon": 0.5,
    },
}
methods = pytest.mark.parametrize("method", CONFIGS)


@cache
def model(method: str) -> LLM:
    return LLM(str(TARGET), CONFIGS[method], dtype="float64")


def run(method: str, sampling: list[SamplingParams], prompt: Any = STORY) -> list[CompletionOutput]:
    return [result.outputs[0] for result in model(method).generate([prompt] * len(sampling), sampling)]


@cache
def whole(method: str, temperature: float = 0.0) -> CompletionOutput:
    return run(method, [replace(GREEDY, temperature=temperature, seed=3)])[0]


def assert_counts_its_output(found: CompletionOutput) -> None:
    """Steps add up to the tokens, the kinds and the bounds of the output."""
    count, metrics = len(found.token_ids), found.metrics
    assert sum(one.num_tokens for one in found.records) == len(found.kinds) == count
    assert metrics.num_steps == len(found.records)
    assert metrics.num_accepted_tokens == found.kinds.count("accepted")
    ended_early = found.records[-1].kind in ("accepted", "error")
    assert metrics.num_steps + metrics.num_accepted_tokens == count + ended_early
    assert metrics.acceptance_length == pytest.approx(count / metrics.num_steps)
    if not ended_early:
        assert metrics.acceptance_length == pytest.approx(1 + metrics.num_accepted_tokens / metrics.num_steps)
    if metrics.num_draft_tokens:
        assert metrics.acceptance_rate == metrics.num_accepted_tokens / metrics.num_draft_tokens
    assert sum(metrics.joint_acceptance_rate) * metrics.num_steps == pytest.approx(metrics.num_accepted_tokens)
    assert all(one.num_accepted_tokens <= one.depth for one in found.records)
    assert all(len(one.tv_bounds) in (0, one.num_tokens) for one in found.records)
    assert len(found.last_path) == found.records[-1].num_accepted_tokens
    place = 0
    for one in found.records:
        assert found.kinds[place : place + one.num_accepted_tokens] == ["accepted"] * one.num_accepted_tokens
        place += one.num_tokens
        assert one.kind == "error" or found.kinds[place - 1] == one.kind


@methods
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_end_anywhere(method: str, temperature: float) -> None:
    """At stop tokens, at stop strings and at the length, wherever that lies in a path."""
    full = whole(method, temperature)
    assert_counts_its_output(full)
    base = replace(GREEDY, temperature=temperature, seed=3)
    ends = [replace(base, stop_token_ids=[token]) for token in full.token_ids[3:20:6]]
    ends += [replace(base, stop=full.text[at : at + 2]) for at in range(5, 30, 8)]
    ends += [replace(base, max_tokens=count) for count in (1, 10)]
    for found in run(method, ends):
        assert_counts_its_output(found)
        if temperature == 0 or found.finish_reason == "stop":  # near the length, trees and so draws are others
            assert found.token_ids == full.token_ids[: len(found.token_ids)]


def test_a_cut_step_by_hand() -> None:
    """Seven drafts a step and all accepted: 8 tokens a step, and of the third step only 3 drafts before the stop."""
    full = whole("all accepted")
    at = next(n for n in range(16, 23) if full.token_ids[n] not in full.token_ids[:n])  # steps end behind 8, 16 and 24 tokens
    [found] = run("all accepted", [replace(GREEDY, stop_token_ids=[full.token_ids[at]])])
    kept = at + 1 - 16
    assert [one.num_accepted_tokens for one in found.records] == [7, 7, kept]
    assert [one.depth for one in found.records] == [7, 7, kept]
    assert [one.num_draft_tokens for one in found.records] == [7, 7, 7]  # they were all drafted and verified
    assert [one.kind for one in found.records] == ["bonus", "bonus", "accepted"]
    metrics = found.metrics
    assert metrics.acceptance_length == pytest.approx((16 + kept) / 3)
    assert metrics.acceptance_rate == pytest.approx((14 + kept) / 21)
    assert metrics.joint_acceptance_rate == pytest.approx([1.0] * kept + [2 / 3] * (7 - kept))
    assert metrics.conditional_acceptance_rate == [1.0] * 7  # nothing was rejected


def test_an_end_of_sequence_inside_a_path(tmp_path: Path) -> None:
    import shutil

    full = whole("all accepted")
    directory = tmp_path / "model"
    shutil.copytree(TARGET, directory)
    end = full.token_ids[12]
    first = full.token_ids.index(end)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end], "temperature": 0.0}))
    llm = LLM(str(directory), CONFIGS["all accepted"], dtype="float64")
    [found] = llm.generate(STORY)[0].outputs
    assert len(found.token_ids) == first + 1
    assert_counts_its_output(found)
    assert found.records[-1].kind == ("accepted" if (first + 1) % 8 else "bonus")


def test_bounds_of_a_lossy_rule_are_those_of_the_output() -> None:
    full = whole("lossy", 1.0)
    at = next(n for n in range(4, 30) if full.kinds[n] == "accepted" and full.token_ids[n] not in full.token_ids[:n])
    sampling = replace(GREEDY, temperature=1.0, seed=3, stop_token_ids=[full.token_ids[at]])
    [found] = run("lossy", [sampling])
    assert found.records[-1].kind == "accepted"
    bounds = [bound for one in full.records for bound in (one.tv_bounds or [0.0] * one.num_tokens)][: at + 1]
    assert found.metrics.tv_bound_mean == pytest.approx(sum(bounds) / (at + 1))
    assert found.metrics.tv_bound_max == pytest.approx(max(bounds))
    assert found.metrics.num_saved_rejections == pytest.approx(sum(bounds))


def test_outputs_of_a_batch_and_of_n_add_up() -> None:
    sampling = replace(GREEDY, temperature=1.0, seed=1, n=3, stop=["e", "th"])
    for result in model("tree").generate([STORY, "Tom and"], sampling):
        for one in result.outputs:
            assert_counts_its_output(one)
        tokens = sum(len(one.token_ids) for one in result.outputs)
        assert result.metrics.acceptance_length == pytest.approx(tokens / result.metrics.num_steps)


def test_a_stream_counts_like_the_whole() -> None:
    stop = whole("all accepted").text[20:23]
    for output in model("all accepted").stream(STORY, replace(GREEDY, stop=stop)):
        assert_counts_its_output(output.outputs[0])


@pytest.mark.parametrize("kind", ["accepted", "error"])
def test_steps_that_ended_early_by_hand(kind: str) -> None:
    result = summarize([StepRecord(4, 2, 4, "recovered"), StepRecord(4, 2, 2, kind)])
    assert result.acceptance_length == pytest.approx(5 / 2)
    assert result.joint_acceptance_rate == [1.0, 1.0, 0.0, 0.0]
    assert result.conditional_acceptance_rate == [1.0, 1.0, 0.0, 0.0]
    assert summarize([StepRecord(0, 0, 0, "error")]).acceptance_length == 0.0


def test_a_benchmark_counts_the_same_tokens() -> None:
    from foredraft.bench.report import rows_of
    from foredraft.bench.run import Ours
    from foredraft.plan.speculation import PLAIN

    full, prompt = whole("all accepted"), list(model("plain").tokenizer(STORY)["input_ids"])
    sampling = replace(GREEDY, stop_token_ids=[full.token_ids[11]])
    contenders = [Ours(PLAIN, model("plain"), sampling), Ours("lm", model("all accepted"), sampling)]
    rounds = [{one.name: one.run([prompt], [sampling]) for one in contenders}]
    for row in rows_of(contenders, rounds, 0.0):
        assert row["acceptance_length"] == pytest.approx(row["num_tokens"] / row["num_steps"], abs=1e-4)
