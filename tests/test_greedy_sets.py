"""On every instruction set, greedy speculative decoding is plain decoding bit for bit: tokens and log-probabilities.

The bundled target runs in bfloat16 by compiled code. `test_parity.py` compares in float64, where torch computes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from exact import MEASURED
from foredraft import LLM, SamplingParams, kernels
from foredraft.core.folders import BUNDLED_LM
from foredraft.drafters import DRAFTERS
from foredraft.heads import HEADS
from foredraft.heads.folder import layer_config, save_head
from foredraft.heads.layers import Shape
from foredraft.kernels import sets
from foredraft.kernels.sets import using
from foredraft.plan.config import bundled_drafter
from instruction_sets import NAMES, code_of, is_native
from test_parity import COMBINATIONS

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels run here"),
]

PROMPT = "red red blue red red"
BEST = next(iter(sets.sets_here()), "torch")
FEW_TOKENS, MANY_TOKENS = 8, 40
OPTIONS = {"eagle3": {"feature_layers": [1, 2, 3]}, "medusa": {"num_heads": 3}, "hydra": {"num_heads": 3, "num_layers": 1}}
"""Options of heads without training."""

QUICK = [("ngram", None), ("fspad", "dyspec"), ("ctc", None)]
"""What runs by default on sets other than the best."""


def is_usual(name: str, drafter: str, tree: str | None) -> bool:
    """Whether a combination is in the default suite. Behind a lookup not every tree is."""
    if name == BEST:
        return not DRAFTERS[drafter].asks or tree in ("chain", "dyspec", None)
    return name in ("avx2", "scalar") and (drafter, tree) in QUICK


CASES = [
    pytest.param(name, drafter, tree, marks=[] if is_usual(name, drafter, tree) else pytest.mark.slow)
    for name in NAMES
    if is_native(name)
    for drafter, tree in COMBINATIONS
]


@cache
def llm_of(name: str) -> LLM:
    return LLM(None, {"method": "ar"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where heads without training are written."""
    return tmp_path_factory.mktemp("heads")


def weights_of(drafter: str, folder: Path) -> Path | None:
    """The bundled weights of a drafter, else a head without training."""
    row = DRAFTERS[drafter]
    if row.weights != "head":
        return BUNDLED_LM if row.weights else None
    kind = row.asks or drafter
    path = bundled_drafter(drafter) or folder / kind
    if not path.exists():
        target = llm_of(BEST).target
        config = layer_config(target.config, target.vocab_size)
        torch.manual_seed(1)
        options = OPTIONS.get(kind, {})
        save_head(path, HEADS[kind].make(Shape.of(config), **options).bfloat16(), config, {"method": kind, "options": options})
    return path


def outputs(llm: LLM, max_tokens: int) -> list[Any]:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in llm.generate(PROMPT, sampling)]


@cache
def plain(name: str, max_tokens: int) -> list[Any]:
    return outputs(llm_of(name), max_tokens)


def check(name: str, config: dict[str, Any], max_tokens: int) -> None:
    with using(code_of(name)):
        found = outputs(llm_of(name).with_speculation(config), max_tokens)
        assert found == plain(name, max_tokens)
    assert all(len(token_ids) == max_tokens for token_ids, _ in found)


def config_of(drafter: str, tree: str | None, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = {"method": drafter, "num_speculative_tokens": 5}
    config |= {"model": path} if (path := weights_of(drafter, folder)) else {}
    return config | ({"tree": tree, **MEASURED.get(tree, {})} if tree is not None else {})


@pytest.mark.parametrize(("name", "drafter", "tree"), CASES)
def test_sets_of_this_machine(name: str, drafter: str, tree: str | None, folder: Path, request: Any) -> None:
    is_long = name != "scalar" and request.node.get_closest_marker("slow") is not None
    check(name, config_of(drafter, tree, folder), MANY_TOKENS if is_long else FEW_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not is_native(name)])
@pytest.mark.parametrize(("drafter", "tree"), QUICK)
def test_sets_on_stand_ins(name: str, drafter: str, tree: str | None, folder: Path) -> None:
    check(name, config_of(drafter, tree, folder), FEW_TOKENS)
