"""Keys of a speculative_config that do not belong to the method, and sizes that no tree has: refused, never ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Run
from foredraft import LLM
from foredraft.bench.names import parse_method
from foredraft.drafters import DRAFTERS
from foredraft.plan.config import parse

DATA = Path(__file__).parent / "data"
MODEL, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
STORY = "Once upon a time"

pytestmark = pytest.mark.unchecked

NOT_OF_AR = [
    ("num_speculative_tokens", 4),
    ("model", "DIR"),
    ("tree", "topk"),
    ("rule", "block"),
    ("topk", 3),
    ("prompt_lookup_max", 4),
    ("epsilon", 0.1),
    ("force", True),
]


@pytest.mark.parametrize(("key", "value"), NOT_OF_AR)
def test_keys_of_plain_decoding(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"'{key}' does not belong to method 'ar', which drafts nothing. Leave it out"):
        parse({"method": "ar", key: value})
    with pytest.raises(ValueError, match="does not belong to method 'ar'"):
        LLM(MODEL, {"method": "ar", key: value})
    assert parse({"method": "ar", key: None}) is None


@pytest.mark.parametrize("method", [name for name, row in DRAFTERS.items() if row.weights is None])
def test_a_model_of_a_method_without_weights(method: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'model' \(--draft-model\) does not belong to method '{method}', which has no weights"
    ):
        parse({"method": method, "model": "DIR"})
    assert parse({"method": method, "model": None}) is not None


@pytest.mark.parametrize(
    "config",
    [
        {"method": "suffix", "prompt_lookup_max": 3},
        {"method": "ngram", "suffix_decoding_max_tree_depth": 3},
        {"method": "lm", "lookup_min_match": 3},
        {"method": "medusa", "ctc_tokens": 3},
        {"method": "lm", "force": True},
        {"method": "suffix", "draft_temperature": 0.5},
        {"method": "lm", "tree": "chain", "width": 3},
        {"method": "lm", "tree": "chain", "rule": "block", "epsilon": 0.1},
    ],
)
def test_keys_of_other_methods_trees_and_rules(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="unknown key of speculative_config for method"):
        parse(config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "ar", "--budget", 4], "'num_speculative_tokens' does not belong to method 'ar'"),
        (["--method", "ar", "--tree", "topk"], "'tree' does not belong to method 'ar'"),
        (["--method", "ar", "--draft-model", OTHER], "'model' does not belong to method 'ar'"),
        (["--method", "ngram", "--draft-model", OTHER], "'model' (--draft-model) does not belong to method 'ngram'"),
        (["--method", "suffix", "--draft-model", OTHER], "'model' (--draft-model) does not belong to method 'suffix'"),
        (["--method", "suffix", "--force"], "unknown key of speculative_config for method 'suffix': 'force'"),
    ],
)
def test_on_the_command_line(run: Run, arguments: list[Any], said: str) -> None:
    code, out, err = run("generate", STORY, "--model", MODEL, *arguments)
    assert (code, out) == (1, "")
    assert f"error: {said}" in err and "hint: " in err


def test_what_still_goes() -> None:
    """Defaults of commands, and everything that an automatic choice may need."""
    everything = {"method": "auto", "model": OTHER, "tree": "auto", "num_speculative_tokens": "auto", "rule": "multiround"}
    assert parse(everything) is not None
    assert parse({"method": "ar", "num_speculative_tokens": "auto", "tree": "auto"}) is None
    assert parse({"method": "suffix", "num_speculative_tokens": 8, "rule": "deterministic"}) is not None


def test_an_audit_of_plain_decoding(run: Run) -> None:
    """Its budget has a default, which is no mistake of the user's."""
    code, _, err = run("audit", "--model", MODEL, "--method", "ar", "--limit", 1, "--raw", "--max-tokens", 4)
    assert code == 1 and "there is nothing to audit" in err


@pytest.mark.parametrize("text", ["ar:chain", "ar::8", "ar:::block", "ar=DIR", "ar::::topk=3", "ngram=DIR", "suffix=DIR"])
def test_methods_of_a_benchmark(text: str, run: Run) -> None:
    with pytest.raises(ValueError, match="does not belong to method"):
        parse(parse_method(text, "D"))
    code, _, err = run("bench", "--methods", text, "--prompts", DATA / "prompts.jsonl", "--model", MODEL)
    assert code == 1 and "does not belong to method" in err


