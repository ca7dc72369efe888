"""Laws and draws: every instruction set computes the bits of the scalar set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foredraft.kernels.acceptance import Trees, accept_compiled
from foredraft.kernels.layouts import TYPES
from foredraft.kernels.uniforms import uniforms_compiled
from instruction_sets import check_bits, code_of, every_set, stand_ins_of

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


@every_set
@pytest.mark.parametrize("size", SIZES)
def test_verdicts_and_their_numbers(name: str, size: int) -> None:
    """Of trees of all kinds, on two threads."""
    found = [verdicts(code_of(one), size) for one in (name, "scalar")]
    assert found[0] == found[1]
    assert len({*found[0][0]}) > 1


def verdicts(code: Any, size: int) -> list[list[int]]:
    """What an instruction set decides on random trees, greedy and sampled, and the random numbers that it decides by."""
    rng, count = np.random.default_rng(size), 40
    offsets = np.arange(count + 1) * 6
    own, drawn = np.tile(np.arange(6), count), rng.integers(0, 3, 6 * count)
    parents = np.where(own == 0, -1, (rng.random(6 * count) * own).astype(np.int64))
    numbers = uniforms_compiled(code, starts=range(9, 9 + count), words=[5, 7], offsets=offsets, parents=parents)
    trees = Trees(
        offsets=offsets,
        rows=rng.integers(0, 2, count),
        tokens=rng.integers(0, size, 6 * count),
        parents=parents,
        drawn=drawn,
        draft_row=np.where(drawn == 0, -1, rng.integers(0, 7, 6 * count)),
        limits=np.array([(0, -np.inf, 0, 1), (1, -np.inf, 0, 1), (0.7, -4, 5, 0.8), (3, -2, 0, 0.6)] * 10, np.float64),
        uniforms=numbers,
    )
    laws = torch.softmax(logits_of(size).nan_to_num(0, 0, 0), 1)
    logits, found = logits_of(size), []
    code.peak(TYPES[torch.float32], 1, 2)  # makes a team of two threads
    for ids in (None, torch.arange(size).flip(0).expand(7, size).contiguous()):
        found += accept_compiled(code, logits, laws, trees=trees, draft_ids=ids)
    return [*found, numbers.flatten().tolist()]


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
