"""Every fast version of `foredraft.kernels` computes what its plain version computes.

The bounds follow from the number of additions. With u, half the distance from 1 to the next number, a sum of n products in any
order is off by less than 1.01 (n + 1) u times the sum of the absolute products (Higham, Accuracy and Stability of Numerical
Algorithms, section 3.1). Where the order of additions is fixed, the results are equal bit for bit. That all instruction sets
compute what the scalar set computes is in `test_instruction_sets.py`.
"""

from __future__ import annotations

import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foredraft import kernels as compiled
from foredraft.heads.layers import ResBlock
from foredraft.kernels.attention import attend, rotate
from foredraft.kernels.layouts import FULL, Memory, describe_weight
from foredraft.kernels.linear import can_pack, make_linear, make_norm, mirrored_norm
from foredraft.kernels.sets import using
from foredraft.kernels.structures import CLinear, CResidual
from foredraft.models.native import run_linear, run_residuals
from instruction_sets import BITS, DTYPES, PAIRED, code_of, every_dtype

COMPARED = {
    "warp": "test_sampling.py::test_the_compiled_law_is_the_plain_one",
    "largest": "test_sampling.py::test_the_largest_by_compiled_code",
    "categorical": "test_draws.py::test_the_compiled_token_is_the_plain_one",
    "subtract": "test_rules.py::test_the_compiled_residuals_are_the_plain_ones",
    "without": "test_rules.py::test_the_compiled_residuals_are_the_plain_ones",
    "accept": "test_batched.py::test_verdicts_are_those_of_the_rule",
    "uniforms": "test_draws.py::test_numbers_of_all_nodes_are_those_of_each",
    "race": "test_draws.py::test_the_compiled_race_is_the_plain_one",
    "prefixes": "test_prefixes.py::test_the_compiled_search_is_the_plain_one",
    "linear": "test_plain_versions.py::test_a_compiled_layer_adds_in_the_order_of_the_inputs",
    "residuals": "test_plain_versions.py::test_compiled_residual_blocks",
    "forward": "test_native.py::test_it_is_no_less_exact_than_torch",
    "chains": "test_chains.py::test_one_call_draws_what_forwards_draw",
    "peak": "test_kernels.py::test_the_peak_counts_multiply_adds",
}
"""The test that compares each compiled function with its plain version. Those of `OPERATIONS` and of single layers stand
beside the other tests of their subject. `peak` computes nothing but a count."""

