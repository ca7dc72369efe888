"""Reports of a benchmark: rows of results with confidence intervals, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from foredraft.bench.run import Contender, Outcome
from foredraft.bench.tasks import is_looping
from foredraft.core.metrics import SPLIT, summarize
from foredraft.core.plots import new_figure
from foredraft.plan.speculation import PLAIN

_RESAMPLES = 2000


def rows_of(contenders: Sequence[Contender], rounds: Sequence[dict[str, Outcome]], temperature: float) -> list[dict[str, Any]]:
    """Computes a row of results per contender. Speed-ups are relative to plain decoding of the same batches.

    Args:
        rounds: for each batch, the outcome of every contender by its name.
    """
    plain = [outcomes[PLAIN] for outcomes in rounds]
    not_looping = [i for i, outcome in enumerate(plain) if not any(map(is_looping, outcome.token_ids))]
    outputs = [ids for outcome in plain for ids in outcome.token_ids]
    looping = sum(map(is_looping, outputs)) / len(outputs)
    rows = []
    for contender in contenders:
        outcomes = [batch[contender.name] for batch in rounds]
        ratio, low, high = speedup(plain, outcomes)
        row = {"name": contender.name, **contender.setting, "temperature": temperature}
        row |= _counts(outcomes)
        row |= {"speedup": ratio, "speedup_low": low, "speedup_high": high}
        if not_looping and len(not_looping) < len(plain):
            row["speedup_not_looping"] = speedup([plain[i] for i in not_looping], [outcomes[i] for i in not_looping])[0]
        row["looping_share"] = looping
        rows.append({key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seconds, num_tokens = sum(outcome.seconds for outcome in outcomes), sum(outcome.num_tokens for outcome in outcomes)
    found: dict[str, Any] = {
        "num_prompts": sum(len(outcome.token_ids) for outcome in outcomes),
        "num_tokens": num_tokens,
        "ms_per_token": 1000 * seconds / max(num_tokens, 1),
        "tokens_per_s": num_tokens / seconds,
    }
    records = [record for outcome in outcomes for request in outcome.records for record in request]
    if records:
        metrics = summarize(records)
        found |= {
            "num_steps": metrics.num_steps,
            "acceptance_length": metrics.acceptance_length,
            "acceptance_rate": metrics.acceptance_rate,
            "joint_acceptance_rate": [round(rate, 4) for rate in metrics.joint_acceptance_rate],
        }
        split = {name: sum(getattr(outcome.metrics, name) for outcome in outcomes) for name in SPLIT}
        found |= {**split, "other_s": seconds - sum(split.values())}
        found["peak_memory_mb"] = max(outcome.peak_bytes or 0 for outcome in outcomes) / 2**20
    return found


def speedup(plain: Sequence[Outcome], outcomes: Sequence[Outcome]) -> tuple[float, float, float]:
    """Computes the speed-up: seconds per token of plain decoding, divided by those of a method.

    Returns:
        The speed-up, and the ends of its 95 % bootstrap interval over batches of prompts.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval.
    """
    parts = np.array([[a.seconds, a.num_tokens, b.seconds, b.num_tokens] for a, b in zip(plain, outcomes, strict=True)])
    picks = np.random.default_rng(0).integers(len(parts), size=(_RESAMPLES, len(parts)))
    low, high = np.quantile(_ratio(parts[picks].sum(axis=1)), [0.025, 0.975])
    return float(_ratio(parts.sum(axis=0)[None])[0]), float(low), float(high)


def _ratio(sums: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    return (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])


def setting_of(row: dict[str, Any]) -> str:
    """Describes the setting of a method in a few words."""
    if "method" in row:
        return " ".join(str(row[key]) for key in ("tree", "budget", "rule") if row[key] is not None)
    known = {
        "threads": "threads",
        "num_assistant_tokens": "drafts",
        "num_speculative_tokens": "drafts",
        "confidence": "confidence",
    }
    parts = [f"{short} {row[key]:g}" for key, short in known.items() if key in row]
    return " ".join([*parts, *(["compiled" if row["compiled"] else "eager"] if "compiled" in row else [])])


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plots the speed-ups with their intervals (left) and the parts of the time per token (right).

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(11.0, 0.4 * len(rows) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["name"] for row in rows]
    values = np.array([row["speedup"] for row in rows])
    errors = np.abs(np.array([[row["speedup_low"], row["speedup_high"]] for row in rows]).T - values)
    left.barh(names, values, xerr=errors, color="#4c78a8", error_kw={"ecolor": "#333333", "capsize": 2})
    left.axvline(1.0, color="#333333", linewidth=0.8)
    left.set_xlabel("speed-up against plain decoding (95 % interval)")
    left.invert_yaxis()
    _plot_split(right, rows, names)
    figure.suptitle(title)
    figure.savefig(path)


def _plot_split(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    done = np.zeros(len(rows))
    for part in (*SPLIT, "other_s"):
        widths = np.array([1000 * row.get(part, 0.0) / row["num_tokens"] for row in rows])
        axes.barh(names, widths, left=done, label=part.removesuffix("_s"))
        done += widths
    axes.set_xlabel("milliseconds per token")
    axes.legend(fontsize="small")
