"""What the commands of ``foredraft theory`` answer, as JSON objects. Numbers are rounded to twelve digits."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from foredraft.core.errors import UserError, whole_number
from foredraft.theory import figures, limits
from foredraft.theory.chains import Pair, Row, total_variation
from foredraft.theory.predict import predict
from foredraft.theory.rejections import (
    batch_rejections,
    lookahead_rejections,
    rejections_by_position,
    speculative_rejections,
    speedup,
)
from foredraft.theory.simulate import simulated_rejections
from foredraft.theory.speedup import Cost, best_length, break_even_acceptance, chain_speedup, chain_tokens
from foredraft.theory.texts import Texts
from foredraft.theory.tradeoff import check_epsilon, curve
from foredraft.theory.transport import multiround_without_replacement, reached, with_replacement, without_replacement

_SMALL = 12
"""Largest number of tokens for which all orders of draws without replacement are enumerated."""


def rejections(
    pair: Pair,
    horizon: int,
    drafts: float | int,
    *,
    lookahead: int | None,
    bonus: bool,
    runs: int,
    seed: int,
    plot: Path | None,
) -> dict[str, Any]:
    """Computes the expected rejections, beside the values for one draft and for infinitely many drafts.

    Args:
        drafts: number of drafts M; may be infinite.
        lookahead: number of tokens drafted per round, which adds the effect of a finite lookahead; None: leaves it out.
        bonus: whether accepted rounds of a finite lookahead emit a bonus token.
        runs: number of simulated runs, whose mean is added; 0: none.
        seed: seed of the simulated runs.
        plot: file of a figure; None: no figure.

    Raises:
        ValueError: the work is above its limit, or p misses a token of q, or infinitely many drafts cannot be combined.
    """
    limits.check_work(pair, horizon, (1 if drafts == inf else int(drafts)) * min(lookahead or 1, horizon))
    if runs and drafts != inf:
        limits.check_runs(pair, horizon, int(drafts), runs)
    if plot is not None:
        limits.check_runs(pair, horizon, figures.MOST_DRAFTS, runs or figures.RUNS)
    pair.require_support()
    expected = batch_rejections(pair, horizon, drafts)
    found: dict[str, Any] = {
        "horizon": horizon,
        "drafts": "inf" if drafts == inf else int(drafts),
        "expected_rejections": _round(expected),
        "by_position": [_round(value) for value in rejections_by_position(pair, horizon, drafts)],
        "one_draft": _round(speculative_rejections(pair, horizon)),
        "limit": _round(batch_rejections(pair, horizon, inf)),
        "speedup": _round(speedup(horizon, expected)),
    }
    if drafts == inf and (lookahead is not None or runs):
        what = "a finite lookahead needs" if lookahead is not None else "simulated runs need"
        raise UserError(f"{what} a finite number of drafts")
    if lookahead is not None:
        rounds = lookahead_rejections(pair, horizon, lookahead, drafts=int(drafts), bonus=bonus)
        found["lookahead"] = {"length": lookahead, "bonus": bonus, **{key: _round(v) for key, v in rounds._asdict().items()}}
    if runs:
        means = simulated_rejections(pair, horizon, int(drafts), runs, seed)
        found["simulated"] = {"runs": runs, "mean": means[-1].value, "standard_error": means[-1].error}
    if plot is not None:
        curves = figures.curves(pair, horizon, runs or figures.RUNS, seed)
        figures.save(figures.rejections(curves, batch_rejections(pair, horizon, inf), runs or figures.RUNS), plot)
        found["largest_deviation"] = max(abs(value) for curve in curves.values() for value in curve.deviations())
    return found


def batch(pair: Pair, horizon: int, most: int) -> dict[str, Any]:
    """Computes the expected rejections for 1 to `most` drafts, and the improvement over one draft."""
    limits.check_work(pair, horizon, most * (most + 1) // 2)
    pair.require_support()
    single = speculative_rejections(pair, horizon)
    rows = [(m, batch_rejections(pair, horizon, m)) for m in (*range(1, most + 1), inf)]
    return {
        "horizon": horizon,
        "by_drafts": [
            {"drafts": "inf" if m == inf else m, "expected_rejections": _round(value), "improvement": _round(single - value)}
            for m, value in rows
        ],
    }


def acceptance(p: np.ndarray, q: np.ndarray, most: int) -> list[dict[str, Any]]:
    """Computes the acceptance of several rules at one node, and the optimum over all rules."""
    rows = []
    for k in range(1, min(most, int((p > 0).sum())) + 1):
        bounds = without_replacement(p, q, k)
        row = {"k": k, **{name: _round(value) for name, value in reached(p, q, k).items()}}
        if len(p) <= _SMALL:
            row["multiround"] = _round(multiround_without_replacement(p, q, k))
        row |= {"optimum_iid": _round(with_replacement(p, q, k)), "optimum_without_replacement": [_round(x) for x in bounds]}
        rows.append(row)
    return rows


def tradeoff(p: Row, q: Row, epsilons: Sequence[float]) -> dict[str, Any]:
    """Computes rejections and loss of over-acceptance, with the best residual and with a redraw from q."""
    for size in epsilons:
        check_epsilon(size)
    points = curve(p, q, epsilons)
    return {
        "total_variation": _round(float(total_variation(p[None], q[None])[0])),
        "points": [
            {"epsilon": size, "reject": _round(opt.reject), "loss": _round(opt.loss), "loss_uno": _round(uno.loss)}
            for size, opt, uno in zip(epsilons, points["opt"], points["uno"], strict=True)
        ],
    }


def speedups(rates: Sequence[float], draft_cost: float | int, verify: Cost, longest: int) -> dict[str, Any]:
    """Computes tokens per step and speed-up of chains of every length up to `longest`.

    Args:
        rates: conditional acceptance probability: one value, or one per depth.
        draft_cost: cost of a draft pass, in plain decoding steps.
        verify: cost of a target step by its number of tokens, in plain decoding steps.

    Raises:
        ValueError: a number is out of range.
    """
    if draft_cost < 0 or longest < 1:
        raise UserError("--draft-cost must be 0 or more and --longest at least 1")
    limits.check_cost("--draft-cost", draft_cost)
    whole_number("--longest", longest, 1, limits.MAX_LENGTH, "the engine drafts 64 deep at most")
    best = best_length(rates, draft_cost, verify, longest)
    return {
        "best_length": best.length,
        "best_speedup": _round(best.speedup),
        "by_length": [
            {
                "length": k,
                "tokens_per_step": _round(chain_tokens(rates, k)),
                "speedup": _round(chain_speedup(rates, k, draft_cost, verify)),
                "break_even_acceptance": _round(break_even_acceptance(k, draft_cost, verify)),
            }
            for k in range(1, longest + 1)
        ],
    }


def predicted(texts: Texts, *, lookahead: int, drafts: Sequence[int]) -> dict[str, Any]:
    """Predicts the rejections of a real pair of models, and compares them with a run, see `predict`."""
    found = predict(texts, lookahead=lookahead, drafts=drafts)
    rows = [
        {
            **row._asdict(),
            "ratio": row.counted / row.predicted if row.predicted else 1.0,
            "z": (row.counted - row.predicted) / row.standard_error if row.standard_error else 0.0,
        }
        for row in found.compared
    ]
    return {**found._asdict(), "compared": rows}


def _round(value: float | None) -> float | None:
    """Rounds to twelve digits, the accuracy of the recursions."""
    return None if value is None else round(float(value), 12)
