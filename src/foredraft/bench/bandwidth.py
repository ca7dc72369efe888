"""The limits of this machine: the memory bandwidth, and the multiply-adds of the processor.

The bandwidth limits the speed of a step with few tokens, the multiply-adds that of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from foredraft.bench.run import Outcome
from foredraft.core.contracts import Target
from foredraft.kernels import library
from foredraft.kernels.layouts import TYPES, huge_pages

_BYTES = 1 << 29
"""Number of bytes in a read, more than any cache holds."""

_REPEATS = 5

_PEAK_S = 0.02
"""Seconds of a run of `arithmetic_peak`: long against the start of the threads."""


def read_bandwidth(device: torch.device) -> float:
    """Measures the memory bandwidth, in bytes per second.

    It is the best of several sums over a tensor of 512 MiB, on all of torch's threads or on the whole CUDA device. On a CPU
    the tensor lies on huge pages, if the system has them, as weights do.
    """
    memory = (
        torch.ones(_BYTES // 4, device=device) if device.type == "cuda" else huge_pages(_BYTES).view(torch.float32).fill_(1)
    )
    best = 0.0
    for _ in range(_REPEATS):
        began = perf_counter()
        memory.sum().item()
        best = max(best, _BYTES / (perf_counter() - began))
    return best


def arithmetic_peak(dtype: torch.dtype) -> float:
    """Measures the most operations per second of the kernels' instruction set, on all of torch's threads.

    A multiply-add counts as two operations. The operands stay in registers. It is the best of several runs, and 0 without
    compiled kernels.
    """
    code, best, rounds = library(), 0.0, 1000
    if code is None:
        return best
    for _ in range(_REPEATS * 4):
        began = perf_counter()
        count = code.peak(TYPES[dtype], rounds, torch.get_num_threads())
        seconds = perf_counter() - began
        best = max(best, 2 * count / seconds)
        rounds = max(rounds, int(rounds * _PEAK_S / max(seconds, _PEAK_S / 100)))
    return best


def reading(target: Target, outcomes: Sequence[Outcome], bandwidth: float) -> dict[str, float]:
    """Computes what plain decoding reads: megabytes of weights per step, gigabytes per second, and the share of `bandwidth`.

    The steps are those of the longest output of a batch, without the first one, which runs the end of the prompt too.

    Args:
        outcomes: outcomes of plain decoding.
        bandwidth: memory bandwidth, in bytes per second.
    """
    longest = [max(outcome.records, key=len) for outcome in outcomes]
    steps = [record for records in longest for record in records[1:] or records]
    reached = target.num_weight_bytes * len(steps) / sum(record.verify_s for record in steps)
    return {
        "weights_mb": round(target.num_weight_bytes / 1e6, 1),
        "read_gb_per_s": round(reached / 1e9, 2),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "bandwidth_share": round(reached / bandwidth, 3),
    }
