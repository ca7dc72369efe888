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
from foredraft.core.errors import shown, whole_number
from foredraft.core.params import MAX_BIAS, MAX_COUNT, MAX_N, MAX_SEED, check_seed, used_seed
from foredraft.core.treatment import remote_code
from foredraft.kernels.laws import likeliest_of_mass
from foredraft.plan.config import parse

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
        ("--temperature", "1e309", "temperature must be 0 (greedy) or above, at most 1e+308, got inf"),
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


# --- Prompts


@pytest.mark.parametrize(
    ("prompt", "kind", "said"),
    [
        ({"prompt_token_ids": "abc"}, TypeError, "prompt_token_ids must be a list of token ids (whole numbers), got 'abc'"),
        ({"prompt_token_ids": 5}, TypeError, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [1, "2"]}, TypeError, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": b"abc"}, TypeError, "prompt_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [1], "prompt": 3}, TypeError, "'prompt' must be a str if prompt_token_ids is given, got 3"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, TypeError, "a prompt cannot have 'multi_modal_data' (only text"),
        ({"prompt": "a", "mm_processor_kwargs": {}}, TypeError, "a prompt cannot have 'mm_processor_kwargs' (only text"),
        (
            {"prompt": "a", "prompts": "b"},
            TypeError,
            "a prompt cannot have 'prompts' (unknown key). Allowed keys: prompt, prom",
        ),
        ({"prompts": "a"}, TypeError, "a prompt is a str, a list of token ids"),
        ({"role": "user", "content": "a"}, TypeError, "a prompt is a str, a list of token ids"),
        ({}, TypeError, "a prompt is a str, a list of token ids"),
        ({"prompt": None}, TypeError, "a prompt is a str, a list of token ids"),
        ({"prompt": 5}, TypeError, "a prompt is a str, a list of token ids"),
        ({"prompt": ""}, ValueError, "the prompt is empty"),
        ("", ValueError, "the prompt is empty"),
        ([[]], ValueError, "the prompt is empty"),
        (3, TypeError, "a prompt is a str, a list of token ids (whole numbers) or {'prompt_token_ids': [...]}, got 3"),
        (None, TypeError, "a prompt is a str"),
        (b"abc", TypeError, "a prompt is a str"),
        (bytearray(b"abc"), TypeError, "a prompt is a str"),
        ([None], TypeError, "a prompt is a str"),
        ([True], TypeError, "a prompt is a str"),
        ([1, "a"], TypeError, "a prompt is a str"),
        (["a", 1], TypeError, "a prompt is a str"),
        ([1.5], TypeError, "a prompt is a str"),
        ({"a"}, TypeError, "a prompt is a str"),
        (np.array([1, 2]), TypeError, "Convert an array or a tensor with .tolist()"),
        (["x"] * 3 + [object()] * 10**5, TypeError, "a prompt is a str"),
        ("a\ud800b", ValueError, "the prompt is not valid text: character 2 is the lone surrogate U+D800"),
        ({"prompt": "\udce9"}, ValueError, "the prompt is not valid text: character 1 is the lone surrogate U+DCE9"),
        ([10**30], ValueError, "token id 1000000000000000000000000000000 in the prompt is outside the vocabulary"),
        ([-1], ValueError, "token id -1 in the prompt is outside the vocabulary"),
    ],
)
def test_prompts_of_wrong_kinds(prompt: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        llm().generate(prompt, SamplingParams(max_tokens=1))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt_token_ids": [5, 6]},
        {"prompt_token_ids": [5, 6], "prompt": "shown", "multi_modal_data": None},
        {"prompt_token_ids": (5, 6), "prompt": None},
        [np.int64(5), np.int64(6)],
        (5, 6),
        range(5, 7),
    ],
)
def test_prompts_of_right_kinds(prompt: Any) -> None:
    [found] = llm().generate(prompt, SamplingParams(max_tokens=1))
    assert found.prompt_token_ids == [5, 6]


@pytest.mark.parametrize("given", [{"temperature": 0}, 3, "greedy", [SamplingParams(), None]])
def test_sampling_params_of_wrong_kinds(given: Any) -> None:
    with pytest.raises(TypeError, match="sampling_params must be a SamplingParams or a list of them, got"):
        llm().generate([STORY, STORY], given)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_surrogates_in_other_texts(name: str) -> None:
    given: dict[str, Any] = {name: ["ok", "ab\udfff"]}
    with pytest.raises(ValueError, match=f"{name} is not valid text: character 3"):
        SamplingParams(**given)


