"""Limits of the theory commands. They are checked before memory is allocated."""

from __future__ import annotations

from math import inf, isfinite
from typing import Any

from foredraft.core.errors import UserError, shown, whole_number
from foredraft.theory.chains import Pair

MAX_HORIZON = 100_000
"""Largest horizon, in tokens. Each token is a pass over the chains. No model's output is longer, and all curves are linear
long before."""

MAX_DRAFTS = 1024
"""Largest number of drafts M. No tree has more nodes."""

MAX_LENGTH = 256
"""Largest draft length of a chain. The engine drafts at most 64 tokens deep."""

_MOST_WORK = 10**10
"""Largest number of multiplications, which take a few minutes on one core."""

_LEAST_PASS = 1000
"""Smallest cost of a pass over the chains, in multiplications. It stands for the overhead of numpy's calls."""

_MOST_RUN_NUMBERS = 1 << 25
"""Largest number of elements in each array of the simulated runs: 256 MiB in float64."""


def check_horizon(horizon: int) -> None:
    """Checks that a horizon is not too long. `Pair.steps` checks that it is at least 1.

    Raises:
        ValueError: the horizon is too long.
    """
    whole_number("--horizon", max(horizon, 1), 1, MAX_HORIZON, "each token is a pass over the chains")


def check_lookahead(lookahead: int) -> None:
    """Checks that a lookahead is not too long.

    Raises:
        ValueError: the lookahead is too long.
    """
    whole_number("--lookahead", max(lookahead, 1), 1, MAX_HORIZON, "no horizon is longer")


def check_drafts(drafts: float | int) -> None:
    """Checks that a number of drafts is not too large. Infinity is allowed, since it is computed as a limit.

    Raises:
        ValueError: the number is too large.
    """
    if drafts != inf:
        whole_number("the number of drafts M", max(drafts, 1), 1, MAX_DRAFTS, "no tree has more nodes; inf gives the limit")


def check_work(pair: Pair, horizon: int, passes: int) -> None:
    """Checks the cost of `passes` passes over the chains at each of `horizon` tokens.

    Raises:
        ValueError: the cost is too high.
    """
    work = horizon * passes * max(pair.vocab_size**2, _LEAST_PASS)
    if work > _MOST_WORK:
        raise UserError(
            f"{horizon} tokens, {pair.vocab_size} states and {passes} passes per token take {work:.1e} multiplications, and "
            f"the limit is {_MOST_WORK:.0e}, a few minutes",
            "Take a shorter horizon, fewer drafts or fewer states",
        )


def check_runs(pair: Pair, horizon: int, drafts: int, runs: int) -> None:
    """Checks the number of simulated runs. All runs are held in memory at the same time.

    Raises:
        ValueError: there are too few or too many runs, or they take too long.
    """
    most = _MOST_RUN_NUMBERS // pair.vocab_size
    whole_number("--simulate", runs, 2, most, f"each run holds {pair.vocab_size} numbers, and all run at the same time")
    work = horizon * drafts * runs * pair.vocab_size
    if work > _MOST_WORK:
        raise UserError(
            f"{runs} simulated runs of {horizon} tokens with {drafts} drafts over {pair.vocab_size} states take {work:.1e} "
            f"operations, and the limit is {_MOST_WORK:.0e}, a few minutes",
            "Take fewer runs or a shorter horizon",
        )


def check_cost(name: str, value: Any) -> None:
    """Checks a cost. `name` names it in the error message.

    Raises:
        ValueError: the cost is negative or not finite.
    """
    if not (isfinite(value) and value >= 0):
        raise UserError(f"{name} must be a finite number, 0 or more, got {shown(value)}")
