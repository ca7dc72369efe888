"""Careless and hostile requests: every number has a range, every wrong type a message. By `LLM` and the command line."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.errors import shown, whole_number
from foredraft.params import MAX_BIAS, MAX_COUNT, MAX_N, MAX_SEED, check_seed, used_seed

DATA = Path(__file__).parent / "data"
MODEL = str(DATA / "babyllama-105")
STORY = "Once upon a time"
PLAIN = ["generate", STORY, "--model", MODEL, "--method", "ar", "--max-tokens", "4"]
HUGE = 10**400

pytestmark = pytest.mark.unchecked  # wrong types must reach our own checks, not those of the annotations

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return call


@cache
def llm(method: str = "ar") -> LLM:
    return LLM(MODEL, {"method": method} | ({} if method == "ar" else {"num_speculative_tokens": 4}), dtype="float64")


# --- Numbers

TOO_LARGE = {
    "temperature": [HUGE, -HUGE, 10**309],
    "top_p": [HUGE, math.nan],
    "top_k": [2**64 + 1, 2**63, 2**31, HUGE, -(2**70)],
    "min_p": [HUGE],
    "repetition_penalty": [HUGE, 1e300, 1e-300],
    "presence_penalty": [HUGE, -HUGE],
    "frequency_penalty": [HUGE],
    "max_tokens": [10**30, 2**31, HUGE],
    "min_tokens": [10**30, HUGE],
    "n": [10**8, 2**64, MAX_N + 1],
    "logprobs": [2**64, HUGE],
    "prompt_logprobs": [2**64, -2],
    "seed": [MAX_SEED + 1, -2, -(2**63), HUGE],
    "logit_bias": [{1: HUGE}, {1: -HUGE}, {1: 1e31}, {1: -1e300}],
}


def each(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={shown(value)}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), each(TOO_LARGE))
def test_numbers_out_of_range_are_refused_with_the_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    said = str(caught.value)
    assert said.startswith(f"{name} must be") and re.search(r"\d", said.split(", got ")[0])
    assert len(said) < 400


FINE = {
    "temperature": [np.float32(0.5), np.float64(1), np.int64(1), torch.tensor(0.5), Fraction(1, 2), 1e308],
    "top_p": [np.float32(0.5), torch.tensor(1)],
    "top_k": [np.int64(5), np.uint8(5), torch.tensor(5), np.array(5), MAX_COUNT],
    "max_tokens": [np.int32(3), torch.tensor(3)],
    "min_tokens": [np.int16(0)],
    "n": [np.int64(2), MAX_N],
    "logprobs": [np.int64(2)],
    "seed": [np.uint64(MAX_SEED), MAX_SEED, 0, np.int64(-1)],
    "ignore_eos": [np.bool_(True)],
    "repetition_penalty": [np.float16(1.5), MAX_BIAS, 1e-30],
}


@pytest.mark.parametrize(("name", "value"), each(FINE))
def test_numbers_of_numpy_and_torch_are_taken(name: str, value: Any) -> None:
    found = getattr(SamplingParams(**{name: value}), name)
    assert type(found) in (int, float, bool)
    assert found == (value if isinstance(value, Fraction | int | float) else value.item())


@pytest.mark.parametrize("ids", [np.array([5, 6]), torch.tensor([5, 6]), {5, 6}, [np.int64(5), 6], (5, 6), range(5, 7)])
@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_of_every_kind(name: str, ids: Any) -> None:
    sampling = SamplingParams(**{name: ids}, max_tokens=2, seed=0)
    assert sorted(getattr(sampling, name)) == [5, 6]
    assert {type(one) for one in getattr(sampling, name)} == {int}
    assert llm().generate(STORY, sampling)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", np.array([0.5, 1.0])),
        ("temperature", 1j),
        ("top_k", np.float64(3)),
        ("n", np.bool_(True)),
        ("seed", 1.0),
        ("seed", "x"),
        ("seed", b"1"),
        ("ignore_eos", "no"),
        ("skip_special_tokens", 1),
        ("include_stop_str_in_output", "yes"),
        ("logit_bias", {1: np.bool_(True)}),
        ("stop_token_ids", [b"a"]),
    ],
)
def test_other_types_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--top-k", 2**64 + 1, "top_k must be a whole number: 1 or above, or 0 (or -1) to keep all tokens, at most 2147483647"),
        ("--max-tokens", 10**30, "max_tokens must be a whole number, at least 1"),
        ("--temperature", "1e309", "temperature must be 0 (greedy) or above, at most 1e308, got inf"),
        ("--top-p", "nan", "top_p must be above 0 and at most 1, got nan"),
        ("--min-p", "inf", "min_p must be between 0 and 1, got inf"),
        (
            "--seed",
            -2,
            "seed must be a whole number between 0 and 2**64 - 1 (18446744073709551615), or -1 for a random",
        ),
        ("--seed", 2**64, "seed must be a whole number between 0 and 2**64 - 1"),
        ("--budget", 10**30, "num_speculative_tokens (--budget) must be between 1 and 1024"),
    ],
)
def test_numbers_on_the_command_line(run: Run, option: str, value: Any, said: str) -> None:
    arguments = PLAIN if option != "--budget" else [*PLAIN[:4], "--method", "suffix"]
    code, out, err = run(*arguments, option, value)
    assert (code, out) == (1, "")
    assert f"error: {said}" in err and "hint: " in err


def test_shown_is_short() -> None:
    assert shown(10**5000).startswith("10**") and shown(-(10**5000)).startswith("-10**")
    assert len(shown("x" * 10**6)) < 300
    assert (shown(12), shown("a"), shown([1])) == ("12", "'a'", "[1]")


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers(value: Any) -> None:
    assert whole_number("count", value, 1, 3) == 3
    with pytest.raises(ValueError, match=r"count must be between 4 and 5, got 3"):
        whole_number("count", value, 4, 5, "not said")
    with pytest.raises(ValueError, match=r"count must be between 1 and 2 \(a reason\), got 3"):
        whole_number("count", value, 1, 2, "a reason")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.bool_(True), np.array([1, 2])])
def test_no_whole_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="count must be a whole number between 0 and 9, got"):
        whole_number("count", value, 0, 9)


# --- Seeds

RANDOM = SamplingParams(seed=-1, temperature=1.0, max_tokens=12, ignore_eos=True, n=2)


@pytest.mark.parametrize("method", ["ar", "suffix"])
def test_a_random_seed_is_told_and_repeats_the_run(method: str) -> None:
    from dataclasses import replace

    results = llm(method).generate([STORY] * 4, RANDOM)
    seeds = [one.seed for one in results]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**53 for seed in seeds)
    again = llm(method).generate([STORY] * 4, [replace(RANDOM, seed=seed) for seed in seeds])
    assert [one.seed for one in again] == seeds
    for first, second in zip(results, again, strict=True):
        assert [out.token_ids for out in first.outputs] == [out.token_ids for out in second.outputs]


def test_every_output_names_its_seed() -> None:
    from dataclasses import replace

    without = LLM(MODEL, {"method": "ar"}, seed=3).generate([STORY] * 2, replace(RANDOM, seed=None))
    assert len({one.seed for one in without}) == 2
    for one in without:
        [again] = llm().generate(STORY, replace(RANDOM, seed=one.seed))
        assert len(again.outputs[0].token_ids) == 12 and again.seed == one.seed
    [given] = llm().generate(STORY, replace(RANDOM, seed=7))
    assert given.seed == 7


def test_the_model_takes_a_random_seed_too() -> None:
    from dataclasses import replace

    free = replace(RANDOM, seed=None)
    first, second = (LLM(MODEL, {"method": "ar"}, seed=-1) for _ in range(2))
    assert first.seed != second.seed
    found = first.generate(STORY, free)[0].outputs[0].token_ids
    assert LLM(MODEL, {"method": "ar"}, seed=first.seed).generate(STORY, free)[0].outputs[0].token_ids == found
    assert first.with_speculation({"method": "suffix"}).seed == first.seed


@pytest.mark.parametrize(
    ("seed", "kind"), [("x", TypeError), (1.5, TypeError), (True, TypeError), (-2, ValueError), (2**64, ValueError)]
)
def test_wrong_seeds_of_a_model(seed: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="seed must be a whole number between 0 and 2"):
        LLM(MODEL, {"method": "ar"}, seed=seed)


def test_a_random_seed_on_the_command_line(run: Run) -> None:
    given = [*PLAIN, "--temperature", 1, "--json"]
    code, out, _ = run(*given, "--seed", -1)
    found = json.loads(out)
    assert code == 0 and found["seed"] >= 0
    assert json.loads(run(*given, "--seed", found["seed"])[1])["token_ids"] == found["token_ids"]
    code, out, err = run(*PLAIN, "--temperature", 1, "--seed", -1)
    seed = re.search(r", seed (\d+)", err)
    assert code == 0 and seed is not None
    assert run(*PLAIN, "--temperature", 1, "--seed", seed[1])[1] == out
    assert "seed" not in run(*PLAIN, "--seed", 3)[2]


def test_used_and_checked_seeds() -> None:
    assert used_seed(5) == 5
    assert check_seed(np.int64(-1)) == -1
    assert len({used_seed(-1) for _ in range(50)}) == 50
