"""The training loop: one for every method, read from top to bottom. It goes on bit for bit where it was cut off.

Whatever is random in a step is a function of the seed and the step's number, so a checkpoint holds weights, the optimizer's
state and the history, and nothing else.
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

from foredraft.errors import unknown_name
from foredraft.progress import progress_bar
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
    """How long and how fast to learn.

    Attributes:
        steps: of the optimizer.
        batch_tokens: positions of a batch, padding included.
        accumulate: batches a step, of every process.
        lr: peak learning rate.
        warmup: share of the steps until it is reached.
        schedule: ``cosine`` or ``linear``, down to 0.
        optimizer: ``muon``: Muon for the matrices between input and output layers, AdamW for the others; or ``adamw``.
        clip: largest norm of the gradient.
        evaluate_every: steps between evaluations and checkpoints.
        patience: evaluations without a better loss until training ends; 0: it never ends early.
        bf16: whether matrix products are made in bfloat16.
        answer_share: texts of which the answer is a smaller share are left out: they cost more than they teach.

    Raises:
        ValueError: an unknown schedule or optimizer.
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


@dataclass
class Progress:
    """What has been done.

    Attributes:
        step: steps done.
        token_passes: answer tokens that were learned from, as often as they came.
        seconds: spent in training, evaluations included.
        best: the lowest loss on the held-out part; `since`: evaluations since then.
        history: a row an evaluation.
    """

    step: int = 0
    token_passes: int = 0
    seconds: float = 0.0
    best: float = math.inf
    since: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Course:
    """Everything a run is made of, but its settings.

    Attributes:
        target: what wrote the texts.
        facts: what a checkpoint must agree with to be gone on from.
        workers: the processes that share a step's batches.
    """

    head: Any
    recipe: Recipe
    options: Mapping[str, Any]
    frozen: Frozen
    rotary: Tables
    texts: Sequence[Text]
    held_out: Sequence[Text]
    target: Any
    facts: Mapping[str, Any]
    workers: Workers = field(default_factory=Workers)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.target.device


