"""Simulations of the algorithms on Markov chains. All runs are simulated at the same time."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from foredraft.core.errors import UserError
from foredraft.theory.chains import Pair, Rows, residual
from foredraft.theory.rejections import check_drafts


class Mean(NamedTuple):
    """A mean over independent runs and its standard error."""

    value: float
    error: float


def simulated_rejections(pair: Pair, horizon: int, drafts: int, runs: int, seed: int) -> list[Mean]:
    """Simulates Algorithm 4 (Algorithm 1 with one draft), and counts its rejections.

    Drafts extend to the horizon and there is no bonus token. Only a rejection therefore begins a new retry among `drafts`
    tokens.

    Returns:
        The mean number of rejections up to each position n = 1 to `horizon`.

    Source: Yin et al. (arXiv 2411.00841), Algorithms 1 and 4.

    Raises:
        ValueError: drafts or horizon are below 1, or there are fewer than 2 runs.
    """
    check_drafts(drafts)
    if runs < 2:
        raise UserError(f"a standard error needs at least 2 runs, got {runs}")
    rng = np.random.default_rng(seed)
    last, fresh, count = np.zeros(runs, np.int64), np.ones(runs, bool), np.zeros(runs)
    found = []
    for p, q in pair.steps(horizon):
        draft, left = p[last], q[last]
        token, accepted = np.zeros(runs, np.int64), np.zeros(runs, bool)
        for m in range(drafts):
            trying = ~accepted if m == 0 else ~accepted & fresh
            if not trying.any():
                break
            drawn = sample(draft, rng)
            ratio = _at(left, drawn) / _at(draft, drawn)
            wins = trying & (rng.random(runs) < ratio)
            token, accepted = np.where(wins, drawn, token), accepted | wins
            loses = trying & ~wins
            left = np.where(loses[:, None], residual(draft, left), left)
        token = np.where(accepted, token, sample(left, rng))
        count, fresh, last = count + ~accepted, ~accepted, token
        found.append(Mean(float(count.mean()), float(count.std(ddof=1)) / sqrt(runs)))
    return found


def sample(laws: Rows, rng: np.random.Generator) -> Int[np.ndarray, " s"]:
    """Draws one token from every row."""
    bounds = laws.cumsum(-1)
    levels = rng.random(len(laws))[:, None] * bounds[:, -1:]
    return (bounds <= levels).sum(-1).clip(max=laws.shape[1] - 1)


def _at(laws: Rows, tokens: Int[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
    return laws[np.arange(len(laws)), tokens]
