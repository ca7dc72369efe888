"""Times steps of the compiled decoder by the number of their rows, and prompts, for each instruction set of this machine.

A step is one forward of a tree after a prompt of 64 tokens. Sets, models and sizes take turns in every round, beside a
measurement of the bandwidth of the memory. Every row has the median, the fastest and the slowest round. The share of the
bandwidth is the median of the shares of the rounds.

    python benchmarks/steps.py --model DIR --output FILE
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from measuring import arguments, median, report, rounded, rounds

from foredraft.bench.bandwidth import read_bandwidth
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.tree import TreeBatch
from foredraft.kernels import sets
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget

ROWS, PROMPT, CONTEXT, REPEATS = (1, 2, 4, 8, 16), 512, 64, 5
CPU = torch.device("cpu")


def forwards(target: NativeTarget) -> Iterator[tuple[int, Any]]:
    """Yields the number of rows of each step and a function that runs it."""
    pool = target.new_pool(1, CONTEXT + PROMPT)
    cache = pool.allocate()
    target.forward(TreeBatch.chains([list(range(3, 3 + CONTEXT))]), [cache], np.arange(0))
    pool.keep([cache], [range(1, CONTEXT)])
    for rows in (*ROWS, PROMPT):
        batch, wanted = TreeBatch.chains([[5] * rows]), np.arange(0) if rows == PROMPT else None
        yield rows, lambda batch=batch, wanted=wanted: target.forward(batch, [cache], wanted)


def fastest(run: Any, repeats: int) -> float:
    """Returns the seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, models=False, minutes=6)
    parser.add_argument("--model", type=Path, action="append", help="directory of a model; default: the bundled one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", nargs="*", help="instruction sets; default: all of this machine but scalar")
    given = parser.parse_args()
    targets = [(str(path.name), load_target(path, dtype=given.dtype, device="cpu")) for path in given.model or [BUNDLED_TARGET]]
    names = given.sets or [name for name in sets.sets_here() if name != "scalar"]
    seconds: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    bandwidths = []
    for _ in rounds(given.rounds, given.minutes):
        bandwidths.append(read_bandwidth(CPU))
        for name in names:
            with sets.using(sets.code_of(name)):
                for model, target in targets:
                    for rows, run in forwards(target):
                        seconds[model, name, rows].append(fastest(run, 1 if rows == PROMPT else REPEATS))
    weights = {model: target.num_weight_bytes for model, target in targets}
    multiply_adds = {model: weights[model] / target.dtype.itemsize for model, target in targets}
    rows = [
        rounded(
            {
                "model": model,
                "set": name,
                "rows": rows,
                "ms": 1e3 * median(times),
                "ms_fastest": 1e3 * min(times),
                "ms_slowest": 1e3 * max(times),
                "times_one_row": median(times) / median(seconds[model, name, 1]),
                "read_gb_per_s": weights[model] / median(times) / 1e9,
                "bandwidth_gb_per_s": median(bandwidths) / 1e9,
                "bandwidth_share": median([weights[model] / time / read for time, read in zip(times, bandwidths, strict=True)]),
                "gflops": 2 * multiply_adds[model] * rows / median(times) / 1e9,
                "rounds": len(times),
            }
        )
        for (model, name, rows), times in seconds.items()
    ]
    columns = ["model", "set", "rows", "ms", "ms_fastest", "times_one_row", "bandwidth_share", "gflops"]
    report(given.output, rows, columns, device=CPU, dtype=given.dtype)


if __name__ == "__main__":
    main()
