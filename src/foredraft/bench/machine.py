"""The machine on which figures are measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

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