def test_surrogates_on_the_command_line(run: Run) -> None:
    for given in (["generate", "caf\udce9"], ["generate", "caf\udce9", "--chat"], ["generate", "-"]):
        code, out, err = run(*given, "--model", MODEL, stdin="caf\udce9")
        assert (code, out) == (1, "")
        assert "error: the prompt is not valid text: character 4 is the lone surrogate U+DCE9" in err
        assert "hint: Give the text in UTF-8; on the command line, set a UTF-8 locale" in err
    code, _, err = run(*PLAIN, "--stop", "\udce9")
    assert code == 1 and "error: stop is not valid text" in err
    code, _, err = run("chat", "--system", "\udce9", "--method", "ar")
    assert code == 1 and "error: --system is not valid text" in err
    code, _, err = run("chat", "--method", "ar", "--max-tokens", 2, "--temperature", 0, stdin="caf\udce9\n/exit\n")
    assert code == 0 and "error: the question is not valid text" in err


# --- What advice names can be done where it is read


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    import shutil

    directory = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(MODEL, directory)
    for file in directory.glob("*token*"):
        file.unlink()
    return str(directory)


def test_a_model_without_a_tokenizer(run: Run, without_tokenizer: str) -> None:
    given = ["generate", STORY, "--model", without_tokenizer, "--method", "ar"]
    code, _, err = run(*given)
    assert code == 1 and "error: this model has no tokenizer\n" in err
    assert "hint: copy its files (tokenizer.json, tokenizer_config.json) into the model's directory" in err
    with pytest.raises(ValueError, match=r"bad_words need a tokenizer, and this model has none\. Copy its tokenizer files"):
        LLM(without_tokenizer, {"method": "ar"}).generate([5], SamplingParams(bad_words=["a"]))


def test_a_prompt_that_is_too_long(run: Run) -> None:
    """The command line has no option for the context, so that none is advised."""
    code, _, err = run("generate", "-", "--model", MODEL, "--method", "ar", stdin="a " * 3000)
    assert code == 1 and "hint: shorten the prompt\n" in err
    short = LLM(MODEL, {"method": "ar"}, max_model_len=8)
    with pytest.raises(ValueError, match=r"Shorten the prompt, or raise max_model_len \(at most \d+\)"):
        short.generate([5] * 20)


def test_a_model_without_a_chat_template(run: Run) -> None:
    code, _, err = run("generate", STORY, "--chat", "--model", MODEL, "--method", "ar")
    assert code == 1 and "hint: Give a prompt in the model's own format, to `foredraft generate` without --chat" in err


@pytest.mark.parametrize("name", ["skip_special_tokens", "ignore_eos", "include_stop_str_in_output"])
@pytest.mark.unchecked
def test_none_is_no_truth(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got None"):
        SamplingParams(**{name: None})


def test_a_tiny_top_p_keeps_the_most_likely_token():
    law = torch.tensor([[0.2, 0.5, 0.3]])
    assert likeliest_of_mass(law, 1e-320).tolist() == [[False, True, False]]


DEEP = "[" * 100_000
LONG_NUMBER = '{"draft_temperature": ' + "1" * 5000 + "}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speculative-config", DEEP], "--speculative-config is not JSON (it is nested too deeply)"),
        (["--speculative-config", LONG_NUMBER], "--speculative-config is not JSON (a number is too long)"),
        (["--chat", "--chat-template-kwargs", DEEP], "--chat-template-kwargs is not JSON (it is nested too deeply)"),
        (["--budget", "\u00b2"], "--budget must be a whole number or auto"),
        (["--budget=--5"], "--budget must be a whole number or auto"),
        (["--method", "mtp"], "method 'mtp' drafts by layers of the model itself"),
        (["--method", "auto", "--tree", "chain", "--model", MODEL], "tree 'chain' needs the laws of a draft model"),
        (["--tree", "static", "--speculative-config", '{"paths": []}'], "paths must name at least one node"),
        (["--tree", "static", "--speculative-config", '{"paths": [[0], [0]]}'], "paths must name every node once"),
    ],
)
def test_options_that_cannot_be_meant(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 2


def test_a_closed_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "-", "--model", MODEL])
    assert ended.value.code == 1
    assert "error: standard input is closed" in capsys.readouterr().err


def test_a_config_that_nests_without_end():
    nested: dict = {}
    for _ in range(100_000):
        nested = {"a": nested}
    for config in ({"method": "lm", "model": nested}, {"method": "lm", "tree": "static", "paths": nested}):
        with pytest.raises((ValueError, TypeError), match="nested"):
            parse(config)


def test_code_of_a_tokenizer_counts(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.X", null], "AutoModel": "mod.Y"}}')
    assert remote_code(tmp_path) == ["mod.py", "tok.py"]
