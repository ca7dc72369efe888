"""The record of a finished training run: the origin of a head's weights, and the plot of its losses."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from foredraft.bench.machine import machine
from foredraft.plan.store import versions
from foredraft.train.course import Course, Progress, Settings


def provenance(course: Course, settings: Settings, done: Progress, head: torch.nn.Module) -> dict[str, Any]:
    """Collects the origin of the weights (command, data, settings, versions) and their last held-out metrics."""
    return {
        "command": "foredraft " + " ".join(sys.argv[1:]),
        "method": course.facts["method"],
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "data": course.facts["data"],
        "answers": course.facts["answers"],
        "recipe": dict(course.options),
        "settings": asdict(settings),
        "texts": len(course.texts),
        "token_passes": done.token_passes,
        "minutes": round(done.seconds / 60, 1),
        "device": machine(course.device)["device"],
        "held_out": done.history[-1] if done.history else {},
        **versions(),
        "finished": time.strftime("%Y-%m-%d"),
    }


def curves_of(done: Progress, method: str, figure: Any) -> None:
    """Plots the losses (left) and the other metrics (right) of the history against the step."""
    names = [name for name in done.history[-1] if name not in ("step", "token_passes")]
    losses = [name for name in names if "loss" in name]
    others = [name for name in names if name not in losses]
    for axes, plotted in zip(figure.subplots(1, 2), (losses, others), strict=True):
        for name in plotted:
            axes.plot([row["step"] for row in done.history], [row.get(name) for row in done.history], label=name)
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
    figure.suptitle(method)
