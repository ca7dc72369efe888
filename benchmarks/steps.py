"""Times steps of the compiled decoder by the number of their rows, and prompts, for each instruction set of this machine.

A step is one forward of a tree after a prompt of 64 tokens. Sets, models and sizes take turns in every round, beside a
measurement of the bandwidth of the memory and of the multiply-adds of the set. Every row has the median, the fastest and the
slowest round. A share is the median of the shares of the rounds.

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

from foredraft.bench.bandwidth import arithmetic_peak, read_bandwidth
from foredraft.cache.blocks import num_blocks
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.tree import TreeBatch
from foredraft.kernels import sets
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget

LINEARS = ("qkv", "output", "gate", "up", "down")
ROWS, PROMPT, CONTEXT, REPEATS = (1, 2, 4, 8, 16), 512, 64, 5
CPU = torch.device("cpu")


def forwards(target: NativeTarget) -> Iterator[tuple[int, Any]]:
    """Yields the number of rows of each step and a function that runs it."""
    pool = target.new_pool(num_blocks(CONTEXT + PROMPT))
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


def multiply_adds(target: NativeTarget, rows: int) -> int:
    """Counts the multiply-adds of the linear layers in a step.

    A prompt computes neither logits nor anything behind the keys and values of the last layer.
    """
    model = target._model
    layers = [target._layers[i] for i in range(model.num_layers)]
    sizes = [sum(getattr(layer, name).outputs * getattr(layer, name).inputs for name in LINEARS) for layer in layers]
    if rows < PROMPT:
        return rows * (sum(sizes) + model.vocabulary * model.hidden)
    return rows * (sum(sizes[:-1]) + 2 * model.kv_heads * model.head_dim * model.hidden)


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, models=False, minutes=6)
    parser.add_argument("--model", type=Path, action="append", help="directory of a model; default: the bundled one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sets", nargs="*", help="instruction sets; default: all of this machine but scalar")
    given = parser.parse_args()
    targets = [(str(path.name), load_target(path, dtype=given.dtype, device="cpu")) for path in given.model or [BUNDLED_TARGET]]
    names = given.sets or [name for name in sets.sets_here() if name != "scalar"]
    measured: dict[tuple[str, str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for _ in rounds(given.rounds, given.minutes):
        for name in names:
            with sets.using(sets.code_of(name)):
                for model, target in targets:
                    limits = read_bandwidth(CPU), arithmetic_peak(target.dtype)
                    for rows, run in forwards(target):
                        seconds = fastest(run, 1 if rows == PROMPT else REPEATS)
                        measured[model, name, rows].append((seconds, *limits))
    rows = [row_of(model, name, rows, dict(targets)[model], measured) for model, name, rows in measured]
    columns = ["model", "set", "rows", "ms", "ms_fastest", "times_one_row", "bandwidth_share", "gflops", "peak_share"]
    report(given.output, rows, columns, device=CPU, dtype=given.dtype)


def row_of(
    model: str,
    name: str,
    rows: int,
    target: NativeTarget,
    measured: dict[tuple[str, str, int], list[tuple[float, float, float]]],
) -> dict[str, Any]:
    """Summarises the rounds of one number of rows: times, and the shares of the two limits measured beside them."""
    times, bandwidths, peaks = zip(*measured[model, name, rows], strict=True)
    one_row = [seconds for seconds, *_ in measured[model, name, 1]]
    bytes_read, operations = target.num_weight_bytes, 2 * multiply_adds(target, rows)
    return rounded(
        {
            "model": model,
            "set": name,
            "rows": rows,
            "ms": 1e3 * median(times),
            "ms_fastest": 1e3 * min(times),
            "ms_slowest": 1e3 * max(times),
            "times_one_row": median([mine / one for mine, one in zip(times, one_row, strict=True)]),
            "read_gb_per_s": bytes_read / median(times) / 1e9,
            "bandwidth_gb_per_s": median(bandwidths) / 1e9,
            "bandwidth_share": median([bytes_read / time / read for time, read in zip(times, bandwidths, strict=True)]),
            "gflops": operations / median(times) / 1e9,
            "peak_gflops": median(peaks) / 1e9,
            "peak_share": median([operations / time / peak for time, peak in zip(times, peaks, strict=True)]),
            "rounds": len(times),
        }
    )


if __name__ == "__main__":
    main()
