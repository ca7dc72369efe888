"""How many rows a step may run on this machine, so that requests that decode never wait long for the prompts of others."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from foredraft.cache.blocks import num_blocks
from foredraft.core.contracts import Target
from foredraft.core.tree import TreeBatch
from foredraft.plan.measure import facts_of
from foredraft.plan.store import recalled

STEP_S = 1.0
"""A step with prompts takes about this many seconds at most. With shorter steps, a prompt has more parts, and its first token
comes later. With longer ones, the tokens of others come later. Prompts are read equally fast from some 50 rows on."""

LEAST, MOST = 128, 2048
"""Bounds of the number of rows, which is a multiple of `LEAST`. Slow machines take longer than `STEP_S` for the smallest."""

_PROBE = 48
"""Rows of the prompt that is timed."""


def rows_of_step(target: Target, weights: Sequence[str | None]) -> int:
    """Returns the number of rows of a step, from the time of a short prompt. It is measured once on this machine and stored.

    Args:
        weights: fingerprints of the target, see `facts_of`.
    """
    found = recalled("rows", [facts_of(target, weights), LEAST, MOST, STEP_S], lambda: {"row_s": _row_s(target)})
    return min(MOST, max(LEAST, int(STEP_S / found["row_s"]) // LEAST * LEAST))


def _row_s(target: Target) -> float:
    """Measures the seconds of a row of a prompt. The first forward is a warm-up."""
    count, seconds = min(_PROBE, target.max_len), []
    cache = target.new_pool(num_blocks(count)).allocate()
    batch = TreeBatch.chains([[i % target.vocab_size for i in range(count)]])
    for _ in range(6):
        began = perf_counter()
        target.forward(batch, [cache], np.array([count - 1])).logits[0, 0].item()  # waits for a GPU
        seconds.append(perf_counter() - began)
    return min(seconds[1:]) / count
