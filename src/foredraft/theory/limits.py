"""What the theory commands compute at most, checked before anything is allocated."""

from __future__ import annotations

from math import inf, isfinite
from typing import Any

from foredraft.errors import shown, whole_number
from foredraft.theory.chains import Pair

MAX_HORIZON = 100_000
"""Tokens: each is one pass over the chains. No output of a model is longer, and every figure is linear long before."""

MAX_DRAFTS = 1024
"""Drafts M: no tree has more nodes."""

MAX_LENGTH = 256
"""Draft length of a chain; the engine drafts 64 deep at most."""

_MOST_WORK = 10**10
"""Multiplications: a few minutes on one core."""

_LEAST_PASS = 1000
"""What a pass over small chains costs, in multiplications: numpy takes as long to begin."""

_MOST_RUN_NUMBERS = 1 << 25
"""Numbers that simulated runs keep in each of their arrays: 256 MiB in float64."""


def check_horizon(horizon: int) -> None:
    """Checks that a horizon is not too long; that it is at least 1 is checked where it is used.

    Raises:
        ValueError: it is.
    """
    whole_number("--horizon", max(horizon, 1), 1, MAX_HORIZON, "each token is a pass over the chains")


def check_lookahead(lookahead: int) -> None:
    """Checks that a lookahead is not too long.

    Raises:
        ValueError: it is.
    """
    whole_number("--lookahead", max(lookahead, 1), 1, MAX_HORIZON, "no horizon is longer")


def check_drafts(drafts: float | int) -> None:
    """Checks that a number of drafts is not too large; infinitely many are a limit of their own.

    Raises:
        ValueError: it is.
    """
    if drafts != inf:
        whole_number("the number of drafts M", max(drafts, 1), 1, MAX_DRAFTS, "no tree has more nodes; inf gives the limit")


def check_work(pair: Pair, horizon: int, passes: int) -> None:
    """Checks what `passes` passes over the chains at each of `horizon` tokens cost.

    Raises:
        ValueError: it is too much.
    """
    work = horizon * passes * max(pair.vocab_size**2, _LEAST_PASS)
    if work > _MOST_WORK:
        raise ValueError(
            f"{horizon} tokens, {pair.vocab_size} states and {passes} passes a token take {work:.1e} multiplications, and "
            f"at most {_MOST_WORK:.0e} are made, a few minutes. Take a shorter horizon, fewer drafts or fewer states"
        )


def check_runs(pair: Pair, horizon: int, drafts: int, runs: int) -> None:
    """Checks a number of simulated runs, whose laws are all kept at once.

    Raises:
        ValueError: there are too few or too many, or they take too long.
    """
    most = _MOST_RUN_NUMBERS // pair.vocab_size
    whole_number("--simulate", runs, 2, most, f"each run keeps {pair.vocab_size} numbers, and all run at once")
    work = horizon * drafts * runs * pair.vocab_size
    if work > _MOST_WORK:
        raise ValueError(
            f"{runs} simulated runs of {horizon} tokens with {drafts} drafts over {pair.vocab_size} states take {work:.1e} "
            f"operations, and at most {_MOST_WORK:.0e} are made, a few minutes. Take fewer runs or a shorter horizon"
        )


def check_cost(name: str, value: Any) -> None:
    """Checks a cost.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, 0 or more, got {shown(value)}")
