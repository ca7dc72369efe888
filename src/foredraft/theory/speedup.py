"""Tokens per step and speed-up of chains and trees, from acceptances and costs.

Costs are relative to a step of plain decoding at the same batch size. `draft` is the cost of one pass of the drafter. `verify`
maps the number of nodes of a tree (root included) to the cost of the target's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from foredraft.core.errors import UserError

Cost = Callable[[int], float]


def chain_tokens(acceptance: float | Sequence[float], length: int) -> float:
    """Computes the tokens per step of a chain: 1 + a_1 + a_1 a_2 + ..., with the recovered or bonus token.

    Args:
        acceptance: probability that a token is accepted, given that all tokens before it were accepted. It is one number, or
            one number per depth; the last one applies to all deeper tokens.
        length: draft length.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1: (1 - a^(K + 1)) / (1 - a) for equal acceptances.
    """
    each = check_acceptance([acceptance] if isinstance(acceptance, float | int) else acceptance)
    rates = [each[min(depth, len(each) - 1)] for depth in range(length)]
    return 1.0 + float(np.cumprod(rates).sum())


def check_acceptance(acceptance: Sequence[float]) -> list[float]:
    """Checks acceptances, and returns them as a list.

    Raises:
        ValueError: the list is empty, or a number is outside 0 to 1.
    """
    rates = list(acceptance)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise UserError(f"acceptance must be between 0 and 1, got {rates}")
    return rates


def chain_speedup(acceptance: float | Sequence[float], length: int, draft: float | int, verify: Cost) -> float:
    """Computes the speed-up of a chain: tokens per step, divided by the cost of a step.

    A step takes `length` draft passes and one verification of length + 1 nodes.
    """
    return chain_tokens(acceptance, length) / (length * draft + verify(length + 1))


class Best(NamedTuple):
    """A draft length and its speed-up. Length 0 is plain decoding."""

    length: int
    speedup: float


def best_length(acceptance: float | Sequence[float], draft: float | int, verify: Cost, longest: int = 64) -> Best:
    """Finds the draft length (0 to `longest`) with the most tokens per second. 0 means that plain decoding is fastest."""
    lengths = [Best(0, 1.0)] + [Best(k, chain_speedup(acceptance, k, draft, verify)) for k in range(1, longest + 1)]
    return max(lengths, key=lambda best: best.speedup)


def break_even_acceptance(length: int, draft: float | int, verify: Cost) -> float | None:
    """Finds the acceptance at which a chain is as fast as plain decoding; None if the chain is slower even at 1.

    Tokens per step rise with the acceptance, so bisection finds it, to 1e-12.
    """
    low, high = 0.0, 1.0
    if chain_speedup(1.0, length, draft, verify) < 1:
        return None
    if chain_speedup(0.0, length, draft, verify) >= 1:
        return 0.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if chain_speedup(middle, length, draft, verify) >= 1 else (middle, high)
    return high


def interpolated(points: Mapping[int, float]) -> Cost:
    """Makes a cost curve that is linear between the measured numbers of tokens, and constant outside.

    Raises:
        ValueError: there is no measurement, or a cost is not positive.
    """
    if not points or min(points.values()) <= 0:
        raise UserError(f"a cost curve needs at least one number of tokens with a positive cost, got {dict(points)}")
    sizes = sorted(points)
    return lambda count: float(np.interp(count, sizes, [points[size] for size in sizes]))
