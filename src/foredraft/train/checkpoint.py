"""Checkpoints of a run: the weights, the optimizers' state, the history and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from foredraft.train.course import Course, Progress, Settings
from foredraft.train.shards import TrainingError, write_whole

CHECKPOINT = "checkpoint.pt"

Optimizers = Sequence[torch.optim.Optimizer]


def save(course: Course, settings: Settings, optimizers: Optimizers, done: Progress, file: Path) -> None:
    """Writes the checkpoint. The old one stays intact until the new one is complete.

    Raises:
        TrainingError: the file cannot be written.
    """
    content = {
        "head": course.head.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(done),
        "facts": facts_of(course, settings),
    }
    write_whole(file, lambda part: torch.save(content, part))


def resume(course: Course, settings: Settings, optimizers: Optimizers, done: Progress, file: Path) -> None:
    """Loads a checkpoint, if there is one, into the head, the optimizers and `done`.

    Raises:
        TrainingError: the checkpoint is damaged, or belongs to another run.
    """
    if not file.exists():
        return
    try:
        content = torch.load(file, map_location=course.device, weights_only=True)
    except Exception:
        raise TrainingError(f"{file} is damaged", "Delete it to start again from the first step") from None
    content["facts"].setdefault("answers", "own")
    different = [key for key, value in facts_of(course, settings).items() if content["facts"].get(key) != value]
    if different:
        raise TrainingError(
            f"{file} belongs to a run with another {' and '.join(different)}",
            "give the same settings to continue, or another --out",
        )
    course.head.load_state_dict(content["head"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for name, value in content["progress"].items():
        setattr(done, name, value)


def facts_of(course: Course, settings: Settings) -> dict[str, Any]:
    """Collects the facts that must be equal in a run and in the checkpoint from which it continues."""
    return {**asdict(settings), **course.facts, "options": dict(course.options), "processes": course.workers.count}


def facts_in(folder: Path) -> dict[str, Any]:
    """Returns the facts of the checkpoint in a folder. There are none without one, or if it is damaged, as `resume` reports."""
    try:
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["facts"]
    except Exception:
        return {}
