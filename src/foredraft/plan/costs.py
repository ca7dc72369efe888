"""Measures the costs of steps on this machine: forwards by their rows, and what a way of drafting takes beside them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Target
from foredraft.core.costs import Costs
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.tree import TreeBatch
from foredraft.plan.measure import Timed, seconds_in_turns, typical

ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128)
"""Numbers of rows whose forward is timed. Between them, and beyond the last, costs are linear. They are dense where arithmetic
begins to cost more than memory, and where kernels read the weights in blocks of rows."""

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Sizes of trees among which a request's budget moves."""

_TOGETHER = 4
"""Number of requests at which the cost of a further request is measured."""

_TRIES, _STEPS = 3, 6
"""How often the time to catch up is measured, and in how many steps each time."""


def costs_of(
    target: Target,
    prompt: Sequence[int],
    nodes: int,
    timed: Callable[[int, int], Timed],
    tokens: Callable[[int], float],
) -> Costs:
    """Measures the costs of one way of drafting. Forwards and steps take turns, so that their differences are reliable.

    Args:
        prompt: steps are timed on its continuation.
        nodes: number of nodes of the largest tree.
        timed: returns the workload of a number of requests with trees of a size.
        tokens: returns the expected tokens per step of a size.
    """
    rows = [count for count in ROWS if count + len(prompt) <= target.max_len] or [1]
    places = [(requests, size) for size in sorted({0, 1, -(-nodes // 2), nodes}) for requests in (1, _TOGETHER)]
    workloads = [timed(*place).steps() for place in places]
    seconds = [typical(times) if times else 0.0 for times in seconds_in_turns([*forwards(target, prompt, rows), *workloads])]
    forward = tuple((float(count), min(seconds[i : len(rows)])) for i, count in enumerate(rows))  # more rows cost no less
    alone = Costs(forward, ((0.0, 0.0, 0.0),), ((0.0, 1.0),))
    steps = zip(places, seconds[len(rows) :], strict=True)
    beside = {place: max(0.0, whole - alone.step_s(*place)) for place, whole in steps}
    outside = [
        (float(size), first, max(0.0, beside[_TOGETHER, size] - first) / (_TOGETHER - 1))
        for (requests, size), first in beside.items()
        if requests == 1
    ]
    sizes = [size for size in NODES if size < nodes] + [nodes]
    return Costs(forward, tuple(outside), tuple((float(size), tokens(size)) for size in sizes), catch_up_s(timed(1, nodes)))


def catch_up_s(timed: Timed) -> float:
    """Measures the seconds in which a drafter runs a token that it has missed. In its first step, it has missed the prompt."""
    timed, found = replace(timed, sampling=timed.sampling.giving(RequestOutputKind.CUMULATIVE)), []
    for _ in range(_TRIES):
        with closing(timed.steps()) as steps:
            outputs = [output for result in islice(steps, _STEPS) for output in result]
        seconds = [record.draft_s for record in outputs[-1].outputs[0].records] if outputs else []
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
