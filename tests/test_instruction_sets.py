"""Every instruction set computes what the scalar set computes, and the bits of a row do not depend on the rest of a step.

The sets that multiply bfloat16 numbers in pairs add in another order. Their sums may differ by the rounding of the additions:
see `bound_of`. Everything else is equal bit for bit.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from foredraft.core.tree import TreeBatch
from foredraft.kernels.layouts import FEW, FULL, Memory, describe_weight
from foredraft.kernels.sets import using
from foredraft.kernels.structures import CLinear, CResidual
from foredraft.models.llama import LlamaTarget
from foredraft.models.native import NativeTarget, run_linear, run_residuals
from instruction_sets import NAMES, PAIRED, code_of, is_native, stand_ins_of
from test_native import MODELS, PROMPTS, make_weights, prefilled, run, trees

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 23, 32, 33, 39, 40, 41, 47, 48, 49, 64, 96, 97, 150)
SHAPES = ((75, 96), (32, 32), (33, 288), (130, 512))

NARROW = ("llama", "one layer", "biases", "mistral", "qwen3")
"""Models that run against stand-ins by default. The others take seconds there, and are marked slow."""

made = cache(make_weights)
every_set = pytest.mark.parametrize("name", NAMES[1:])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check_bits(found: Tensor, wanted: Tensor) -> None:
    """Compares bit for bit. A NaN equals any NaN, because no set promises which it returns."""
    assert found.shape == wanted.shape
    same = found.view(BITS[found.dtype]) == wanted.view(BITS[found.dtype])
    if found.is_floating_point():
        same |= found.isnan() & wanted.isnan()
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"


class Case(NamedTuple):
    """A linear layer, its inputs, and the outputs of the scalar set."""

    layer: CLinear
    weight: Tensor
    bias: Tensor
    x: Tensor
    wanted: Tensor
    memory: Memory


def bound_of(weight: Tensor, x: Tensor) -> Tensor:
    """How far two sums of the same exact products may be apart that are added in any order.

    The product of two bfloat16 numbers is exact in float32. A sum of n products and a bias adds at most n + 1 times, also in
    chains. Each addition rounds by at most u = 2^-24 times its result, which is at most the sum S of the absolute products up
    to a factor (1 + u)^n. So a sum is off by less than 1.01 (n + 1) u S, and two sums are apart by less than twice that. No
    number here is so small that the flush of denormal numbers counts.
    """
    sums = x.double().abs() @ weight.double().abs().T + 3
    return 2 * 1.01 * (weight.shape[1] + 1) * 2.0**-24 * sums


@cache
def linear_case(kind: str, dtype: str, shape: tuple[int, int]) -> Case:
    """Inputs of all sizes: zeros, and in a float32 or float16 row numbers that are denormal."""
    generator = torch.Generator().manual_seed(shape[0])
    weight, x = torch.randn(shape, generator=generator), torch.randn(max(ROWS), shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator).clamp(-3, 3)
    weight[7], x[3, :32], x[5] = 0, 0, x[5] * 1000
    if dtype != "bf16":
        x[9] *= 1e-7 if dtype == "f16" else 1e-41
    weight, x = weight.to(DTYPES[dtype]), x.to(DTYPES[dtype])
    layer = describe_weight(memory := Memory(), weight, bias, FEW if kind == "four bits" else FULL)
    with using(code_of("scalar")):
        return Case(layer, weight, bias, x, run_linear(layer, x, 1), memory)


def in_pairs(name: str, case: Case) -> Tensor:
    """What Intel's manual says of VDPBF16PS (odd, then even products) and of TDPBF16PS (chains of 16 odd and 16 even ones).

    A float64 holds the sum of a float32 and a product so far that rounding it again changes one bit in 2^28 additions.
    """
    weight, x = case.weight.double().numpy(), case.x.double().numpy()
    products = [x[:, None, i] * weight[None, :, i] for i in range(x.shape[1])]
    sums = np.zeros(products[0].shape, np.float32)
    for begin in range(0, len(products), 32):
        block = products[begin : begin + 32]
        if name == "amx":
            even, odd = np.zeros_like(sums), np.zeros_like(sums)
            for i in range(0, 32, 2):
                even, odd = (even + block[i]).astype(np.float32), (odd + block[i + 1]).astype(np.float32)
            sums = sums + (even + odd)
        else:
            for i in range(0, 32, 2):
                sums = (sums + block[i + 1]).astype(np.float32)
                sums = (sums + block[i]).astype(np.float32)
    return torch.from_numpy(sums + case.bias.numpy())


def check_linear(name: str, case: Case, rows: tuple[int, ...], is_ordered: bool) -> None:
    with using(code_of(name)):
        whole = run_linear(case.layer, case.x, 1)
        for count in rows:
            check_bits(run_linear(case.layer, case.x[:count], 1 + count % 3), whole[:count])
    if is_ordered:
        check_bits(whole, case.wanted)
    else:
        assert ((whole.double() - case.wanted.double()).abs() <= bound_of(case.weight, case.x)).all()
        check_bits(whole, in_pairs(name, case))


@every_set
@every_dtype
@pytest.mark.parametrize("kind", ["whole", "four bits"])
def test_linear_layers(name: str, dtype: str, kind: str) -> None:
    """1 to 64 rows and 150, several widths, outputs that fill no tile. A row gets the same bits at every count."""
    is_ordered = kind == "four bits" or dtype != "bf16" or name not in PAIRED
    for shape in SHAPES:
        rows = tuple(range(1, 65)) if shape == SHAPES[1] else ROWS[:: 4 if shape == SHAPES[-1] else 1]
        check_linear(name, linear_case(kind, dtype, shape), rows, is_ordered)


@every_set
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_linear_layers_of_numbers_that_are_not_finite(name: str, dtype: str) -> None:
    weight = torch.randn(40, 64).to(DTYPES[dtype])
    x = torch.randn(14, 64).to(DTYPES[dtype])
    x[0, 3], x[1, 5], x[2, 7], x[3] = torch.inf, -torch.inf, torch.nan, torch.finfo(x.dtype).max
    for bits in (FEW, FULL):
        layer = describe_weight(_memory := Memory(), weight, None, bits)
        with using(code_of("scalar")):
            wanted = run_linear(layer, x, 1)
        with using(code_of(name)):
            check_bits(run_linear(layer, x, 1), wanted)


class Blocks(NamedTuple):
    """Residual blocks: as they are passed, what they compute in float64, and their memory."""

    blocks: Any
    weights: list[tuple[Tensor, Tensor, Tensor | None]]
    memory: Memory

    def exactly(self, x: Tensor) -> Tensor:
        state = x.double()
        for weight, bias, skip in self.weights:
            inputs = state.to(x.dtype).double()
            gate = inputs @ weight.double().T + bias.double()
            state = (state if skip is None else inputs @ skip.double().T) + torch.nn.functional.silu(gate)
        return state


def make_blocks(dtype: torch.dtype, sizes: tuple[int, ...]) -> Blocks:
    torch.manual_seed(1)
    memory, weights = Memory(), []
    for inputs, outputs in pairwise(sizes):
        skip = None if inputs == outputs else (torch.randn(outputs, inputs) * 0.1).to(dtype)
        weights.append(((torch.randn(outputs, inputs) * 0.1).to(dtype), torch.randn(outputs).to(dtype), skip))
    blocks = [
        CResidual(
            describe_weight(memory, weight, bias, FULL),
            CLinear() if skip is None else describe_weight(memory, skip, None, FULL),
        )
        for weight, bias, skip in weights
    ]
    return Blocks((CResidual * len(blocks))(*blocks), weights, memory)


@every_set
@every_dtype
@pytest.mark.parametrize("sizes", [(96, 96), (96, 96, 96), (64, 96, 96)], ids=str)
def test_residual_blocks(name: str, dtype: str, sizes: tuple[int, ...]) -> None:
    made = make_blocks(DTYPES[dtype], sizes)
    x = torch.randn(60, sizes[0]).to(DTYPES[dtype])
    with using(code_of("scalar")):
        wanted = run_residuals(made.blocks, x, 1)
    with using(code_of(name)):
        found = run_residuals(made.blocks, x, 1)
        for rows in (1, 2, 5, 12, 13, 41):
            check_bits(run_residuals(made.blocks, x[:rows], 1 + rows % 3), found[:rows])
    check_near(found, wanted, made.exactly(x), dtype != "bf16" or name not in PAIRED)


def check_near(found: Tensor, wanted: Tensor, exact: Tensor, is_ordered: bool) -> None:
    """Compares several layers with the scalar set.

    Where the order of additions differs, an input may be rounded to the other of two bfloat16 neighbours. So the results
    differ, but their mean error against float64 is that of the scalar set, which rounds at the same places.
    """
    if is_ordered:
        check_bits(found, wanted)
    else:
        mine, theirs = ((one.double() - exact).pow(2).mean().sqrt() for one in (found, wanted))
        assert mine < 1.1 * theirs < 0.1 * exact.std()


@every_set
def test_activations_of_any_size(name: str) -> None:
    """x + silu(x), from denormal numbers to those whose exponential overflows."""
    layer = describe_weight(_memory := Memory(), torch.eye(32), None, FULL)
    blocks = (CResidual * 1)(CResidual(layer, CLinear()))
    sizes = torch.cat([torch.logspace(-45, 38.5, 2000, dtype=torch.float64), torch.linspace(80, 110, 500, dtype=torch.float64)])
    values = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])]).float()
    x = torch.zeros(len(values), 32)
    x[range(len(values)), torch.arange(len(values)) % 32] = values
    with using(code_of("scalar")):
        wanted = run_residuals(blocks, x, 1)
    with using(code_of(name)):
        check_bits(run_residuals(blocks, x, 1), wanted)


# ---- whole forwards --------------------------------------------------------------------------------------------------------


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
    pool = target.new_pool(1, 128)
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


# ---- laws and draws --------------------------------------------------------------------------------------------------------

SIZES = (1, 2, 7, 15, 16, 17, 33, 101, 1000)


def logits_of(size: int) -> Tensor:
    """Rows of logits: plain, with ties, with infinite and missing numbers, far apart, and without any mass."""
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(size)) * 3
    x[1] = x[1].round()
    x[2, ::3], x[3, ::2], x[4] = -torch.inf, torch.nan, x[4] * 1e4
    x[5], x[6] = -torch.inf, 0
    return x


def laws_of(code: Any, x: Tensor, *limits: float) -> Tensor:
    probs = torch.empty_like(x)
    code.laws(x.data_ptr(), *x.shape, *limits, probs.data_ptr())
    return probs


@every_set
@pytest.mark.parametrize("size", SIZES)
def test_laws(name: str, size: int) -> None:
    x = logits_of(size)
    for temperature in (0.05, 0.7, 1.0, 30.0):
        for limits in ((-torch.inf, 0, 1.0), (-2.5, 0, 1.0), (-torch.inf, 3, 1.0), (-torch.inf, 0, 0.8), (-4.0, 5, 0.5)):
            check_bits(*(laws_of(code_of(one), x, temperature, *limits) for one in (name, "scalar")))


@every_set
@pytest.mark.parametrize("size", SIZES)
def test_operations_on_laws(name: str, size: int) -> None:
    found = [operations(code_of(one), size) for one in (name, "scalar")]
    for mine, theirs in zip(*found, strict=True):
        check_bits(mine, theirs)


def operations(code: Any, size: int) -> list[Tensor]:
    """What an instruction set finds for the largest logits, draws from laws, their differences, and races."""
    logits, out = logits_of(size), []
    for count in {1, min(4, size), size}:
        values, places = torch.zeros(7, count), torch.zeros(7, count, dtype=torch.int64)
        code.largest(logits.data_ptr(), *logits.shape, count, values.data_ptr(), places.data_ptr())
        out += [values, places.double()]
    laws = torch.softmax(logits_of(size)[:3], 1).nan_to_num()
    laws[2, size // 2 :] = 0
    for law, other in zip(laws, laws.roll(1, 0), strict=True):
        draws = [code.categorical(law.data_ptr(), size, uniform) for uniform in (0.0, 0.3, 0.9, 1 - 2.0**-53)]
        left, rest = torch.empty(size), torch.empty(size)
        masses = code.subtract(law.data_ptr(), other.data_ptr(), size, left.data_ptr())
        masses = masses, code.without(law.data_ptr(), size // 3, size, rest.data_ptr())
        out += [left, rest, torch.tensor([*draws, *masses], dtype=torch.float64)]
        ids = torch.arange(size).flip(0) * 3
        for token_ids in (None, ids.data_ptr()):
            times, entries = torch.empty(5, dtype=torch.float64), torch.empty(5, dtype=torch.int64)
            code.race(size * 977, law.data_ptr(), token_ids, size, 5, times.data_ptr(), entries.data_ptr())
            out += [times, entries.double()]
    return out


def test_the_prefix_search_is_the_same_in_every_library() -> None:
    """It has no vectors: the library of stand-ins has the same as the package."""
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.permutation(9)[:4] for _ in range(6)])
    probs = rng.dirichlet(np.ones(5), 6)
    frames = tokens, np.ascontiguousarray(probs[:, :4]), np.ascontiguousarray(probs[:, 4])
    found = []
    for code in (code_of("scalar"), stand_ins_of("scalar")):
        out = np.zeros((2, 41), dtype=np.int64)
        code_size = code.prefixes(*(one.ctypes.data for one in frames), 6, 4, 40, 5, out[0].ctypes.data, out[1].ctypes.data)
        found.append((code_size, out.tolist()))
    assert found[0] == found[1]
    assert found[0][0] > 10
