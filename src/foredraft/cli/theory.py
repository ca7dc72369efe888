"""``foredraft theory``: runs its commands, prints their results as JSON or as tables, and writes their figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from foredraft.core.errors import shown, whole_number
from foredraft.core.params import RANDOM_SEED, check_seed, used_seed
from foredraft.theory import figures, limits
from foredraft.theory.chains import Pair, checked_law, iid_pair, random_pair, read_pair, total_variation
from foredraft.theory.rejections import (
    batch_rejections,
    lookahead_rejections,
    rejections_by_position,
    speculative_rejections,
    speedup,
)
from foredraft.theory.simulate import simulated_rejections
from foredraft.theory.speedup import best_length, break_even_acceptance, chain_speedup, chain_tokens
from foredraft.theory.tradeoff import check_epsilon, curve
from foredraft.theory.transport import multiround_without_replacement, reached, with_replacement, without_replacement

_SMALL = 12
"""Largest number of tokens for which all orders of draws without replacement are enumerated."""


class Laws(NamedTuple):
    """Source of the laws. Exactly one source must be given: `p` and `q`, `file`, or `states`.

    Attributes:
        p, q: two laws, as numbers separated by commas.
        file: a JSON file of laws.
        states: number of states of random chains.
        seed: seed of random chains and of simulated runs.
    """

    p: str | None = None
    q: str | None = None
    file: Path | None = None
    states: int | None = None
    seed: int = 0

    def pair(self, horizon: int) -> Pair:
        """Reads or draws the chains.

        Raises:
            ValueError: not exactly one source is given, or it holds no valid laws.
        """
        given = [(self.p or self.q) is not None, self.file is not None, self.states is not None]
        if sum(given) != 1 or (self.p is None) != (self.q is None):
            raise ValueError("give the laws once: --p and --q (such as 0.5,0.5), --laws FILE, or --states N for random laws")
        if self.file is not None:
            return read_pair(self.file)
        if self.states is not None:
            return random_pair(self.states, max(horizon, 1), self.seed)
        return iid_pair(*self.rows())

    def seeded(self) -> Laws:
        """Replaces the seed -1 by a random seed from the operating system.

        Raises:
            ValueError: the seed is neither a valid seed nor -1.
        """
        return self._replace(seed=used_seed(check_seed(self.seed, "--seed")))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Parses the two laws that are given as numbers.

        Raises:
            ValueError: they are missing, or are not laws over the same vocabulary.
        """
        if self.p is None or self.q is None:
            raise ValueError("this command needs one pair of laws: give them as in --p 0.5,0.3,0.2 --q 0.2,0.3,0.5")
        p, q = (checked_law(numbers(text, f"--{name}"), name) for name, text in (("p", self.p), ("q", self.q)))
        if len(p) != len(q):
            raise ValueError(f"p has {len(p)} tokens and q {len(q)}: they must be laws over the same vocabulary")
        return p, q


def numbers(text: str, what: str) -> list[float]:
    """Parses numbers separated by commas. `what` names them in the error message.

    Raises:
        ValueError: a part is not a number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what} must be numbers separated by commas, got {shown(text)}") from None


def whole_numbers(text: str, what: str) -> list[int]:
    """Parses whole numbers separated by commas. `what` names them in the error message.

    Raises:
        ValueError: a part is not a whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{what} must be whole numbers separated by commas, got {shown(text)}") from None


def whole_or_inf(text: str) -> float | int:
    """Parses a number of drafts.

    Raises:
        ValueError: the text is neither a whole number nor ``inf``.
    """
    try:
        return inf if text == "inf" else int(text)
    except ValueError:
        raise ValueError(f"--drafts must be a whole number or inf, got {shown(text)}") from None


