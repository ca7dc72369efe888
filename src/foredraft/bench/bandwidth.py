"""The memory bandwidth of this machine, and the share of it that plain decoding reaches.

The bandwidth limits the speed of a step with few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from foredraft.bench.run import Outcome
from foredraft.core.contracts import Target

_BYTES = 1 << 29
"""Number of bytes in a read, more than any cache holds."""

_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Measures the memory bandwidth, in bytes per second.

    It is the best of several sums over a tensor of 512 MiB, on all of torch's threads or on the whole CUDA device.
    """
    memory = torch.ones(_BYTES // 4, device=device)
    best = 0.0
    for _ in range(_REPEATS):
        began = perf_counter()
        memory.sum().item()
        best = max(best, _BYTES / (perf_counter() - began))
    return best


def reading(target: Target, outcomes: Sequence[Outcome], bandwidth: float) -> dict[str, float]:
    """Computes what plain decoding reads: megabytes of weights per step, gigabytes per second, and the share of `bandwidth`.

    Args:
        outcomes: outcomes of plain decoding.
        bandwidth: memory bandwidth, in bytes per second.
    """
    steps = sum(max(map(len, outcome.records)) for outcome in outcomes)
    reached = target.num_weight_bytes * steps / sum(outcome.metrics.verify_s for outcome in outcomes)
    return {
        "weights_mb": round(target.num_weight_bytes / 1e6, 1),
        "read_gb_per_s": round(reached / 1e9, 2),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "bandwidth_share": round(reached / bandwidth, 3),
    }
