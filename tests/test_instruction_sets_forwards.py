"""Whole forwards: every instruction set computes what the scalar set computes, and nothing else in a step changes a bit."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from foredraft.core.tree import TreeBatch
from foredraft.kernels.sets import using
from foredraft.models.llama import LlamaTarget
from foredraft.models.native import NativeTarget, run_linear
from instruction_sets import DTYPES, NAMES, PAIRED, check_bits, check_near, code_of, every_set, is_native, stand_ins_of
from test_instruction_sets import SHAPES, linear_case
from test_native import MODELS, PROMPTS, make_weights, prefilled, run, trees

NARROW = ("llama", "one layer", "biases", "mistral", "qwen3")
"""Models that run against stand-ins by default. The others take seconds there, and are marked slow."""

made = cache(make_weights)


class Wanted(NamedTuple):
    """The logits and features of the scalar set, and those of torch in float64."""

    logits: Tensor
    features: Tensor
    exact: Any


FORWARDS = [
    pytest.param(name, model, marks=[] if is_native(name) or model in NARROW else pytest.mark.slow)
    for name in NAMES[1:]
    for model in MODELS
]


def features_of(config: Any) -> tuple[int, ...]:
    return 0, 1, config.num_hidden_layers, -1


@cache
def wanted_forward(model: str, dtype: str) -> Wanted:
    config, weights = made(model)
    with using(code_of("scalar")):
        scores = run(NativeTarget(config, weights, DTYPES[dtype]), feature_layers=features_of(config))
    doubled = {key: weight.double() for key, weight in weights.items()}
    exact = run(LlamaTarget(config, doubled, torch.float64, torch.device("cpu")), feature_layers=features_of(config))
    return Wanted(scores.logits, scores.features, exact)


def check_forward(name: str, model: str, dtype: str) -> None:
    config, weights = made(model)
    is_ordered, wanted = dtype != "bf16" or name not in PAIRED, wanted_forward(model, dtype)
    with using(code_of(name)):
        found = run(NativeTarget(config, weights, DTYPES[dtype]), feature_layers=features_of(config))
    check_near(found.logits, wanted.logits, wanted.exact.logits, is_ordered)
    check_near(found.features, wanted.features, wanted.exact.features, is_ordered)


@pytest.mark.parametrize(("name", "model"), FORWARDS)
def test_forwards(name: str, model: str) -> None:
    """Trees behind prompts, in bfloat16: every logit and features of every kind."""
    check_forward(name, model, "bf16")


@every_set
@pytest.mark.parametrize(("model", "dtype"), [("llama", "f16"), ("biases", "f32")])
def test_forwards_of_other_types(name: str, model: str, dtype: str) -> None:
    check_forward(name, model, dtype)


@pytest.mark.slow
@every_set
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_all_forwards_of_other_types(name: str, model: str, dtype: str) -> None:
    check_forward(name, model, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("model", "dtype"), [("qwen3", "bf16"), ("one layer", "f16"), ("one layer", "f32")])
def test_what_else_is_in_a_step_changes_no_bit(name: str, model: str, dtype: str) -> None:
    """Other trees, other rows and threads; a prompt of 50 tokens at once, in chunks and token by token."""
    config, weights = made(model)
    prompt = np.random.default_rng(3).integers(64, size=50).tolist()
    with using(code_of(name)):
        target = NativeTarget(config, weights, DTYPES[dtype], threads=1)
        scores, batch = run(target), trees()
        for threads in (2, 3):
            check_bits(run(NativeTarget(config, weights, DTYPES[dtype], threads=threads)).logits, scores.logits)
        rows = np.array([0, 3, 15, 17])
        check_bits(run(target, rows=rows).logits, scores.logits[rows])
        for b, given in enumerate(PROMPTS):
            alone = TreeBatch.chains([batch[b].tokens.tolist()], [batch[b].parents.tolist()])
            found = target.forward(alone, prefilled(target, [given])[1])
            check_bits(found.logits, scores.logits[batch.offsets[b] : batch.offsets[b + 1]])
        whole = chunked(target, prompt, len(prompt))
        for size in (1, 7, 41):
            check_bits(chunked(target, prompt, size), whole)


def chunked(target: Any, prompt: list[int], size: int) -> Tensor:
    """The logits of a prompt that is run `size` tokens at a time."""
    pool = target.new_pool(8)
    caches, logits = [pool.allocate()], []
    for begin in range(0, len(prompt), size):
        part = prompt[begin : begin + size]
        logits.append(target.forward(TreeBatch.chains([part]), caches).logits)
        pool.keep(caches, [range(1, len(part))])
    return torch.cat(logits)


@pytest.mark.parametrize("name", [name for name in NAMES if is_native(name)])
def test_stand_ins_compute_what_the_machine_computes(name: str) -> None:
    """The stand-ins themselves: for sets that the machine has, they give its bits."""
    config, weights = made("qwen3")
    found = {}
    for code in (code_of(name), stand_ins_of(name)):
        with using(code):
            forwards = [run(NativeTarget(config, weights, dtype)).logits for dtype in DTYPES.values()]
            layers = [linear_case(kind, "bf16", SHAPES[0]) for kind in ("whole", "four bits")]
            found[id(code)] = torch.cat([one.flatten() for one in [*forwards, *(run_linear(c.layer, c.x, 1) for c in layers)]])
    check_bits(*found.values())