def rejections(
    laws: Laws,
    *,
    horizon: int,
    drafts: str,
    lookahead: int | None,
    bonus: bool,
    runs: int,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Prints the expected rejections, beside the values for one draft and for infinitely many drafts.

    With `lookahead` it adds the effect of a finite lookahead, with `runs` the mean of simulated runs, with `plot` a figure.
    """
    limits.check_horizon(horizon)
    count, laws, is_random = whole_or_inf(drafts), laws.seeded(), laws.seed == RANDOM_SEED
    limits.check_drafts(count)
    if lookahead is not None:
        limits.check_lookahead(lookahead)
    pair = laws.pair(horizon)
    limits.check_work(pair, horizon, (1 if count == inf else int(count)) * min(lookahead or 1, horizon))
    if runs and count != inf:
        limits.check_runs(pair, horizon, int(count), runs)
    if plot is not None:
        limits.check_runs(pair, horizon, figures.MOST_DRAFTS, runs or figures.RUNS)
    pair.require_support()
    expected = batch_rejections(pair, horizon, count)
    found: dict[str, Any] = {
        "horizon": horizon,
        "drafts": "inf" if count == inf else int(count),
        "expected_rejections": _round(expected),
        "by_position": [_round(value) for value in rejections_by_position(pair, horizon, count)],
        "one_draft": _round(speculative_rejections(pair, horizon)),
        "limit": _round(batch_rejections(pair, horizon, inf)),
        "speedup": _round(speedup(horizon, expected)),
    } | ({"seed": laws.seed} if is_random else {})
    if lookahead is not None:
        if count == inf:
            raise ValueError("a finite lookahead needs a finite number of drafts")
        rounds = lookahead_rejections(pair, horizon, lookahead, drafts=int(count), bonus=bonus)
        found["lookahead"] = {"length": lookahead, "bonus": bonus, **{key: _round(v) for key, v in rounds._asdict().items()}}
    if runs:
        if count == inf:
            raise ValueError("simulated runs need a finite number of drafts")
        means = simulated_rejections(pair, horizon, int(count), runs, laws.seed)
        found["simulated"] = {"runs": runs, "mean": means[-1].value, "standard_error": means[-1].error}
    if plot is not None:
        curves = figures.curves(pair, horizon, runs or figures.RUNS, laws.seed)
        figures.save(figures.rejections(curves, batch_rejections(pair, horizon, inf), runs or figures.RUNS), plot)
        found["largest_deviation"] = max(abs(value) for curve in curves.values() for value in curve.deviations())
    _report(found, as_json)
    return 0


def batch(laws: Laws, *, horizon: int, most: int, plot: Path | None, as_json: bool) -> int:
    """Prints the expected rejections for 1 to `most` drafts, and the improvement over one draft."""
    if most < 1:
        raise ValueError(f"the number of drafts M must be a whole number of at least 1, got {most}")
    limits.check_horizon(horizon)
    limits.check_drafts(most)
    laws, is_random = laws.seeded(), laws.seed == RANDOM_SEED
    pair = laws.pair(horizon)
    limits.check_work(pair, horizon, most * (most + 1) // 2)
    pair.require_support()
    single = speculative_rejections(pair, horizon)
    rows = [(m, batch_rejections(pair, horizon, m)) for m in (*range(1, most + 1), inf)]
    found = {
        "horizon": horizon,
        "by_drafts": [
            {"drafts": "inf" if m == inf else m, "expected_rejections": _round(value), "improvement": _round(single - value)}
            for m, value in rows
        ],
    } | ({"seed": laws.seed} if is_random else {})
    if laws.p is not None:
        found["acceptance"] = _acceptance(*laws.rows(), most)
    if plot is not None:
        figures.save(figures.improvement(), plot)
    _report(found, as_json)
    return 0


def _acceptance(p: np.ndarray, q: np.ndarray, most: int) -> list[dict[str, Any]]:
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


def tradeoff(laws: Laws, *, epsilons: str, plot: Path | None, as_json: bool) -> int:
    """Prints rejections and loss of over-acceptance, with the best residual and with a redraw from q."""
    p, q = laws.rows()
    sizes = numbers(epsilons, "--epsilon")
    for size in sizes:
        check_epsilon(size)
    points = curve(p, q, sizes)
    found = {
        "total_variation": _round(float(total_variation(p[None], q[None])[0])),
        "points": [
            {
                "epsilon": size,
                "reject": _round(opt.reject),
                "loss": _round(opt.loss),
                "loss_uno": _round(uno.loss),
            }
            for size, opt, uno in zip(sizes, points["opt"], points["uno"], strict=True)
        ],
    }
    if plot is not None:
        figures.save(figures.tradeoff(p, q, sizes), plot)
    _report(found, as_json)
    return 0


def speedups(
    *, acceptance: str, draft_cost: float | int, verify_cost: str, longest: int, plot: Path | None, as_json: bool
) -> int:
    """Prints tokens per step and speed-up of chains of every length up to `longest`."""
    rates, verify = numbers(acceptance, "--acceptance"), verify_costs(verify_cost)
    if draft_cost < 0 or longest < 1:
        raise ValueError("--draft-cost must be 0 or more and --longest at least 1")
    limits.check_cost("--draft-cost", draft_cost)
    whole_number("--longest", longest, 1, limits.MAX_LENGTH, "the engine drafts 64 deep at most")
    best = best_length(rates, draft_cost, verify, longest)
    found = {
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
    if plot is not None:
        figures.save(figures.speedup(draft_cost, verify, longest), plot)
    _report(found, as_json)
    return 0


def estimated(texts: Any, *, states: int, output: Path) -> int:
    """Estimates the chains of a real pair of models, and writes them to a file."""
    from foredraft.theory.estimate import as_json, estimated_pair

    texts, is_random = _seeded(texts)
    pair, tokens = estimated_pair(texts, states)
    try:
        output.write_text(json.dumps(as_json(pair, tokens)) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {str(output)!r} ({error.strerror})") from None
    Console(highlight=False, soft_wrap=True).print(
        f"chains over {pair.vocab_size} states are in {output}; read them with --laws {output}"
        + (f" (seed {texts.seed})" if is_random else "")
    )
    return 0


def predicted(texts: Any, *, lookahead: int, drafts: Sequence[int], as_json: bool) -> int:
    """Predicts the rejections of a real pair of models, and compares them with a run."""
    from foredraft.theory.predict import predict

    texts, is_random = _seeded(texts)
    found = predict(texts, lookahead=lookahead, drafts=drafts)
    rows = [
        {
            **row._asdict(),
            "ratio": row.counted / row.predicted if row.predicted else 1.0,
            "z": (row.counted - row.predicted) / row.standard_error if row.standard_error else 0.0,
        }
        for row in found.compared
    ]
    _report({**found._asdict(), "compared": rows} | ({"seed": texts.seed} if is_random else {}), as_json)
    return 0


def _seeded(texts: Any) -> tuple[Any, bool]:
    """Replaces the seed -1 by a random seed from the operating system, and returns whether it did."""
    return replace(texts, seed=used_seed(texts.seed)), texts.seed == RANDOM_SEED


def verify_costs(text: str) -> Any:
    """Parses a cost curve, in steps of plain decoding, such as ``1:1,8:1.2``. A single number applies to every tree.

    Raises:
        ValueError: the text is neither, or a cost is invalid.
    """
    from foredraft.theory.speedup import interpolated

    try:
        points = (
            {int(a): float(b) for a, b in (part.split(":") for part in text.split(","))} if ":" in text else {1: float(text)}
        )
    except ValueError:
        raise ValueError(f"--verify-cost must be a number or NODES:COST,NODES:COST, got {text!r}") from None
    for nodes, cost in points.items():
        whole_number("the nodes of --verify-cost", nodes, 1, limits.MAX_HORIZON)
        limits.check_cost("--verify-cost", cost)
    return interpolated(points)


def _round(value: float | None) -> float | None:
    """Rounds to twelve digits, the accuracy of the recursions."""
    return None if value is None else round(float(value), 12)


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    out = Console(highlight=False, soft_wrap=True)
    for key, value in found.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            out.print(_table(key, value))
        else:
            out.print(f"{key.replace('_', ' ')}: {_formatted(value)}")


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*(key.replace("_", " ") for key in rows[0]), title=title.replace("_", " "), box=SIMPLE)
    for row in rows:
        table.add_row(*(_formatted(value) for value in row.values()))
    return table


def _formatted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_formatted(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_formatted(item)}" for key, item in value.items())
    return str(value)