def test_a_benchmarks_draft_model_is_for_those_that_take_one() -> None:
    for method in ("ar", "suffix", "ngram"):
        assert parse_method(method, OTHER) == {"method": method}


# --- Sizes


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tree": "static", "paths": [[10**9]]}, "paths must hold numbers of at most 1024, got 1000000000"),
        ({"tree": "static", "paths": [[2**70]]}, "paths must hold numbers of at most 1024"),
        ({"tree": "static", "paths": [[i] for i in range(2000)]}, "paths must have at most 1024 entries"),
        ({"tree": "branching", "num_chains": 10**9}, "num_chains must be at most 1024, got 1000000000"),
        ({"tree": "branching", "expansion": [10**9]}, "expansion must hold numbers of at most 1024"),
        ({"tree": "branching", "expansion": [1] * 10**6}, "expansion must have at most 1024 entries"),
        ({"tree": "branching", "draft_depth": 10**9}, "draft_depth must be at most 64 deep"),
        ({"tree": "topk", "topk": 10**400}, "topk must be at most 1024"),
        ({"tree": "dyspec", "width": 10**9}, "width must be at most 1024"),
        ({"tree": "chain", "draft_top_k": 2**64}, "draft_top_k must be at most 2147483647"),
        ({"tree": "chain", "draft_temperature": 10**400}, "draft_temperature must be at most"),
        ({"tree": "chain", "draft_temperature": float("inf")}, "draft_temperature must be finite, got inf"),
        ({"tree": "chain", "draft_temperature": float("nan")}, "draft_temperature must be finite, got nan"),
        ({"tree": "sequoia", "acceptance": [float("nan")]}, "acceptance must be finite, got nan"),
        ({"tree": "sequoia", "acceptance": [0.1] * 5000}, "acceptance must have at most 1024 entries"),
        ({"tree": "sequoia", "costs": {"draft": float("inf"), "verify": [[1, 1.0]]}}, "costs must be finite, got inf"),
        ({"tree": "chain", "rule": "tolerance", "epsilon": float("nan")}, "epsilon must be finite, got nan"),
        ({"method": "ngram", "prompt_lookup_max": 10**9}, "prompt_lookup_max must be at most 256"),
        (
            {"method": "suffix", "suffix_decoding_max_tree_depth": 10**9},
            "suffix_decoding_max_tree_depth must be between 1 and 64",
        ),
        (
            {"method": "suffix", "suffix_decoding_max_spec_factor": float("inf")},
            "suffix_decoding_max_spec_factor must be finite",
        ),
        ({"method": "suffix", "suffix_decoding_max_spec_factor": 10**400}, "suffix_decoding_max_spec_factor must be at most"),
        ({"method": "lm-lookup", "lookup_min_match": 10**30}, "lookup_min_match must be at most 256"),
        ({"num_speculative_tokens": 10**5000}, "num_speculative_tokens (--budget) must be between 1 and 1024, got 10**"),
    ],
)
def test_sizes_that_no_tree_has(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(config)
    assert str(caught.value).startswith(said)


def test_sizes_on_the_command_line(run: Run) -> None:
    given = ["generate", STORY, "--model", MODEL, "--draft-model", OTHER, "--tree", "static"]
    code, _, err = run(*given, "--speculative-config", '{"paths": [[1000000000]]}')
    assert code == 1 and "error: paths must hold numbers of at most 1024, got 1000000000" in err
    code, _, err = run(*given[:-1], "chain", "--speculative-config", '{"draft_temperature": 1e999}')
    assert code == 1 and "error: draft_temperature must be finite, got inf" in err


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({"num_speculative_tokens": np.int64(4)}, "budget", (4, 4)),
        ({"num_speculative_tokens": torch.tensor(4)}, "budget", (4, 4)),
        ({"tree": "topk", "topk": np.int32(3)}, "grower_options", {"topk": 3}),
        ({"tree": "sequoia", "acceptance": np.array([0.5, 0.25])}, "grower_options", {"acceptance": [0.5, 0.25]}),
        ({"tree": "static", "paths": torch.tensor([[0], [1]])}, "grower_options", {"paths": [[0], [1]]}),
        ({"method": "suffix", "suffix_decoding_min_token_prob": np.float32(0.5)}, "drafter_options", None),
    ],
)
def test_numbers_of_numpy_and_torch(config: dict[str, Any], key: str, value: Any) -> None:
    found = getattr(parse(config), key)
    assert found == value if value is not None else found == {"suffix_decoding_min_token_prob": 0.5}
