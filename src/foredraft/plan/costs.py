"""Measures the costs of steps on this machine: forwards by their rows, and what a way of drafting takes beside them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Target
from foredraft.core.costs import Costs, Point
from foredraft.core.tree import TreeBatch
from foredraft.plan.measure import Timed, seconds_in_turns, typical

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128)
"""Numbers of rows whose forward is timed. Between them, and beyond the last, costs are linear. They are dense where arithmetic
begins to cost more than memory, and where kernels read the weights in blocks of rows."""

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes of trees among which a request's budget moves."""

_MOST_IN_TURNS = 32
"""Larger numbers of rows take turns among themselves. They take long, and so need few steps."""

_TOGETHER = 4
"""Number of requests at which the cost of a further request is measured."""

_TRIES, _STEPS = 3, 6
"""How often the time to catch up is measured, and in how many steps each time."""

_FIRST_STEPS, _TIMED_STEPS = 2, 8
"""Steps that are run before those that are timed, and the number of these."""


def forward_costs(target: Target, prompt: Sequence[int]) -> tuple[Point, ...]:
    """Measures forwards behind a prompt by their rows. Small ones take turns, so that their differences are reliable."""
    rows = [count for count in ROWS if count + len(prompt) <= target.max_len] or [1]
    groups = [count for count in rows if count <= _MOST_IN_TURNS], [count for count in rows if count > _MOST_IN_TURNS]
    seconds = [typical(times) for group in groups if group for times in seconds_in_turns(forwards(target, prompt, group))]
    return tuple((float(count), min(seconds[i:])) for i, count in enumerate(rows))  # more rows cost no less


def costs_of(
    forward: tuple[Point, ...], nodes: int, timed: Callable[[int, int], Timed], tokens: Callable[[int], float]
) -> Costs:
    """Measures the costs of one way of drafting.

    Args:
        forward: what `forward_costs` has measured.
        nodes: number of nodes of the largest tree.
        timed: returns the workload of a number of requests with trees of a size.
        tokens: returns the expected tokens per step of a size.
    """
    outside = []
    for size in sorted({0, 1, -(-nodes // 2), nodes}):
        first, several = outside_s(timed(1, size)), outside_s(timed(_TOGETHER, size))
        outside.append((float(size), first, max(0.0, several - first) / (_TOGETHER - 1)))
    sizes = [size for size in NODES if size < nodes] + [nodes]
    return Costs(forward, tuple(outside), tuple((float(size), tokens(size)) for size in sizes), catch_up_s(timed(1, nodes)))


def outside_s(timed: Timed) -> float:
    """Measures the seconds of a step outside its forward. They are 0 if the workload ends before a step is timed."""
    found = []
    with closing(timed.steps()) as steps:
        for _ in range(_FIRST_STEPS + _TIMED_STEPS):
            began = perf_counter()
            records = next(steps, None)
            whole = perf_counter() - began
            found += [whole - records[0].verify_s] if records else []
    return typical(found[_FIRST_STEPS:]) if found[_FIRST_STEPS:] else 0.0


def catch_up_s(timed: Timed) -> float:
    """Measures the seconds in which a drafter runs a token that it has missed. In its first step, it has missed the prompt."""
    found = []
    for _ in range(_TRIES):
        with closing(timed.steps()) as steps:
            seconds = [records[0].draft_s for records in islice(steps, _STEPS) if records]
        found += [(seconds[0] - median(seconds[1:])) / max(1, len(timed.prompt) - 1)] if len(seconds) > 1 else []
    return max(0.0, median(found)) if found else 0.0


def forwards(target: Target, prompt: Sequence[int], rows: Sequence[int]) -> list[Generator[Any, None, None]]:
    """Returns workloads that run the target behind a prompt again and again, each with a number of rows."""
    pool = target.new_pool(num_blocks(len(prompt) + max(rows)))
    cache = pool.allocate()
    prefill(target, [cache], [list(prompt[:-1])])

    def run(count: int) -> Generator[Any, None, None]:
        batch = TreeBatch.chains([[prompt[-1]] * count])
        while True:
            yield target.forward(batch, [cache]).logits[0, 0].item()  # waits for a GPU

    return [run(count) for count in rows]
