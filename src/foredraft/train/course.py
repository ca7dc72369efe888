"""What a training run consists of: its settings, its parts and its progress."""

from __future__ import annotations

import math
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foredraft.core.contracts import Target
from foredraft.core.errors import UserError, unknown_name
from foredraft.train.attention import Tables
from foredraft.train.frozen import Frozen
from foredraft.train.recipes import Recipe
from foredraft.train.texts import Text
from foredraft.train.workers import Workers

SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("muon", "adamw")


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
                raise UserError(f"--{name.replace('_', '-')} must be 0 or above and finite, got {getattr(self, name)}")


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


def by_processor(facts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns the settings `bf16` and `optimizer` for a user who did not choose them.

    Muon multiplies in bfloat16 whatever `bf16` says. It is therefore chosen where bfloat16 is fast, and AdamW elsewhere.

    Args:
        facts: the facts of the checkpoint from which the run continues. Its settings are kept.
    """
    kept = {name: facts[name] for name in ("bf16", "optimizer") if name in facts}
    if len(kept) == 2:
        return kept
    fast = faster_in_bf16(device)
    return {"bf16": fast, "optimizer": OPTIMIZERS[0 if fast else 1], **kept}


def faster_in_bf16(device: torch.device) -> bool:
    """Returns whether matrix products are fast in bfloat16.

    They are on a GPU. On a CPU both types are timed, and float32 counts as faster if it clearly is, as on CPUs without bfloat16
    tiles.
    """
    if device.type != "cpu":
        return True

    def seconds(dtype: torch.dtype) -> float:
        rows, weight = torch.randn(2048, 512).to(dtype), torch.randn(1024, 512).to(dtype)
        return min(timeit.repeat(lambda: torch.nn.functional.linear(rows, weight), number=1, repeat=5))

    return seconds(torch.bfloat16) < 1.25 * seconds(torch.float32)
