"""Measures the time of a forward of decoding requests by their context, and what the rows of a prompt add to it.

    python benchmarks/prompt_rows.py --model DIR --output FILE

A row of the output describes a forward by the number of requests that decode, their context and the rows of a prompt. `ms` is
its median time over the rounds. `prompt_tokens_per_s` counts only the time that the prompt adds. The peak of the multiply-adds
and the read bandwidth are measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measuring import arguments, median, report, rounded, rounds

from foredraft import LLM
from foredraft.bench.bandwidth import arithmetic_peak, read_bandwidth
from foredraft.cache.blocks import num_blocks
from foredraft.core.tree import TreeBatch
from foredraft.engine.one_thread import one_thread

REQUESTS, CONTEXT, LONGEST = 16, 200, 1024
FORWARDS = [
    *[(1, context, 0) for context in (0, 512)],
    *[(REQUESTS, context, 0) for context in (0, 128, CONTEXT, 512)],
    *[(REQUESTS, CONTEXT, rows) for rows in (16, 48, 112, 240, 496)],
]
"""Requests that decode, their context, and the rows of a prompt."""


def seconds(llm: LLM, pool: Any, forward: tuple[int, int, int]) -> float:
    """Returns the time of the fastest of three forwards, after a first one that is not counted."""
    requests, context, rows = forward
    contexts = [context] * requests + [0] * (rows > 0)
    batch = TreeBatch.chains([[5]] * requests + [[5] * rows] * (rows > 0))
    caches, times = [pool.allocate() for _ in contexts], []
    try:
        for cache, length in zip(caches, contexts, strict=True):
            cache.reserve(length + rows + 1)
            cache.length = length
        with one_thread:
            for _ in range(4):
                began = perf_counter()
                llm.target.forward(batch, caches, np.arange(requests))
                times.append(perf_counter() - began)
    finally:
        for cache in caches:
            pool.free(cache)
    return min(times[1:])


def rows_of(times: Mapping[tuple[int, int, int], Sequence[float]]) -> list[dict[str, Any]]:
    """Makes a row for each forward."""
    found = []
    for (requests, context, rows), values in times.items():
        row: dict[str, Any] = {"requests": requests, "context": context, "prompt_rows": rows, "ms": 1e3 * median(values)}
        if rows:
            without = times[requests, context, 0]
            row["prompt_tokens_per_s"] = median([rows / (mine - base) for mine, base in zip(values, without, strict=True)])
        found.append(row)
    return found


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, minutes=3)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    limits = {"max_num_seqs": REQUESTS + 1, "max_model_len": LONGEST, "enable_prefix_caching": False}
    llm = LLM(given.model, {"method": "ar"}, dtype=given.dtype, device="cpu", **limits)
    pool = llm.target.new_pool(num_blocks(LONGEST, REQUESTS + 1))
    times: dict[tuple[int, int, int], list[float]] = {forward: [] for forward in FORWARDS}
    peaks, bandwidths = [], []
    for _ in rounds(given.rounds, given.minutes):
        peaks.append(arithmetic_peak(torch.bfloat16) / 1e9)
        bandwidths.append(read_bandwidth(torch.device("cpu")) / 1e9)
        for forward, found in times.items():
            found.append(seconds(llm, pool, forward))
    shared = {"peak_gflops": median(peaks), "read_gb_per_s": median(bandwidths), "rounds": len(peaks)}
    rows = [rounded({**row, **shared}) for row in rows_of(times)]
    columns = ["requests", "context", "prompt_rows", "ms", "prompt_tokens_per_s", "peak_gflops", "read_gb_per_s"]
    report(given.output, rows, columns, device=torch.device("cpu"), dtype=given.dtype)


if __name__ == "__main__":
    main()
