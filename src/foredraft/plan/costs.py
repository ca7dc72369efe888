"""Measures the costs of steps on this machine: forwards by their rows, and what a way of drafting takes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from time import perf_counter

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Target
from foredraft.core.costs import Costs
from foredraft.core.tree import TreeBatch
from foredraft.plan.measure import Timed

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows whose forward is timed. Between them, and beyond the last, costs are linear."""

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes of trees among which a request's budget moves."""

_TOGETHER = 4
"""Number of requests at which the cost of a further request is measured."""

_REPEATS, _ENOUGH_S = 7, 0.25
"""Forwards of one size, and the seconds after which fewer suffice."""

_STEPS = 10
"""Timed steps of each size of a tree, after as many as a warm-up."""


def costs_of(
    target: Target,
    prompt: Sequence[int],
    nodes: int,
    timed: Callable[[int, int], Sequence[tuple[float, Timed]]],
    tokens: Callable[[int], float],
) -> Costs:
    """Measures the costs of one way of drafting.

    Args:
        prompt: steps are timed on its continuation.
        nodes: number of nodes of the largest tree.
        timed: returns the workloads of a number of requests with trees of a size, each with its share of the steps.
        tokens: returns the expected tokens per step of a size.
    """
    forward = [(float(rows), seconds) for rows, seconds in forward_seconds(target, prompt).items()]
    rows = Costs(tuple(forward), ((0.0, 0.0, 0.0),), ((0.0, 1.0),))
    outside = []
    for size in sorted({0, max(1, nodes // 2), nodes}):
        one, some = (
            max(0.0, sum(share * step_seconds(work) for share, work in timed(requests, size)) - rows.step_s(requests, size))
            for requests in (1, _TOGETHER)
        )
        outside.append((float(size), one, max(0.0, some - one) / (_TOGETHER - 1)))
    sizes = [size for size in NODES if size < nodes] + [nodes]
    return Costs(tuple(forward), tuple(outside), tuple((float(size), tokens(size)) for size in sizes))


def forward_seconds(target: Target, prompt: Sequence[int]) -> dict[int, float]:
    """Measures the seconds of a forward behind a prompt, by its number of rows."""
    sizes = [size for size in ROWS if size + len(prompt) <= target.max_len] or [1]
    pool = target.new_pool(num_blocks(len(prompt) + sizes[-1]))
    cache = pool.allocate()
    prefill(target, [cache], [list(prompt[:-1])])
    seconds = {size: _forward_seconds(target, cache, TreeBatch.chains([[prompt[-1]] * size])) for size in sizes}
    return {size: min(found for rows, found in seconds.items() if rows >= size) for size in sizes}  # more rows cost no less


def _forward_seconds(target: Target, cache: object, batch: TreeBatch) -> float:
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 3 or sum(times) < _ENOUGH_S):
        began = perf_counter()
        target.forward(batch, [cache]).logits.max().item()  # waits for a GPU
        times.append(perf_counter() - began)
    return sorted(times)[len(times) // 4]


def step_seconds(timed: Timed) -> float:
    """Measures the seconds of a step of a workload, without the slowest quarter of its steps."""
    steps, seconds = timed.steps(), []
    try:
        for _ in range(2 * _STEPS):
            began = perf_counter()
            if next(steps, None) is None:
                break
            seconds.append(perf_counter() - began)
    finally:
        steps.close()
    kept = sorted(seconds[len(seconds) // 2 :])
    return fmean(kept[: max(1, len(kept) * 3 // 4)]) if kept else 0.0
