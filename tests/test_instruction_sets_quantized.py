"""Layers of few bits: every set computes what the scalar set computes, and the bits of a row do not depend on the others.

With inputs as they are, sets that multiply bfloat16 numbers in pairs add the products of a group before they scale them, see
`bound_of`. Everything else is equal bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from foredraft.kernels.layouts import Memory, describe_weight
from foredraft.kernels.quantized import SMALL, SUPER, TILE, Form, Quantized, joined, laid_out, unpacked
from foredraft.kernels.sets import using
from foredraft.kernels.structures import CLinear
from foredraft.models.native import run_linear
from instruction_sets import PAIRED, check_bits, code_of, every_set
from quantized import in_eight_bits

ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 33, 40, 48, 49, 97)
OUTPUTS, INPUTS = 75, 512
KINDS = [(4, form) for form in Form] + [(5, Form.PLAIN), (5, Form.SHIFTS), (5, Form.SUPER)]
KINDS += [(6, Form.SMALL), (6, Form.PLAIN), (8, Form.PLAIN), (8, Form.ZEROS)]

every_kind = pytest.mark.parametrize(("bits", "form"), KINDS, ids=lambda value: getattr(value, "name", str(value)))


def made(bits: int, form: Form, group: int = TILE, dtype: torch.dtype = torch.float16) -> Quantized:
    """A weight with random numbers, scales and shifts of the sizes that files have."""
    generator = torch.Generator().manual_seed(bits)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    numbers = whole(0, 2**bits, OUTPUTS, INPUTS).to(torch.uint8)
    if form == Form.SUPER:
        scales = (torch.rand(OUTPUTS, INPUTS // SUPER, 2, generator=generator) / 100).to(dtype)
        return Quantized(numbers, bits, scales, form, whole(0, 64, OUTPUTS, INPUTS // TILE, 2).to(torch.int8))
    if form == Form.SMALL:
        scales = (torch.rand(OUTPUTS, INPUTS // SUPER, generator=generator) / 1000).to(dtype)
        return Quantized(numbers, bits, scales, form, whole(-128, 128, OUTPUTS, INPUTS // SMALL).to(torch.int8))
    scales = (torch.rand(OUTPUTS, INPUTS // group, generator=generator) / 10).to(dtype)
    zeros, shifts = whole(-8, 9, *scales.shape).to(torch.int8), torch.randn(scales.shape, generator=generator).to(dtype)
    return Quantized(numbers, bits, scales, form, {Form.ZEROS: zeros, Form.SHIFTS: shifts}.get(form))


class Case(NamedTuple):
    """A layer, its inputs, and the outputs of the scalar set."""

    layer: CLinear
    weight: Quantized
    bias: Tensor
    x: Tensor
    wanted: Tensor
    memory: Memory


@cache
def case_of(bits: int, form: Form, is_rounded: bool, dtype: torch.dtype, group: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    weight, bias = made(bits, form, group), torch.randn(OUTPUTS, generator=generator)
    x = torch.randn(max(ROWS), INPUTS, generator=generator)
    x[3, :TILE], x[5] = 0, x[5] * 1000
    layer = describe_weight(memory := Memory(), weight, bias, is_rounded=is_rounded)
    with using(code_of("scalar")):
        return Case(layer, weight, bias, x.to(dtype), run_linear(layer, x.to(dtype), 1), memory)


def bound_of(case: Case, x: Tensor) -> Tensor:
    """How far an output may be from the exact one.

    A weight is rounded at most three times (scale, shift, their sum), and so is a scaled sum. A product of two bfloat16 numbers
    is exact in float32. With the sums of groups, n inputs make fewer than 2 n additions. Each rounds by at most 2^-24 times the
    sum of the absolute terms: of the numbers times their scale, and of the shifts.
    """
    zero = 2.0 ** (case.weight.bits - 1)
    as_numbers = Quantized(torch.full_like(case.weight.numbers, int(zero)), *_without_numbers(case.weight)).weight()
    sums = x.double().abs() @ ((case.weight.weight() - as_numbers).abs() + as_numbers.abs()).T + case.bias.double().abs()
    return 1.01 * (2 * INPUTS + 8) * 2.0**-24 * sums


def _without_numbers(weight: Quantized) -> tuple[int, Tensor, Form, Tensor | None]:
    return weight.bits, weight.scales, weight.form, weight.more


def check_layer(name: str, case: Case, *, is_rounded: bool, is_ordered: bool) -> None:
    with using(code_of(name)):
        whole = run_linear(case.layer, case.x, 1)
        for count in ROWS:
            check_bits(run_linear(case.layer, case.x[:count], 1 + count % 3), whole[:count])
    x = in_eight_bits(case.x) if is_rounded else case.x
    exact = x.double() @ case.weight.weight().T + case.bias.double()
    assert ((whole.double() - exact).abs() <= bound_of(case, x)).all()
    if is_ordered:
        check_bits(whole, case.wanted)


@every_set
@every_kind
@pytest.mark.parametrize("is_rounded", [False, True], ids=["as given", "rounded"])
def test_layers_of_few_bits(name: str, bits: int, form: Form, is_rounded: bool) -> None:
    case = case_of(bits, form, is_rounded, torch.bfloat16, TILE)
    check_layer(name, case, is_rounded=is_rounded, is_ordered=is_rounded or name not in PAIRED)


@every_set
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("is_rounded", [False, True], ids=["as given", "rounded"])
def test_models_of_other_types_and_larger_groups(name: str, dtype: torch.dtype, is_rounded: bool) -> None:
    for bits, form in ((4, Form.ZEROS), (8, Form.PLAIN)):
        check_layer(name, case_of(bits, form, is_rounded, dtype, 128), is_rounded=is_rounded, is_ordered=True)


@every_set
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_the_largest_products(name: str, bits: int) -> None:
    """Nothing saturates: inputs of 127 and -127 times the largest and the smallest numbers."""
    numbers = torch.zeros(TILE, 64, dtype=torch.uint8)
    numbers[::2] = 2**bits - 1
    weight = Quantized(numbers, bits, torch.ones(TILE, 2, dtype=torch.float32))
    x = torch.full((4, 64), 127.0)
    x[1], x[2, ::2], x[3, 1::2] = -127.0, -127.0, -127.0
    layer = describe_weight(_memory := Memory(), weight, None)
    with using(code_of(name)):
        assert torch.equal(run_linear(layer, x, 1).double(), x.double() @ weight.weight().T)


@every_kind
def test_layout(bits: int, form: Form) -> None:
    """Numbers are found again, and outputs that there are not count nothing."""
    weight = made(bits, form)
    blocks, scales, _ = laid_out(weight)
    assert torch.equal(unpacked(blocks, bits, OUTPUTS), weight.numbers)
    assert blocks.shape == (3, INPUTS // TILE, 128 * bits)
    assert not scales[-1][..., OUTPUTS % TILE :].any()
    assert weight.num_bytes >= OUTPUTS * INPUTS * bits // 8


@every_kind
def test_parts_of_a_layer(bits: int, form: Form) -> None:
    weight = made(bits, form)
    parts = [weight.rows(0, 32), weight.rows(32, OUTPUTS)]
    assert parts[0].is_like(parts[1])
    assert torch.equal(joined(parts).weight(), weight.weight())
