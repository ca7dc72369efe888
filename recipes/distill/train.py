"""Trains the student on batches of texts with the target's features."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from foredraft.core.progress import progress_bar
from foredraft.models.llama import LlamaTarget

from .batches import Batch, Row, collate, epoch
from .student import LOGITS_CHUNK, distance, hidden_states, student_head

PROMPT_WEIGHT = 0.1
"""Weight of the positions of a prompt. Prompts are never drafted, but they help the student to learn to read."""

TV_FROM, TV_SHARE = 0.6, 0.5
"""After the share `TV_FROM` of the steps, total variation is the share `TV_SHARE` of the loss. It determines the acceptance."""

REPORT_EVERY = 50


class Training(NamedTuple):
    """Result of a training run.

    Attributes:
        kl, acceptance: means over the last `REPORT_EVERY` steps.
        num_tokens: number of positions with a positive weight.
        minutes: duration.
    """

    kl: float
    acceptance: float
    num_tokens: int
    minutes: float


def train(student: LlamaForCausalLM, target: LlamaTarget, rows: Sequence[Row], num_steps: int, seed: int) -> Training:
    """Trains the student in place."""
    optimizers = new_optimizers(student)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate(step / num_steps)) for optimizer in optimizers]
    began, figures, num_tokens = time.monotonic(), [], 0
    with progress_bar("training steps", num_steps) as advance:
        for step, group in enumerate(islice(endless(rows, seed), num_steps)):
            batch = collate(group, PROMPT_WEIGHT)
            figures.append(backward(student, target, batch, TV_SHARE if step / num_steps > TV_FROM else 0.0))
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for stepped in (*optimizers, *schedules):
                stepped.step()
            student.zero_grad()
            num_tokens += int((batch.weights > 0).sum())
            if (step + 1) % REPORT_EVERY == 0:
                print("step {}: kl {:.3f}, acceptance {:.3f}".format(step + 1, *recent(figures)))
            advance(1)
    kl, acceptance = recent(figures)
    return Training(kl, acceptance, num_tokens, round((time.monotonic() - began) / 60, 1))


def endless(rows: Sequence[Row], seed: int) -> Iterator[list[Row]]:
    """Yields batches without end, epoch after epoch."""
    return (group for number in count() for group in epoch(rows, seed + number))


def recent(figures: Sequence[Tensor]) -> list[float]:
    """Computes the means of the metrics of the last `REPORT_EVERY` steps."""
    return [round(mean, 4) for mean in torch.stack(list(figures[-REPORT_EVERY:])).mean(0).tolist()]


def backward(student: LlamaForCausalLM, target: LlamaTarget, batch: Batch, tv_share: float) -> Float[Tensor, " 2"]:
    """Adds the gradient of (1 - s) KL(q || p) + s TV(p, q), and returns the weighted means of KL and acceptance.

    The logits are computed and differentiated in chunks. Their gradients add up in the final states, from which they pass on to
    the layers.
    """
    chosen = batch.weights > 0
    weights = batch.weights[chosen] / batch.weights.sum()
    hidden, figures = hidden_states(student, batch), torch.zeros(2)
    states = hidden.detach().requires_grad_()
    chunks = zip(
        states.split(LOGITS_CHUNK), batch.features[chosen].split(LOGITS_CHUNK), weights.split(LOGITS_CHUNK), strict=True
    )
    for part, features, weight in chunks:
        far = distance(student_head(student, part), target.head(features).float())
        (weight @ ((1 - tv_share) * far.kl + tv_share * (1 - far.acceptance))).backward()
        figures += torch.stack([kind.detach() @ weight for kind in far])
    hidden.backward(states.grad)
    return figures


def new_optimizers(student: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Makes the optimizers: Muon for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in student.model.layers.parameters() if p.ndim == 2]
    others = [student.lm_head.weight, *(p for p in student.parameters() if p.ndim == 1)]
    return [
        torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=0.04, momentum=0.95, weight_decay=0.01),
    ]


def learning_rate(done: float) -> float:
    """Computes the factor of the peak rate at a share `done` of the run: 2 % warm-up, then a cosine to zero."""
    return min(1.0, done / 0.02 + 0.01) * 0.5 * (1 + math.cos(math.pi * done))
