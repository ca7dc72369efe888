"""From acceptance and costs to tokens a step and speed-up, for chains and trees.

Costs are in steps of plain decoding at the same batch size: `draft` is one pass of the drafter, `verify` maps the number of
nodes of a tree, root included, to the target's step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Cost = Callable[[int], float]


def chain_tokens(acceptance: float | Sequence[float], length: int) -> float:
    """Tokens a step of a chain: 1 + a_1 + a_1 a_2 + ..., the recovered or bonus token included.

    Args:
        acceptance: of a token once those before it were accepted; one number, or one per depth (the last one goes on).

    Source: Leviathan et al. 2023 (arXiv 2211.17192), equation 1: (1 - a^(K + 1)) / (1 - a) for equal acceptances.
    """
    each = check_acceptance([acceptance] if isinstance(acceptance, float | int) else acceptance)
    rates = [each[min(depth, len(each) - 1)] for depth in range(length)]
    return 1.0 + float(np.cumprod(rates).sum())


def check_acceptance(acceptance: Sequence[float]) -> list[float]:
    """Acceptances as a list.

    Raises:
        ValueError: there are none, or one is outside 0 to 1.
    """
    rates = list(acceptance)
    if not rates or not all(0 <= one <= 1 for one in rates):
        raise ValueError(f"acceptance must be between 0 and 1, got {rates}")
    return rates


def chain_speedup(acceptance: float | Sequence[float], length: int, draft: float | int, verify: Cost) -> float:
    """Tokens a step over the cost of a step: `length` draft passes and one verification of length + 1 nodes."""
    return chain_tokens(acceptance, length) / (length * draft + verify(length + 1))


def tree_speedup(tokens: float | int, passes: float | int, nodes: int, draft: float | int, verify: Cost) -> float:
    """The same for a tree of `nodes` nodes below the root that took `passes` draft passes and gives `tokens` a step."""
    return tokens / (passes * draft + verify(nodes + 1))


class Best(NamedTuple):
    """A draft length and what it gives; length 0 is plain decoding."""

    length: int
    speedup: float


def best_length(acceptance: float | Sequence[float], draft: float | int, verify: Cost, longest: int = 64) -> Best:
    """The chain of most tokens a second; plain decoding where none beats it."""
    every = [Best(0, 1.0)] + [Best(k, chain_speedup(acceptance, k, draft, verify)) for k in range(1, longest + 1)]
    return max(every, key=lambda one: one.speedup)


def break_even_acceptance(length: int, draft: float | int, verify: Cost) -> float | None:
    """The acceptance from which a chain of `length` is as fast as plain decoding; None if even 1 is too little.

    Tokens a step rise with the acceptance, so it is found by bisection, to 1e-12.
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


def break_even_batch(
    tokens: float | int, nodes: int, passes: float | int, seconds: Mapping[int, float], draft_seconds: Cost
) -> int | None:
    """The largest number of requests for which a tree still pays, from a measured cost curve; None if it never does.

    Args:
        tokens: tokens a step of one request.
        nodes: below the root, of one request's tree.
        seconds: number of tokens in a forward of the target -> seconds; interpolated, and only batches within it are looked at.
        draft_seconds: of one draft pass, by the number of requests.
    """
    cost = interpolated(seconds)
    most = max(seconds) // (nodes + 1)
    pays = [b for b in range(1, most + 1) if tokens * cost(b) >= passes * draft_seconds(b) + cost(b * (nodes + 1))]
    return max(pays, default=None)


def interpolated(points: Mapping[int, float]) -> Cost:
    """A cost curve, linear between measured numbers of tokens and flat outside.

    Raises:
        ValueError: nothing was measured, or a cost is not positive.
    """
    if not points or min(points.values()) <= 0:
        raise ValueError(f"a cost curve needs positive seconds at some number of tokens, got {dict(points)}")
    sizes = sorted(points)
    return lambda count: float(np.interp(count, sizes, [points[size] for size in sizes]))
