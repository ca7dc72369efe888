"""The figures of ``foredraft theory``, after those of Yin et al. (arXiv 2411.00841)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.core.errors import UserError
from foredraft.core.plots import new_figure
from foredraft.theory.chains import Pair, Row
from foredraft.theory.rejections import rejections_by_position
from foredraft.theory.simulate import Mean, simulated_rejections
from foredraft.theory.speedup import Cost, chain_speedup
from foredraft.theory.tradeoff import curve, front

RUNS = 5000
_SCALE = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48)
MOST_DRAFTS = sum(_SCALE)
"""Total number of drafts in all simulations of a figure."""
_SHADES = 201


def save(figure: Any, path: Path) -> None:
    """Writes a figure. The ending of the file's name decides the format.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        figure.savefig(path, dpi=144)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r} ({error.strerror})") from None


class Curve(NamedTuple):
    """Rejections up to each position.

    Attributes:
        theory: expected rejections.
        means: means over simulated runs.
    """

    theory: Float[np.ndarray, " t"]
    means: Sequence[Mean]

    def deviations(self) -> list[float]:
        """Computes the deviations of the plotted points from the theory, in standard errors."""
        places = drawn(len(self.theory))
        pairs = zip(list(self.means)[places], self.theory[places], strict=True)
        return [(mean.value - line) / mean.error if mean.error else mean.value - line for mean, line in pairs]


def drawn(horizon: int) -> slice:
    """Returns the positions at which points are plotted: about a dozen, including the last."""
    step = max(horizon // 12, 1)
    return slice((horizon - 1) % step, None, step)


def curves(pair: Pair, horizon: int, runs: int, seed: int) -> dict[int, Curve]:
    """Computes the curves of figure 2, by number of drafts."""
    return {
        m: Curve(np.cumsum(rejections_by_position(pair, horizon, m)), simulated_rejections(pair, horizon, m, runs, seed + m))
        for m in _SCALE
    }


def rejections(found: Mapping[int, Curve], limit: float, runs: int) -> Any:
    """Draws figure 2: counted and expected rejections.

    The panels show one draft against N, 4 and 5 drafts against N, and all numbers of drafts M with their limit.
    """
    figure = new_figure(13.0, 4.0)
    left, middle, right = figure.subplots(1, 3)
    horizon = len(found[1].theory)
    label, some, places = f"{runs} runs, 3 s.e.", drawn(horizon), np.arange(1, horizon + 1)
    for axes, counts in ((left, (1,)), (middle, (4, 5))):
        for m in counts:
            axes.plot(places, found[m].theory, label=f"theory, {m} draft{'s' if m > 1 else ''}")
            _points(axes, places[some], list(found[m].means)[some], label)
        axes.set(xlabel="tokens N", ylabel="rejections")
        axes.legend(fontsize="small")
    right.plot(list(found), [curve.theory[-1] for curve in found.values()], label="theory")
    _points(right, list(found), [curve.means[-1] for curve in found.values()], label)
    right.axhline(limit, ls="--", c="grey", label="limit of many drafts")
    right.set(xlabel="drafts M", ylabel=f"rejections in {horizon} tokens", xscale="log")
    right.legend(fontsize="small")
    return figure


def _points(axes: Any, places: Any, means: Sequence[Mean], label: str) -> None:
    axes.errorbar(places, [m.value for m in means], yerr=[3 * m.error for m in means], fmt="o", ms=3, label=label)


def improvement() -> Any:
    """Draws figure 3: by how much M drafts reduce the rejections of one step, for uniform and for Bernoulli laws."""
    figure = new_figure(9.0, 4.0)
    left, right = figure.subplots(1, 2)
    shares = np.linspace(0, 1, _SHADES)
    for m in (2, 4, 8, 32):
        left.plot(shares, uniform_gain(shares, m), label=f"M = {m}")
        right.plot(shares, bernoulli_gain(shares, 0.0 * shares + 0.1, m), label=f"M = {m}")
    left.set(title="p uniform on V tokens, q on V' of them", xlabel="V' / V", ylabel="improvement of a step")
    right.set(title="p = Ber(u), q = Ber(0.1)", xlabel="u", ylabel="improvement of a step")
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    return figure


def uniform_gain(share: np.ndarray, drafts: int) -> np.ndarray:
    """Computes TV - prod TV = (1 - r) - (1 - r)^M for p uniform on V tokens and q uniform on a share r of them."""
    return (1 - share) - (1 - share) ** drafts


def bernoulli_gain(u: np.ndarray, v: np.ndarray, drafts: int) -> np.ndarray:
    """Computes TV - prod TV for p = Ber(u), q = Ber(v): (u - v)(1 - u^(M - 1)) if u >= v, and by symmetry if u < v."""
    high = (u - v) * (1 - u ** (drafts - 1))
    low = (v - u) * (1 - (1 - u) ** (drafts - 1))
    return np.where(u >= v, high, low)


def tradeoff(p: Row, q: Row, epsilons: Sequence[float]) -> Any:
    """Draws the Pareto front with the points of both rules."""
    figure = new_figure(5.5, 4.0)
    axes = figure.subplots()
    line = front(p, q, 2)
    axes.plot([point.reject for point in line], [point.loss for point in line], c="grey", label="Pareto front (Theorem 5)")
    for name, points in curve(p, q, epsilons).items():
        axes.plot([point.reject for point in points], [point.loss for point in points], "o", label=name.upper())
    axes.set(xlabel="probability of a rejection", ylabel="loss (total variation)")
    axes.legend()
    return figure


def speedup(draft_cost: float | int, verify: Cost, longest: int) -> Any:
    """Draws the speed-up of chains against their length, for several acceptances."""
    figure = new_figure(5.5, 4.0)
    axes = figure.subplots()
    lengths = range(1, longest + 1)
    for rate in (0.5, 0.6, 0.7, 0.8, 0.9):
        axes.plot(
            lengths, [chain_speedup(rate, k, draft_cost, verify) for k in lengths], marker=".", label=f"acceptance {rate}"
        )
    axes.axhline(1.0, ls="--", c="grey")
    axes.set(xlabel="draft length", ylabel="speed-up")
    axes.legend(fontsize="small")
    return figure
