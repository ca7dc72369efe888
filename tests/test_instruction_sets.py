"""Layers: every instruction set computes what the scalar set computes, and the bits of a row do not depend on the other rows.

The sets that multiply bfloat16 numbers in pairs add in another order. Their sums may differ by the rounding of the additions:
see `bound_of`. Everything else is equal bit for bit. Whole forwards and laws are in `test_instruction_sets_forwards.py` and
`test_instruction_sets_laws.py`.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from foredraft.kernels.layouts import FULL, QUANTIZED, Memory, describe_weight
from foredraft.kernels.sets import using
from foredraft.kernels.structures import CLinear, CResidual
from foredraft.models.native import run_linear, run_residuals
from instruction_sets import DTYPES, PAIRED, check_bits, check_near, code_of, every_dtype, every_set

ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 23, 32, 33, 39, 40, 41, 47, 48, 49, 64, 96, 97, 150)
SHAPES = ((75, 96), (32, 32), (33, 288), (130, 512))


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
    layer = describe_weight(memory := Memory(), weight, bias, QUANTIZED if kind == "four bits" else FULL)
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
    for bits in (QUANTIZED, FULL):
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
