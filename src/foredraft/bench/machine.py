"""The machine: what figures are measured on, and what would make it faster."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from foredraft.kernels.sets import SETS, kernels, sets_here, sets_of_library
from foredraft.plan.store import versions


def machine(device: torch.device) -> dict[str, Any]:
    """Describes the machine and the versions of the software, which affect the results."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def advice() -> list[str]:
    """Returns what would make this machine faster, a sentence each. Empty if nothing is known."""
    here, built, given, found = sets_here(), sets_of_library(), kernels(), []
    if not built:
        found.append("there are no compiled kernels: install a C compiler, then install foredraft again")
    elif unknown := [name for name in SETS if name not in built and name != "neon"]:
        found.append(f"the kernels were built without {', '.join(unknown)}: install foredraft again with a newer C compiler")
    if here and given not in ("auto", here[0]):
        found.append(f"FOREDRAFT_KERNELS is {given!r}, but this machine has {here[0]}: unset the environment variable")
    if hasattr(os, "sched_getaffinity"):
        cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
        if threads != cores:
            found.append(f"{threads} threads run on {cores} cores: set OMP_NUM_THREADS={cores}, or leave it unset")
    if here and here[0] in ("avx2", "scalar"):
        found.append("a processor with AVX-512 or AMX computes trees and prompts faster; plain decoding depends on its memory")
    return found
