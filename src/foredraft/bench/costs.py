"""The seconds of a forward pass on this machine, by the number of its tokens; and their plot beside the acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Target
from foredraft.core.plots import new_figure
from foredraft.core.tree import TreeBatch

COST_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of tokens whose forward pass is timed."""


def cost_curve(target: Target, prompt: Sequence[int], sizes: Sequence[int] = COST_SIZES) -> dict[str, float]:
    """Measures the seconds of a forward pass after a prompt, by the number of nodes of its tree."""
    pool = target.new_pool(num_blocks(target.max_len))
    cache = pool.allocate()
    prefill(target, [cache], [list(prompt)])
    return {str(size): _seconds(target, cache, prompt[-1], size) for size in sizes}


def _seconds(target: Target, cache: Any, token: int, size: int, repeats: int = 9) -> float:
    """Times a binary tree of `size` nodes."""
    batch, times = TreeBatch.chains([[token] * size], [[(node - 1) // 2 for node in range(size)]]), []
    for _ in range(repeats):
        began = perf_counter()
        target.forward(batch, [cache])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return median(times[2:])


def plot(found: dict[str, Any], costs: dict[str, dict[str, float]], path: Path) -> None:
    """Plots the acceptance by sibling rank (left) and the milliseconds of a forward pass (right).

    Args:
        found: the result of `foredraft.bench.calibrate.calibrate`.
        costs: name of a model -> number of tokens -> seconds.
    """
    figure = new_figure(11.0, 4.0)
    left, right = figure.subplots(1, 2)
    for kind, rows in found.get("acceptance", {}).items():
        left.plot(range(1, len(rows) + 1), rows, label=kind)
    left.set(xlabel="sibling rank", ylabel="probability that it is accepted", yscale="log")
    for name, curve in costs.items():
        right.plot([int(size) for size in curve], [1000 * seconds for seconds in curve.values()], marker="o", label=name)
    right.set(xlabel="tokens in a forward pass", ylabel="milliseconds", xscale="log", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(path)
