"""Sizes that no machine could meet are refused before anything is allocated, with the limit and its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Run
from foredraft import LLM
from foredraft.theory import limits
from foredraft.theory.chains import iid_pair

DATA = Path(__file__).parent / "data"
MODEL, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
LAWS = ["--p", "0.5,0.5", "--q", "0.8,0.2"]

pytestmark = pytest.mark.unchecked


def refused(run: Run, *arguments: Any) -> str:
    code, out, err = run(*arguments)
    assert (code, out) == (1, ""), err
    assert "hint: " in err
    return err


# --- Theory


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["rejections", *LAWS, "--horizon", 10**8],
            "--horizon must be between 1 and 100000 (each token is a pass over the chains)",
        ),
        (["rejections", *LAWS, "--horizon", 0], "horizon must be at least 1 token, got 0"),
        (["batch", *LAWS, "--horizon", 10**8], "--horizon must be between 1 and 100000"),
        (["batch", *LAWS, "--horizon", 10**8, "--drafts", 10**9], "--horizon must be between 1 and 100000"),
        (["batch", *LAWS, "--drafts", 10**9], "the number of drafts M must be between 1 and 1024"),
        (["batch", *LAWS, "--horizon", 100000, "--drafts", 1000], ", and the limit is 1e+10, a few minutes\nhint: Take"),
        (["rejections", *LAWS, "--drafts", 10**30], "the number of drafts M must be between 1 and 1024"),
        (["rejections", *LAWS, "--drafts", "2.5"], "--drafts must be a whole number or inf"),
        (["rejections", *LAWS, "--lookahead", 10**12], "--lookahead must be between 1 and 100000"),
        (["rejections", *LAWS, "--simulate", 10**9], "--simulate must be between 2 and 16777216"),
        (["rejections", *LAWS, "--simulate", 10**7, "--horizon", 10**4], "simulated runs of 10000 tokens"),
        (["rejections", *LAWS, "--simulate", -5], "--simulate must be between 2"),
        (["rejections", "--states", 10**6], "vocabulary too large"),
        (["rejections", "--states", 3000, "--horizon", 1000], "vocabulary too large"),
        (["rejections", "--states", 3, "--seed", -2], "--seed must be a whole number between 0"),
        (["batch", "--states", 3, "--seed", 2**64], "--seed must be a whole number between 0"),
        (["speedup", "--acceptance", "0.8", "--longest", 10**8], "--longest must be between 1 and 256"),
        (["speedup", "--acceptance", "0.8", "--draft-cost", "nan"], "--draft-cost must be a finite number, 0 or more, got nan"),
        (["speedup", "--acceptance", "0.8", "--verify-cost", "inf"], "--verify-cost must be a finite number"),
        (["speedup", "--acceptance", "0.8", "--verify-cost", "1:1,8:-3"], "--verify-cost must be a finite number"),
        (["speedup", "--acceptance", "nan"], "acceptance must be between 0 and 1"),
        (["tradeoff", *LAWS, "--epsilon", "nan"], "epsilon"),
    ],
)
def test_theory(run: Run, arguments: list[Any], said: str) -> None:
    assert said in refused(run, "theory", *arguments)


@pytest.mark.parametrize("command", ["predict", "estimate"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-tokens", 2**40], "max_tokens must be a whole number"),
        (["--repeats", 10**9], "repeats must be between 1 and 10000"),
        (["--seed", -2], "--seed must be a whole number between 0"),
        (["--temperature", "nan"], "laws need a temperature above 0"),
    ],
)
def test_theory_on_models(run: Run, command: str, arguments: list[Any], said: str, tmp_path: Path) -> None:
    more = ["--output", tmp_path / "laws.json"] if command == "estimate" else []
    given = ["--prompts", DATA / "prompts.jsonl", "--model", MODEL, "--drafter", OTHER, "--raw", *more]
    assert said in refused(run, "theory", command, *given, *arguments)


@pytest.mark.parametrize(
    ("drafts", "lookahead", "said"),
    [("1,inf", 1, "--drafts must be whole numbers"), ("2.5", 1, "--drafts must be whole numbers"), ("1000", 100, "1 and 1024")],
)
def test_numbers_of_drafts_on_models(run: Run, drafts: str, lookahead: int, said: str) -> None:
    given = ["--prompts", DATA / "prompts.jsonl", "--model", MODEL, "--drafter", OTHER, "--raw"]
    assert said in refused(run, "theory", "predict", *given, "--drafts", drafts, "--lookahead", lookahead)


def test_a_random_seed_of_random_chains_is_told(run: Run) -> None:
    given = ["theory", "rejections", "--states", 3, "--horizon", 4, "--simulate", 10, "--json"]
    found = json.loads(run(*given, "--seed", -1)[1])
    again = json.loads(run(*given, "--seed", found.pop("seed"))[1])
    assert again == found
    batch = ["theory", "batch", "--states", 3, "--horizon", 4, "--json"]
    found = json.loads(run(*batch, "--seed", -1)[1])
    assert json.loads(run(*batch, "--seed", found.pop("seed"))[1]) == found


@pytest.mark.parametrize(
    "text", ["{}", '{"draft": [], "target": []}', '{"draft": 3, "target": 4}', '{"draft": "ab", "target": "c"}']
)
def test_laws_in_a_file(run: Run, text: str, tmp_path: Path) -> None:
    file = tmp_path / "laws.json"
    file.write_text(text)
    assert "error: " in refused(run, "theory", "batch", "--laws", file)


def test_what_is_allowed_is_computed(run: Run) -> None:
    code, out, _ = run("theory", "batch", *LAWS, "--horizon", 2000, "--drafts", 3, "--json")
    assert code == 0 and json.loads(out)["horizon"] == 2000
    limits.check_work(iid_pair([0.5, 0.5], [0.8, 0.2]), 1000, 1000)
    limits.check_drafts(float("inf"))
    limits.check_drafts(3)


# --- Models


@pytest.mark.parametrize("count", [10**6, 2**64, 4097, np.int64(10**6)])
def test_outputs_at_once(count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is read."""
    monkeypatch.setattr("foredraft.models.parts.load_target", lambda *given, **more: pytest.fail("it was loaded"))
    with pytest.raises(
        ValueError, match=r"max_num_seqs must be between 1 and 4096 \(more prompts wait for their turn\), got \d"
    ):
        LLM(MODEL, {"method": "ar"}, max_num_seqs=count)