def train(course: Course, settings: Settings, folder: Path) -> Progress:
    """Trains the head in place, from the checkpoint in `folder` on if there is one.

    Raises:
        TrainingError: the checkpoint is of another run, the loss is no number, or memory or disk are full.
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
            for group in (group for one in optimizers for group in one.param_groups):
                group["lr"] = settings.lr * rate(settings, done.step)
            for part in range(settings.accumulate):
                batch = collate(next(batches), course.head.feature_layers, course.target)
                recent.add(backward(course, settings, batch, done.step, part), batch.num_tokens)
                done.token_passes += workers.total(batch.num_tokens)
            workers.share_gradients(head.parameters())
            norm = nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
            if not torch.isfinite(norm):
                raise TrainingError(
                    f"the loss is no number at step {done.step + 1}: the checkpoint before it stands; lower --lr "
                    f"(now {settings.lr:g}) and run again with another --out, or look at the data"
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
"""Parameters that Muon is not for: their rows are tokens."""


def new_optimizers(head: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW with EAGLE's betas, and Muon with steps as long as AdamW's; only matrices decay.

    Source: Muon (K. Jordan, 2024); its step length: Liu et al. 2025 (arXiv 2502.16982), section 2.2.
    """
    every, decay = list(head.named_parameters()), settings.weight_decay
    inner = [one for name, one in every if one.ndim == 2 and not name.startswith(_ENDS) and settings.optimizer == "muon"]
    muon = {id(one) for one in inner}
    matrices = [one for _, one in every if one.ndim > 1 and id(one) not in muon]
    vectors = [one for _, one in every if one.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    if not inner:
        return [adamw]
    return [adamw, torch.optim.Muon(inner, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]


def rate(settings: Settings, step: int) -> float:
    """Share of the peak learning rate: a warm-up, then down to 0."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    left = (step - warm) / max(1, settings.steps - warm)
    return 1 - left if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * left))


def backward(course: Course, settings: Settings, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
    """Adds the gradient of one batch."""
    generator = torch.Generator(course.device).manual_seed(hash((settings.seed, step, part, course.workers.rank)) & 0x7FFFFFFF)
    try:
        with torch.autocast(course.device.type, torch.bfloat16, enabled=settings.bf16):
            learned = course.recipe.learn(lesson(course, batch, generator))
        (learned.loss / settings.accumulate).backward()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        raise TrainingError(
            f"a batch of {settings.batch_tokens} positions does not fit in memory: the last checkpoint stands; run again with "
            f"--batch-tokens {settings.batch_tokens // 2} --accumulate {2 * settings.accumulate}, which learns the same"
        ) from None
    return {"loss": learned.loss.detach(), **learned.figures}


def lesson(course: Course, batch: Batch, generator: torch.Generator | None) -> Lesson:
    """What the recipe is given for a batch."""
    return Lesson(course.head, batch, course.frozen, course.rotary, course.options, generator)


@torch.no_grad()
def evaluate(course: Course, settings: Settings) -> dict[str, float]:
    """Means over the held-out texts."""
    means = Means()
    for group in grouped(course.held_out, [len(text.ids) for text in course.held_out], settings.batch_tokens):
        batch = collate(group, course.head.feature_layers, course.target)
        with torch.autocast(course.device.type, torch.bfloat16, enabled=settings.bf16):
            learned = course.recipe.learn(lesson(course, batch, None))
        means.add({"loss": learned.loss, **learned.figures}, batch.num_tokens)
    return means.take()


class Means:
    """Weighted means of figures; a device is not waited for before they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._weight = 0.0

    def add(self, figures: Mapping[str, Tensor], weight: int) -> None:
        """Adds a batch's."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * weight
        self._weight += weight

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: float(value) / max(self._weight, 1e-9) for name, value in self._sums.items()}
        self._sums, self._weight = {}, 0.0
        return means


def note(done: Progress, training: dict[str, float], held_out: dict[str, float], seconds: float) -> None:
    """Adds a row to the history."""
    done.seconds = seconds
    row = {"step": done.step, "token_passes": done.token_passes, "train_loss": training["loss"], **held_out}
    done.history.append(row)
    better = held_out.get("loss", training["loss"]) < done.best
    done.best = min(done.best, held_out.get("loss", training["loss"]))
    done.since = 0 if better else done.since + 1


def over(settings: Settings, done: Progress) -> bool:
    """Whether to end early."""
    return 0 < settings.patience <= done.since


def save(course: Course, settings: Settings, optimizers: Optimizers, done: Progress, file: Path) -> None:
    """Writes the checkpoint."""
    content = {
        "head": course.head.state_dict(),
        "optimizers": [one.state_dict() for one in optimizers],
        "progress": asdict(done),
        "facts": facts_of(course, settings),
    }
    write_whole(file, lambda part: torch.save(content, part))


def faster_in_bf16(folder: Path, device: torch.device) -> bool:
    """Whether matrix products are to be made in bfloat16 where nothing is asked for: as in the checkpoint in `folder`, or else
    unless float32 is clearly faster, as it is on CPUs that are made for bfloat16 in tiles and have none."""
    try:
        return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)["facts"]["bf16"]
    except Exception:  # there is none, or it cannot be read, of which `resume` speaks
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
    """What two runs must share for one to go on with the other's checkpoint."""
    return {**asdict(settings), **course.facts, "options": dict(course.options), "processes": course.workers.count}


def resume(course: Course, settings: Settings, optimizers: Optimizers, done: Progress, file: Path) -> None:
    """Takes over a checkpoint, if there is one.

    Raises:
        TrainingError: it is damaged, or of another run.
    """
    if not file.exists():
        return
    try:
        content = torch.load(file, map_location=course.device, weights_only=True)
    except Exception:
        raise TrainingError(f"{file} is damaged: delete it to begin anew") from None
    content["facts"].setdefault("answers", "own")
    different = [key for key, value in facts_of(course, settings).items() if content["facts"].get(key) != value]
    if different:
        raise TrainingError(
            f"{file} is of a run with another {' and '.join(different)}: give the same settings to go on, or another --out"
        )
    course.head.load_state_dict(content["head"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for name, value in content["progress"].items():
        setattr(done, name, value)