ROUNDINGS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""The largest relative error of rounding to each dtype, and its u."""

U = ROUNDINGS[torch.float32]
SETS = [name for name in ("scalar", *compiled.sets.sets_here()[:1]) if compiled.sets.sets_here()]
"""The scalar set, and the set that runs."""

every_running_set = pytest.mark.parametrize("name", [*dict.fromkeys(SETS)] or ["scalar"])
packs = pytest.mark.skipif(
    not can_pack(torch.bfloat16, torch.device("cpu")), reason="packed layers need bfloat16 and oneDNN on this processor"
)


def test_every_compiled_function_is_compared() -> None:
    assert COMPARED.keys() == {*compiled.structures.FUNCTIONS, *compiled.structures.SHARED_FUNCTIONS} - {"laws"} | {"warp"}
    assert compiled.OPERATIONS.keys() <= COMPARED.keys()
    for place in COMPARED.values():
        file, name = place.split("::")
        assert re.search(rf"^def {name}\(", (Path(__file__).parent / file).read_text(), re.MULTILINE), place


def made(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sum_error(x: Tensor, weight: Tensor, bias: Tensor | None, u: float = U) -> Tensor:
    """The bound of a sum of products and a bias, in any order and with any rounding of the products."""
    sums = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return 1.01 * (weight.shape[1] + 2) * u * sums


def exactly(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def check(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    assert found.shape == exact.shape
    off = (found.double() - exact).abs()
    assert (off <= bound).all(), f"off by up to {float((off / bound.clamp(min=1e-300)).max()):.3g} bounds"


PACKED_SHAPES = [(1, 1), (1, 32), (33, 1), (5, 3), (75, 96), (32, 32), (130, 512), (288, 1000)]


@packs
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_packed_layers(shape: tuple[int, int], biased: bool) -> None:
    """Plain and packed layers in bfloat16, alone and on a residual, at and around the rows of the layout."""
    weight, unit = made(*shape, dtype=torch.bfloat16), ROUNDINGS[torch.bfloat16]
    bias = made(shape[0], dtype=torch.bfloat16, seed=1) if biased else None
    plain, packed = (make_linear(weight, bias, packed=packed) for packed in (False, True))
    for rows in (1, 2, 7, 8, 9, 33):
        x, residual = (made(rows, size, dtype=torch.bfloat16, seed=rows) for size in (shape[1], shape[0]))
        exact, summed = exactly(x, weight, bias), sum_error(x, weight, bias)
        rounded = summed + unit * (exact.abs() + summed)
        for layer in (plain, packed):
            check(layer(x), exact, rounded)
        total, whole_sum = exact + residual.double(), summed + U * (exact.abs() + summed + residual.double().abs())
        check(packed(x, residual), total, whole_sum + unit * (total.abs() + whole_sum))
        check(plain(x, residual), total, rounded + unit * (total.abs() + rounded))


@packs
def test_a_packed_layer_rounds_once_where_a_plain_one_rounds_twice() -> None:
    """1 + 2^-9 - 1 + 2^-8: a sum that is rounded before the residual is added loses the small product."""
    x, weight = torch.tensor([[1.0, 2.0**-9]]).bfloat16(), torch.ones(1, 2).bfloat16()
    residual = torch.tensor([[-1.0]]).bfloat16()
    assert make_linear(weight, None, packed=True)(x, residual).item() == 2.0**-9
    assert make_linear(weight, None, packed=False)(x, residual).item() == 0.0


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (75, 96)], ids=str)
def test_plain_layers_in_every_dtype(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias, x = (made(*size, dtype=dtype, seed=i) for i, size in enumerate((shape, shape[:1], (6, shape[1]))))
    residual = made(6, shape[0], dtype=dtype, seed=9)
    layer = make_linear(weight, bias, packed=False)
    plain = F.linear(x, weight, bias)
    assert torch.equal(layer(x), plain)
    assert torch.equal(layer(x, residual), residual + plain)
    assert layer(x[:0]).shape == (0, shape[0])


def in_order(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Adds the products in the order of the inputs, each addition rounded to float32, and then the bias.

    A float64 holds the sum of a float32 and a product so far that rounding it again changes one bit in 2^28 additions.
    """
    sums = torch.zeros(len(x), len(weight))
    for i in range(weight.shape[1]):
        sums = (sums.double() + x[:, i, None].double() * weight[:, i].double()).float()
    return sums if bias is None else sums + bias.float()


COMPILED_SHAPES = [(1, 32), (31, 32), (32, 64), (33, 96), (75, 288), (130, 512)]
"""Outputs that fill no tile, exactly one and more. Inputs are whole blocks of 32."""


@every_running_set
@every_dtype
@pytest.mark.parametrize("shape", COMPILED_SHAPES, ids=str)
def test_a_compiled_layer_adds_in_the_order_of_the_inputs(name: str, dtype: str, shape: tuple[int, int]) -> None:
    """Bit for bit; sets that multiply in pairs within the bound. So is the plain layer, in float32 and in float64."""
    weight, bias = made(*shape, dtype=DTYPES[dtype]), made(shape[0], dtype=DTYPES[dtype], seed=1)
    for offset in (None, bias):
        layer = describe_weight(_memory := Memory(), weight, offset, FULL)
        for rows in (0, 1, 2, 5, 13, 50):
            x = made(rows, shape[1], dtype=DTYPES[dtype], seed=2 + rows)
            with using(code_of(name)):
                found = run_linear(layer, x, 2)
            bound = sum_error(x, weight, offset)
            check(found, exactly(x, weight, offset), bound)
            singles = (None if given is None else given.float() for given in (weight, offset))
            check(found, make_linear(*singles, packed=False)(x.float()).double(), 2 * bound)
            if dtype != "bf16" or name not in PAIRED:
                assert torch.equal(found, in_order(weight, offset, x))


