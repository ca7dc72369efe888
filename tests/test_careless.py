"""Careless and hostile input beside what the other tests of bad input have: what a fresh reader tried."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.cli.choices import DTYPES
from foredraft.models.loading import parse_dtype

MODEL = Path(__file__).parent / "data" / "babyllama-105"
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3}


def changed(folder: Path, **config: Any) -> Path:
    """A copy of the model with other values in config.json."""
    shutil.copytree(MODEL, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard error of a command that ends with an error."""
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 2 and "\nhint: " in error
    assert "FOREDRAFT_TRACEBACK" not in error
    return error


def refused_config(config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a speculative config, by `LLM` and on the command line."""
    with pytest.raises((ValueError, TypeError)) as error:
        LLM(MODEL, config)
    on_the_line = said(capsys, "generate", "x", "--model", MODEL, "--speculative-config", json.dumps(config))
    assert str(error.value).startswith(on_the_line.split("\n")[0].removeprefix("error: "))
    return on_the_line


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": -5}, "hidden_size must be a whole number, at least 1, got -5"),
        ({"head_dim": -8}, "head_dim must be a whole number, at least 1, got -8"),
        ({"intermediate_size": -1}, "intermediate_size must be a whole number, at least 1, got -1"),
        ({"num_attention_heads": -2}, "num_attention_heads must be a whole number, at least 1, got -2"),
        ({"intermediate_size": 10**30}, "Transformers cannot build a model from config.json"),
        ({"vocab_size": 2**62}, "Transformers cannot build a model from config.json"),
        ({"intermediate_size": 10**12}, "weights, the file holds"),
        (
            {"dtype": "int8"},
            "config.json in '{path}' is not valid: dtype must be one of float64, float32, float16, bfloat16, got 'int8'",
        ),
        (
            {"dtype": "nope"},
            "config.json in '{path}' is not valid: dtype must be one of float64, float32, float16, bfloat16, got 'nope'",
        ),
    ],
    ids=str,
)
def test_sizes_and_dtypes_of_a_plain_model(
    config: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(tmp_path / "model", **config)
    with pytest.raises(ValueError) as error:
        LLM(path, LOOKUP)
    assert expected.format(path=path) in str(error.value)
    assert expected.format(path=path) in said(capsys, "generate", "x", "--model", path, "--method", "ngram")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_short_context_leaves_room_to_time_steps(length: int) -> None:
    llm = LLM(MODEL, {"method": "ngram"}, max_model_len=length)
    if length > 1:
        assert len(llm.generate([[5]], SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == length - 1
    with pytest.raises(ValueError, match=f"the context of {length} must also fit an output"):
        llm.generate([[5] * length])


@pytest.mark.parametrize("model", [3, "", True, 0.5, ["a"], {"a": 1}], ids=str)
def test_a_draft_model_is_a_directory_or_a_hub_id(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused_config({"method": "lm", "model": model}, capsys)
    assert f"must be the directory or the Hub id of a draft model, got {model!r}\nhint: Leave it out, or give one" in error


@pytest.mark.parametrize("verify", [[], [[2, 0.1], [1, 0.2]], [[1, -0.1]], [[-1, 0.1]], [[1]], 3], ids=str)
def test_costs_are_seconds_by_nodes(verify: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"method": "lm", "model": str(MODEL), "tree": "sequoia", "acceptance": [0.5]}
    error = refused_config({**config, "costs": {"draft": 0.1, "verify": verify}}, capsys)
    assert "costs must be seconds by rising numbers of nodes, as in" in error


@pytest.mark.unchecked
@pytest.mark.parametrize("sampled", [3, None, [], "x", {"share": "x"}, {"share": [[0.1], [0.1, 0.2]], "mean": [1]}], ids=str)
def test_measured_acceptance_is_a_table(sampled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"method": "lm", "model": str(MODEL), "tree": "dyspec-calibrated"}
    error = refused_config({**config, "acceptance_by_prob": {"sampled": sampled}}, capsys)
    assert "acceptance_by_prob must hold, for each kind of request, 'share'" in error
    assert "hint: measure it with `foredraft calibrate`" in error


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"tensor_parallel_size": 2}, "--device cuda:1"),
        ({"draft_tensor_parallel_size": 2}, "--device cuda:1"),
        ({"assistant_model": "x"}, "--draft-model DIR"),
        ({"torch_dtype": "float32"}, "Use --dtype"),
        ({"max_new_tokens": 3}, "Use --max-tokens"),
    ],
    ids=str,
)
def test_hints_on_other_names_in_a_config(config: dict[str, Any], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused_config({"method": "ngram", **config}, capsys)
    assert hint in error.split("\nhint: ")[1]


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"num_speculative_tokens": 2.5}, "Leave it out to have it chosen"),
        ({"num_speculative_tokens": True}, "Leave it out to have it chosen"),
        ({"retime": "yes"}, "Leave it out for false"),
        ({"retime": True, "num_speculative_tokens": 3}, "Remove retime"),
    ],
    ids=str,
)
def test_every_error_in_a_config_has_advice(config: dict[str, Any], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused_config({"method": "ngram", **config}, capsys).endswith(f"\nhint: {hint}\n")


def test_a_model_that_is_no_head_says_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused_config({"method": "medusa", "model": str(MODEL)}, capsys)
    assert "\nhint: train one with `foredraft train`, or convert" in error


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("prompt", "advice"),
    [
        (None, "Give one of these, or a list of them"),
        ({"a"}, "Give one of these, or a list of them"),
        ({"promt": "x"}, "Allowed keys: prompt, prompt_token_ids"),
        ({}, "Allowed keys: prompt, prompt_token_ids"),
        (math.pi, "Give one of these, or a list of them"),
    ],
    ids=str,
)
def test_what_is_no_prompt_gets_advice_that_fits(prompt: Any, advice: str) -> None:
    with pytest.raises(TypeError) as error:
        LLM(MODEL, LOOKUP).generate(prompt)
    assert str(error.value).endswith(f". {advice}")


WITHOUT_TORCH = """
import sys
from foredraft.__main__ import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "x", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["chat", "--dtype", "bloat16"], "Did you mean 'bfloat16'?"),
        (["audit", "--dtype", ""], "unknown dtype ''"),
        (["bench", "--methods", "ar", "--prompts", "x", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["generate", "x", "--max-model-len", "0"], "max_model_len must be between 1 and 2147483647, got 0"),
        (["chat", "--max-model-len", "10000000000"], "no model's context is longer"),
        (["generate", "x", "--method", "lm", "--speculative-config", '{"model": 3}'], "got 3"),
    ],
    ids=str,
)
def test_errors_in_options_load_no_torch(arguments: list[str], expected: str) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 2
    assert expected in done.stderr


def test_every_dtype_that_the_command_line_takes_is_one() -> None:
    assert parse_dtype(DTYPES[0]) is None and all(parse_dtype(name) is not None for name in DTYPES[1:])
