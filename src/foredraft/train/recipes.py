"""Training recipes of the methods: RECIPES holds the loss and the default settings of every head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.core.errors import UserError
from foredraft.train import losses
from foredraft.train.attention import unrolled
from foredraft.train.lesson import Learned, Lesson, classified, shifted
from foredraft.train.slots import ctc, medusa

NOISE, NOISE_LENGTH = 0.2, 512
"""Width of the uniform noise on input features, and the text length at which it applies (EAGLE's and FSPAD's released code).

The width is inversely proportional to the length of the text.
"""


def recurrent(lesson: Lesson) -> Learned:
    """Computes the loss of EAGLE, FSPAD and EAGLE-3.

    It adds regression on the next feature and classification against the target's distribution. Both are summed over `unroll`
    runs. Each run after the first reads the head's own features of the run before.

    ``sum_s decay^s (regression SmoothL1(predicted, f) + classification CE(target_probs, draft_probs))``

    The option `ctc` weighs a sequence-level term, which the released code of the CTC-based drafter adds.

    Source: EAGLE (arXiv 2401.15077), section 3.2; FSPAD (arXiv 2408.15562) and its released code; EAGLE-3 (arXiv 2503.01840),
    section 3.2; for the term `ctc`: the released code of the CTC-based drafter (arXiv 2412.00061).
    """
    head, batch, options = lesson.head, lesson.batch, lesson.options
    feature = head.fuse(_noisy(batch.features[:, :-1], lesson))
    attend, total, figures = unrolled(lesson.rotary), torch.zeros((), device=feature.device), {}
    for run in range(options["unroll"]):
        embedding = head.embed(shifted(batch.ids, 1 + run), lesson.frozen.embed)
        wanted = shifted(batch.final, 1 + run)
        mask = shifted(batch.answer, 2 + run, to=wanted.shape[1])
        out, learned = head(embedding, feature, attend), mask.nonzero(as_tuple=True)
        wanted = wanted[learned]
        classification, agreement = classified(lesson, *head.readout(out.scored[learned], lesson.frozen.weight), wanted)
        loss, parts = options["classification"] * classification, {"classification": classification.detach()}
        if options["regression"]:
            regression = losses.smooth_l1(out.carried[learned].float(), wanted, wanted.new_ones(len(wanted)))
            loss, parts = loss + options["regression"] * regression, {"regression": regression.detach(), **parts}
        total = total + options["decay"] ** run * loss
        if options["ctc"]:
            best = lesson.frozen.head(wanted).argmax(-1)
            total = total + options["ctc"] * _over_positions(head, out.scored, best, mask, lesson)
        if run == 0:
            figures = agreement | parts
        else:
            figures |= {f"{name}_{run}": value for name, value in agreement.items()}
        feature = out.carried
    return Learned(total, figures)


def hydra(lesson: Lesson) -> Learned:
    """Computes the loss of Hydra: the mean over the heads of the cross-entropy with the target's distribution.

    Head i reads the tokens of the text up to depth i and learns the target's distribution after them.

    Source: Hydra (arXiv 2402.05109), section 4 (teacher loss alone).
    """
    head, batch, frozen = lesson.head, lesson.batch, lesson.frozen
    read = head.read(batch.features[:, :-1], unrolled(lesson.rotary))
    embeddings, figures = frozen.embed(batch.ids), {}
    total = torch.zeros((), device=read.device)
    for i in range(head.num_slots):
        length = batch.ids.shape[1] - 2 - i
        if length <= 0:
            break
        mask = shifted(batch.answer, 2 + i, to=length)[:, :length]
        tokens = torch.cat([embeddings[:, 1 + k : 1 + k + length][mask] for k in range(i + 1)], dim=-1)
        states, wanted = head.state(i, read[:, :length][mask], tokens), batch.final[:, 1 + i : 1 + i + length][mask]
        loss, agreement = classified(lesson, states, head.lm_heads[i].weight, None, wanted)
        total = total + loss / head.num_slots
        figures |= {f"{name}_{i}" if i else name: value for name, value in agreement.items()}
    return Learned(total, figures)


def _noisy(features: Float[Tensor, "b t f"], lesson: Lesson) -> Float[Tensor, "b t f"]:
    if lesson.generator is None:
        return features
    noise = torch.rand(features.shape, generator=lesson.generator, device=features.device).to(features) - 0.5
    return features + noise * (lesson.options["noise"] * NOISE_LENGTH / features.shape[1])


def _over_positions(
    head: Any, scored: Float[Tensor, "b p d"], likeliest: Int[Tensor, " n"], mask: Bool[Tensor, "b p"], lesson: Lesson
) -> Float[Tensor, ""]:
    """Computes CTC over six positions of the text, as a regulariser of EAGLE.

    The labels are the target's most likely tokens at the first three positions. Token 0 is the blank.
    """
    frames, count = 6, 3
    best = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
    best[mask] = likeliest
    whole = F.pad(mask, (0, frames)).unfold(1, frames, 1)[:, : mask.shape[1]].all(-1)
    rows, starts = whole.nonzero(as_tuple=True)
    if not len(rows):
        return scored.sum() * 0
    places = starts[:, None] + torch.arange(frames, device=mask.device)
    logits = head.logits(scored[rows[:, None], places], lesson.frozen.head).float()
    labels = best[rows[:, None], places[:, :count]]
    lengths = torch.full((len(rows),), count, device=mask.device)
    return losses.ctc(logits.log_softmax(-1), labels, lengths, blank=0).clamp(max=1e4).mean() / count


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        learn: function that computes the loss.
        options: options of the loss, with their default values.
        lr: default peak learning rate.
    """

    learn: Callable[[Lesson], Learned]
    options: Mapping[str, Any]
    lr: float = 5e-3


def check(options: Mapping[str, Any]) -> None:
    """Checks the options of a recipe.

    Raises:
        ValueError: an option is out of range.
    """
    if not 0 < options.get("anchors", 1) <= 1:
        raise UserError(f"anchors must be a share of the positions, above 0 and at most 1, got {options['anchors']}")
    if options.get("soft_labels", 0) < 0:
        raise UserError(f"soft_labels must be at least 0 (0: the tokens of the text), got {options['soft_labels']}")


_RECURRENT = {"regression": 1.0, "classification": 0.1, "unroll": 1, "decay": 0.8, "noise": NOISE, "ctc": 0.0}

RECIPES: dict[str, Recipe] = {
    "eagle": Recipe(recurrent, _RECURRENT),
    "fspad": Recipe(recurrent, _RECURRENT),
    "eagle3": Recipe(recurrent, {**_RECURRENT, "regression": 0.0, "classification": 1.0, "unroll": 7, "noise": 0.0}),
    "medusa": Recipe(medusa, {"decay": 0.8, "soft_labels": 8}),
    "hydra": Recipe(hydra, {}),
    "parallel": Recipe(ctc, {"anchors": 0.125, "regression": 10.0, "decay": 0.8, "soft_labels": 8}),
    "ctc": Recipe(ctc, {"anchors": 0.125, "labels": 6, "prefixes": True, "regression": 10.0, "soft_labels": 8}),
}
