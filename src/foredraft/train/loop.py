"""The training loop. All methods share it. A run that was interrupted continues with the same bits as one that was not.

All randomness of a step is a function of the seed and the step's number. A checkpoint therefore holds only the weights, the
optimizers' state, the history and the settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foredraft.core.progress import progress_bar
from foredraft.train.batches import Batch, collate, endless
from foredraft.train.checkpoint import CHECKPOINT, resume, save
from foredraft.train.course import Course, Progress, Settings
from foredraft.train.lesson import Lesson
from foredraft.train.shards import TrainingError
from foredraft.train.texts import grouped


def train(course: Course, settings: Settings, folder: Path) -> Progress:
    """Trains the head in place. Continues from the checkpoint in `folder` if there is one.

    Raises:
        TrainingError: the checkpoint belongs to another run, the loss became NaN or infinite, or memory or disk are full.
    """
    head, optimizers, done = course.head, new_optimizers(course.head, settings), Progress()
    resume(course, settings, optimizers, done, folder / CHECKPOINT)
    workers = course.workers
    first = done.step * settings.accumulate * workers.count
    batches = islice(endless(course.texts, settings.batch_tokens, settings.seed, first), workers.rank, None, workers.count)
    began, recent = time.monotonic() - done.seconds, Means()
    with progress_bar("training steps", settings.steps) as advance:
        advance(done.step)
        while done.step < settings.steps and not 0 < settings.patience <= done.since:  # or the patience is used up
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = settings.lr * rate(settings, done.step)
            for part in range(settings.accumulate):
                batch = collate(next(batches), course.head.feature_layers, course.target)
                recent.add(backward(course, settings, batch, done.step, part), batch.num_tokens)
                done.token_passes += workers.total(batch.num_tokens)
            workers.share_gradients(head.parameters())
            norm = nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"the loss became NaN or infinite at step {done.step + 1}",
                    f"the last checkpoint is intact. Lower --lr (now {settings.lr:g}) and run again with another --out, or "
                    "check the data",
                )
            for optimizer in optimizers:
                optimizer.step()
            head.zero_grad(set_to_none=True)
            done.step += 1
            advance(1)
            if done.step % settings.evaluate_every == 0 or done.step == settings.steps:
                note(done, recent.take(), evaluate(course, settings), time.monotonic() - began)
                if workers.writes:
                    save(course, settings, optimizers, done, folder / CHECKPOINT)
    return done


_ENDS = ("embed_tokens", "lm_head", "blank")
"""Beginnings of the names of parameters that Muon does not train: each of their rows belongs to a token."""


def new_optimizers(head: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Makes the optimizers: AdamW with EAGLE's betas, and Muon whose steps are as long as AdamW's. Only matrices decay.

    Source: Muon (K. Jordan, 2024); its step length: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
    """
    named, decay = list(head.named_parameters()), settings.weight_decay
    inner = [
        weight for name, weight in named if weight.ndim == 2 and not name.startswith(_ENDS) and settings.optimizer == "muon"
    ]
    muon = {id(weight) for weight in inner}
    matrices = [weight for _, weight in named if weight.ndim > 1 and id(weight) not in muon]
    vectors = [weight for _, weight in named if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    if not inner:
        return [adamw]
    return [adamw, torch.optim.Muon(inner, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]


def rate(settings: Settings, step: int) -> float:
    """Returns the learning rate at a step as a share of its peak: a linear warm-up, then a fall to 0."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    left = (step - warm) / max(1, settings.steps - warm)
    return 1 - left if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * left))


def backward(course: Course, settings: Settings, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
    """Adds the gradient of one batch to the head's parameters.

    Args:
        step: number of the step, from 0.
        part: number of the batch in its step, from 0.

    Returns:
        The loss and the other metrics of the batch.

    Raises:
        TrainingError: the batch does not fit in memory.
    """
    generator = torch.Generator(course.device).manual_seed(hash((settings.seed, step, part, course.workers.rank)) & 0x7FFFFFFF)
    try:
        with torch.autocast(course.device.type, torch.bfloat16, enabled=settings.bf16):
            learned = course.recipe.learn(lesson(course, batch, generator))
        (learned.loss / settings.accumulate).backward()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        raise TrainingError(
            f"a batch of {settings.batch_tokens} positions does not fit in memory",
            f"the last checkpoint is intact. Run again with --batch-tokens {settings.batch_tokens // 2} --accumulate "
            f"{2 * settings.accumulate}, which learns the same",
        ) from None
    return {"loss": learned.loss.detach(), **learned.figures}


def lesson(course: Course, batch: Batch, generator: torch.Generator | None) -> Lesson:
    """Makes the recipe's input from a batch. Without a generator nothing is random, as in evaluation."""
    return Lesson(course.head, batch, course.frozen, course.rotary, course.options, generator)


@torch.no_grad()
def evaluate(course: Course, settings: Settings) -> dict[str, float]:
    """Computes the means of the loss and of the other metrics over the held-out texts."""
    means = Means()
    for group in grouped(course.held_out, [len(text.ids) for text in course.held_out], settings.batch_tokens):
        batch = collate(group, course.head.feature_layers, course.target)
        with torch.autocast(course.device.type, torch.bfloat16, enabled=settings.bf16):
            learned = course.recipe.learn(lesson(course, batch, None))
        means.add({"loss": learned.loss, **learned.figures}, batch.num_tokens)
    return means.take()


class Means:
    """Weighted means of metrics. Adding does not wait for the device; `take` does."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weight = 0.0

    def add(self, figures: Mapping[str, Tensor], weight: int) -> None:
        """Adds the metrics of a batch, with the weight `weight`."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * weight
        self._weight += weight

    def take(self) -> dict[str, float]:
        """Returns the means since the last call, and starts anew."""
        means = {name: float(value) / max(self._weight, 1e-9) for name, value in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        return means


def note(done: Progress, training: dict[str, float], held_out: dict[str, float], seconds: float) -> None:
    """Adds a row of metrics to the history, and updates the time and the best loss."""
    done.seconds = seconds
    row = {"step": done.step, "token_passes": done.token_passes, "train_loss": training["loss"], **held_out}
    done.history.append(row)
    better = held_out.get("loss", training["loss"]) < done.best
    done.best = min(done.best, held_out.get("loss", training["loss"]))
    done.since = 0 if better else done.since + 1
