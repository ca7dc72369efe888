"""How fast this machine reads memory: what bounds a step of few tokens, and the share of it that plain decoding reaches."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from foredraft.bench.run import Outcome
from foredraft.protocols import Target

_BYTES = 1 << 29
"""Read at once; more than any cache holds."""

_REPEATS = 5


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second, the best of a few sums over a tensor of 512 MiB, on all threads of torch (or the whole CUDA device)."""
    memory = torch.ones(_BYTES // 4, device=device)
    best = 0.0
    for _ in range(_REPEATS):
        began = perf_counter()
        memory.sum().item()
        best = max(best, _BYTES / (perf_counter() - began))
    return best


def reading(target: Target, outcomes: Sequence[Outcome], bandwidth: float) -> dict[str, float]:
    """What plain decoding reads: megabytes of weights a step, gigabytes a second, and their share of `bandwidth`."""
    steps = sum(max(map(len, one.records)) for one in outcomes)
    reached = target.num_weight_bytes * steps / sum(one.verify_s for one in outcomes)
    return {
        "weights_mb": round(target.num_weight_bytes / 1e6, 1),
        "read_gb_per_s": round(reached / 1e9, 2),
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "bandwidth_share": round(reached / bandwidth, 3),
    }
