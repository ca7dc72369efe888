"""The training loop. All methods share it. A run that was interrupted continues with the same bits as one that was not.

All randomness of a step is a function of the seed and the step's number. A checkpoint therefore holds only the weights, the
optimizers' state, the history and the settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foredraft.core.contracts import Target
from foredraft.core.errors import unknown_name
from foredraft.core.progress import progress_bar
from foredraft.train.attention import Tables
from foredraft.train.batches import Batch, collate, endless
from foredraft.train.frozen import Frozen
from foredraft.train.recipes import Lesson, Recipe
from foredraft.train.shards import Text, TrainingError, grouped, write_whole
from foredraft.train.workers import Workers

CHECKPOINT = "checkpoint.pt"
SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("muon", "adamw")

Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class Settings:
    """Settings of the optimization.

    Attributes:
        steps: number of optimizer steps.
        batch_tokens: number of positions in a batch, padding included.
        accumulate: number of batches that each process adds up in a step.
        lr: peak learning rate.
        warmup: share of the steps (0 to 1) in which the learning rate rises to its peak.
        schedule: ``cosine`` or ``linear``: how the learning rate falls from its peak to 0.
        optimizer: ``muon``: Muon for the matrices between input and output layers, AdamW for all other parameters.
            ``adamw``: AdamW for all parameters.
        weight_decay: weight decay of the matrices. Vectors have none.
        clip: largest norm of the gradient. A longer gradient is scaled down to it.
        seed: seed of the batches' order and of all other randomness.
        evaluate_every: number of steps between evaluations. Each evaluation also writes a checkpoint.
        patience: number of evaluations without a lower loss after which training ends; 0: it never ends early.
        bf16: whether matrix products are computed in bfloat16.
        answer_share: smallest share (0 to 1) of answer tokens in a text. Other texts are left out, since they cost more time
            than they teach.

    Raises:
        ValueError: the schedule or the optimizer is unknown.
    """

    steps: int
    batch_tokens: int = 8192
    accumulate: int = 1
    lr: float = 5e-3
    warmup: float = 0.02
    schedule: str = "cosine"
    optimizer: str = "muon"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    evaluate_every: int = 100
    patience: int = 0
    bf16: bool = True
    answer_share: float = 0.125

    def __post_init__(self) -> None:
        for kind, name, known in (("schedule", self.schedule, SCHEDULES), ("optimizer", self.optimizer, OPTIMIZERS)):
            if name not in known:
                raise unknown_name(kind, name, list(known))
        for name in ("lr", "clip", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or above and finite, got {getattr(self, name)}")


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: number of finished steps.
        token_passes: number of answer tokens that the head has learned from, with repetitions.
        seconds: time spent in training, evaluations included.
        best: lowest loss on the held-out texts so far.
        since: number of evaluations since `best`.
        history: one row of metrics per evaluation.
    """

    step: int = 0
    token_passes: int = 0
    seconds: float = 0.0
    best: float = math.inf
    since: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Course:
    """All parts of a run except its settings.

    Attributes:
        head: the head to train, changed in place.
        recipe: how its method is trained.
        options: options of the recipe.
        frozen: the target's embedding and output layer.
        rotary: rotary tables of the head's layer.
        texts: the texts to learn from.
        held_out: the texts to evaluate on.
        target: the target model.
        facts: facts about the run. A checkpoint with other facts is refused.
        workers: the processes that share the batches of a step.
    """

    head: Any
    recipe: Recipe
    options: Mapping[str, Any]
    frozen: Frozen
    rotary: Tables
    texts: Sequence[Text]
    held_out: Sequence[Text]
    target: Target
    facts: Mapping[str, Any]
    workers: Workers = field(default_factory=Workers)

    @property
    def device(self) -> torch.device:
        """Device of the target and the head."""
        return self.target.device


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
        while done.step < settings.steps and not over(settings, done):
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
                    f"the loss became NaN or infinite at step {done.step + 1}; the last checkpoint is intact. Lower --lr "
                    f"(now {settings.lr:g}) and run again with another --out, or check the data"
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
            f"a batch of {settings.batch_tokens} positions does not fit in memory; the last checkpoint is intact. Run again "
            f"with --batch-tokens {settings.batch_tokens // 2} --accumulate {2 * settings.accumulate}, which learns the same"
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


def over(settings: Settings, done: Progress) -> bool:
    """Returns whether the run ends early because its patience is used up."""
    return 0 < settings.patience <= done.since


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


def faster_in_bf16(folder: Path, device: torch.device) -> bool:
    """Decides whether matrix products use bfloat16 if the user did not choose.

    A checkpoint in `folder` decides. Without one, the answer is true on a GPU. On a CPU both types are timed, and float32 is
    chosen if it is clearly faster, as it is on CPUs without bfloat16 tiles.
    """
    try:
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["facts"]["bf16"]
    except Exception:  # no checkpoint, or an unreadable one, which `resume` reports
        if device.type != "cpu":
            return True
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        rows, weight = torch.randn(2048, 512).to(dtype), torch.randn(1024, 512).to(dtype)
        took = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            took.append(time.perf_counter() - began)
        seconds.append(min(took))
    return seconds[0] < 1.25 * seconds[1]


def facts_of(course: Course, settings: Settings) -> dict[str, Any]:
    """Collects the facts that must be equal in a run and in the checkpoint from which it continues."""
    return {**asdict(settings), **course.facts, "options": dict(course.options), "processes": course.workers.count}


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
        raise TrainingError(f"{file} is damaged. Delete it to start again from the first step") from None
    content["facts"].setdefault("answers", "own")
    different = [key for key, value in facts_of(course, settings).items() if content["facts"].get(key) != value]
    if different:
        raise TrainingError(
            f"{file} belongs to a run with another {' and '.join(different)}: "
            "give the same settings to continue, or another --out"
        )
    course.head.load_state_dict(content["head"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for name, value in content["progress"].items():
        setattr(done, name, value)