EXPONENTIAL = 1e-6
"""Relative error of the compiled exponential, as `vectors.h` states it."""


def silu_error(gate: Tensor, off: Tensor) -> Tensor:
    """How far the compiled silu of numbers that are off by `off` is from the exact one.

    The derivative of silu is below 1.1. The exponential and three further operations round, and silu(x) is proportional to
    1 / (1 + e^-x), which changes by at most as much as the exponential.
    """
    exact = F.silu(gate).abs()
    return 1.1 * off + (EXPONENTIAL + 4 * U) * (exact + 1.1 * off)


def test_the_slope_of_silu_is_below_eleven_tenths() -> None:
    x = torch.linspace(-30, 30, 60001, dtype=torch.float64, requires_grad=True)
    F.silu(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() < 1.1


@every_running_set
@every_dtype
@pytest.mark.parametrize("sizes", [(32, 32), (96, 96), (96, 96, 96), (64, 96, 96), (288, 32, 32)], ids=str)
def test_compiled_residual_blocks(name: str, dtype: str, sizes: tuple[int, ...]) -> None:
    """Against `ResBlock` in float64. The error of a block is the input of the bound of the next."""
    unit, blocks, entries, memory = ROUNDINGS[DTYPES[dtype]], [], [], Memory()
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        block = ResBlock(outputs, inputs)
        for seed, parameter in enumerate(block.parameters()):
            parameter.data = (made(*parameter.shape, dtype=torch.float32, seed=10 * number + seed) / 8).to(DTYPES[dtype])
        skip = block.res_connection
        described = [
            describe_weight(memory, layer.weight.data, layer.bias.data, FULL) if isinstance(layer, nn.Linear) else CLinear()
            for layer in (block.linear, skip)
        ]
        blocks.append(block)
        entries.append(CResidual(*described))
    for rows in (1, 2, 14):
        x = made(rows, sizes[0], dtype=DTYPES[dtype], seed=rows)
        with using(code_of(name)):
            found = run_residuals((CResidual * len(entries))(*entries), x, 2)
        exact, bound = residuals_exactly(blocks, x, unit)
        check(found, exact, bound + unit * (exact.abs() + bound))


def residuals_exactly(blocks: list[ResBlock], x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """The blocks in float64, and the bound of what the compiled blocks are off before their output is rounded."""
    state, off = x.double(), torch.zeros(x.shape, dtype=torch.float64)
    for number, block in enumerate(blocks):
        block = block.double()
        rounded = off + unit * (state.abs() + off) * (number > 0)  # the first inputs have the type already
        most = state.abs() + rounded

        def layer_error(layer: nn.Linear, rounded: Tensor = rounded, most: Tensor = most) -> Tensor:
            return rounded @ layer.weight.abs().T + sum_error(most, layer.weight, layer.bias)

        gate = block.linear(state)
        skip = block.res_connection
        kept = layer_error(skip) if isinstance(skip, nn.Linear) else off
        state, parts = block(state), kept + silu_error(gate, layer_error(block.linear))
        off = parts + U * (state.abs() + parts)
    return state.detach(), off.detach()


def norm_exactly(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@every_dtype
@pytest.mark.parametrize("size", [1, 2, 31, 96, 576])
def test_norms(dtype: str, size: int) -> None:
    """Plain and mirrored norms, also of zeros, and of large and small inputs.

    The mean square adds 2 ``size`` squares at most. Its relative error counts half under the root. In float32 some ten more
    operations round. The result is rounded to the dtype; `F.rms_norm` does so before and after the weight. A float16 below
    2^-14 is a multiple of 2^-24.
    """
    unit, eps = ROUNDINGS[DTYPES[dtype]], 1e-5
    absolute = 2.0**-25 if dtype == "f16" else 0.0
    weight = made(size, dtype=DTYPES[dtype], seed=1)
    norms = [make_norm(weight, eps), *([mirrored_norm(weight, eps)] if dtype == "bf16" else [])]
    for rows, norm in product((1, 2, 16, 17), norms):
        x = made(rows, size, dtype=DTYPES[dtype], seed=rows)
        x[0] = 0
        x[-1] *= 1000
        x[rows // 2] *= 1e-3  # eps counts
        exact = norm_exactly(x, weight, eps)
        relative = 1.01 * (size + 10) * U + 2.01 * unit
        check(norm(x), exact, exact.abs() * relative + absolute * (1 + weight.double().abs()))


def test_up_to_sixteen_rows_of_bfloat16_run_the_mirrored_norm() -> None:
    """Both versions are used, and differ in the last bit of some results. So the comparison compares two versions."""
    weight = made(96, dtype=torch.bfloat16, seed=1)
    norm, mirrored = make_norm(weight, 1e-5), mirrored_norm(weight, 1e-5)
    x = made(17, 96, dtype=torch.bfloat16)
    assert torch.equal(norm(x[:16]), mirrored(x[:16]))
    assert torch.equal(norm(x), F.rms_norm(x, weight.shape, weight, 1e-5))
    assert norm(x[:0]).shape == (0, 96)


@pytest.mark.parametrize(("groups", "heads", "width", "length"), [(1, 1, 1, 1), (1, 3, 1, 7), (2, 4, 5, 9), (2, 2, 3, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_sum_of_values_by_the_softmax_of_products(
    groups: int, heads: int, width: int, length: int, masked: bool
) -> None:
    """In float64, head by head. Scores are below 50, so a softmax of them is off by less than 200 u; a sum, by its length."""
    size, generator = 8, torch.Generator().manual_seed(length)
    query = torch.randn(2, width, heads, size, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 2, groups, length, size, generator=generator, dtype=torch.float64)
    visible = torch.rand(2, width, length, generator=generator) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(2, width, length, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    shared = heads // groups
    found = attend(query, keys, values, mask[:, None].repeat(1, 1, shared, 1) if masked else None)
    for request, node, head in product(range(2), range(width), range(heads)):
        scores = keys[request, head // shared] @ query[request, node, head] / size**0.5
        assert scores.abs().max() < 50
        shares = (scores + mask[request, node] if masked else scores).softmax(0)
        wanted = shares @ values[request, head // shared]
        bound = (200 + 2 * length) * 2.0**-53 * (shares @ values[request, head // shared].abs())
        check(found[request, node, head * size : (head + 1) * size], wanted, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rotation_turns_pairs_of_numbers(dtype: torch.dtype) -> None:
    """Number i and number i + e / 2 of a head are a vector that turns by the angle of the position: three roundings."""
    x, angle = made(4, 3, 8, dtype=dtype), torch.linspace(0, 9, 16, dtype=torch.float64).view(4, 1, 4)
    cos, sin = (torch.cat(parts, -1).to(dtype) for parts in ((angle.cos(), angle.cos()), (-angle.sin(), angle.sin())))
    first, second = x.double().chunk(2, -1)
    c, s = cos.double()[..., :4], sin.double()[..., 4:]
    wanted = torch.cat([first * c - second * s, second * c + first * s], -1)
    sums = torch.cat([first.abs() * c.abs() + second.abs() * s.abs(), second.abs() * c.abs() + first.abs() * s.abs()], -1)
    unit = torch.finfo(dtype).eps / 2
    check(rotate(x, (cos, sin)), wanted, 4 * unit * sums)
    out = torch.empty_like(x)
    assert rotate(x, (cos, sin), out=out) is out


def test_bits_are_those_of_dtypes() -> None:
    """`ROUNDINGS` are half the distance from 1 to the next number."""
    for dtype, unit in ROUNDINGS.items():
        one: Any = torch.ones((), dtype=dtype)
        following = (one.view(BITS[dtype]) + 1).view(dtype)
        assert float(following.double() - 1) == 2 * unit