@pytest.mark.parametrize("given", [{"max_num_seqs": np.int64(2)}, {"max_model_len": torch.tensor(64)}, {"max_num_seqs": 4096}])
def test_counts_of_numpy_and_torch(given: dict[str, Any]) -> None:
    llm = LLM(MODEL, {"method": "ar"}, **given)
    [(name, value)] = given.items()
    assert type(getattr(llm, name)) is int and getattr(llm, name) == int(value)


@pytest.mark.parametrize(
    ("value", "said"),
    [(10**30, "between 1 and 2147483647"), (0, "at least 1"), ("8", "a whole number"), (8.0, "a whole number")],
)
def test_context(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"max_model_len must be .*{said}"):
        LLM(MODEL, {"method": "ar"}, max_model_len=value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--methods", "suffix", "--batch-size", 10**6], "--batch-size must be between 1 and 4096"),
        (["bench", "--methods", "suffix", "--max-tokens", 2**40], "max_tokens must be a whole number"),
        (["bench", "--methods", "suffix", "--seed", -2], "must be a whole number between 0 and 2**64 - 1"),
        (
            ["bench", "--methods", "suffix:::deterministic:suffix_decoding_max_tree_depth=1000"],
            "must be between 1 and 64, got 1000",
        ),
        (["audit", "--method", "suffix", "--samples", 10**7], "--samples must be between 1 and 4096"),
        (["audit", "--method", "suffix", "--seed", -2], "seed must be a whole number between 0"),
        (["audit", "--method", "suffix", "--budget", 10**9], "must be between 1 and 1024"),
    ],
)
def test_other_commands(run: Run, arguments: list[Any], said: str) -> None:
    assert said in refused(run, *arguments, "--prompts", DATA / "prompts.jsonl", "--model", MODEL)


def test_training_needs_a_seed_that_can_be_given_again(run: Run, tmp_path: Path) -> None:
    given = ["train", "--method", "medusa", "--model", MODEL, "--data", DATA / "prompts.jsonl", "--out", tmp_path / "head"]
    for seed in (-1, -2, 2**64):
        assert "--seed must be between 0 and 9223372036854775807" in refused(run, *given, "--seed", seed)
