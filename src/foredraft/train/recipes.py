"""What each method learns from: RECIPES names for every head its loss and its usual settings.

Rows of a batch are aligned as the heads see them at work, see `foredraft.drafters.heads`: pair j is (token j + 1, feature j).

    pair                  0      1      2
    token                 t1     t2     t3
    feature               f0     f1     f2
    foretold feature      f1     f2     f3
    foretold token        t2     t3     t4     whose law is that of the target's head after the foretold feature
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.train import losses
from foredraft.train.attention import Tables, unrolled, with_slots
from foredraft.train.batches import Batch
from foredraft.train.frozen import Frozen

NOISE, NOISE_LENGTH = 0.2, 512
"""Uniform noise on input features, of this width at this length of text (EAGLE's and FSPAD's released code)."""


class Learned(NamedTuple):
    """The loss of a batch, and what is reported beside it, as means over its positions."""

    loss: Float[Tensor, ""]
    figures: Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Lesson:
    """What a loss is computed from.

    Attributes:
        generator: of whatever is random in this batch; its seed depends on the step alone. None while evaluating.
        options: of the recipe.
    """

    head: Any
    batch: Batch
    frozen: Frozen
    rotary: Tables
    options: Mapping[str, Any]
    generator: torch.Generator | None


def recurrent(lesson: Lesson) -> Learned:
    """EAGLE, FSPAD and EAGLE-3: regression on the next feature and classification by the target's law, over `unroll` runs
    that are fed with the head's own features.

    ``sum_s decay^s (regression SmoothL1(foretold, f) + classification CE(target's law, draft law))``

    Source: EAGLE (arXiv 2401.15077), section 3.2; FSPAD (arXiv 2408.15562) and its released code; EAGLE-3 (arXiv 2503.01840),
    section 3.2.
    The sequence-level term with weight `ctc` is that of the released code of the CTC-based drafter (arXiv 2412.00061).
    """
    head, batch, options = lesson.head, lesson.batch, lesson.options
    feature = head.fuse(_noisy(batch.features[:, :-1], lesson))
    attend, total, figures = unrolled(lesson.rotary), torch.zeros((), device=feature.device), {}
    for run in range(options["unroll"]):
        embedding = head.embed(_shifted(batch.ids, 1 + run), lesson.frozen.embed)
        wanted = _shifted(batch.final, 1 + run)
        mask = _shifted(batch.answer, 2 + run, to=wanted.shape[1])
        out, learned = head(embedding, feature, attend), mask.nonzero(as_tuple=True)
        wanted = wanted[learned]
        classification, agreement = _classified(lesson, *head.readout(out.scored[learned], lesson.frozen.weight), wanted)
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


def medusa(lesson: Lesson) -> Learned:
    """Medusa's heads: cross-entropy of each with the token so many places on, weighted ``decay^k``; see `_labelled`.

    Source: Medusa (arXiv 2401.10774), section 2.2.1.
    """
    batch, head = lesson.batch, lesson.head
    mask = _shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
    features = batch.features[:, :-1][mask]
    slots = [(block(features), one.weight) for block, one in zip(head.blocks, head.lm_heads, strict=True)]
    return _spelled(lesson, slots, _labelled(lesson, mask.nonzero(as_tuple=True), len(slots), features.dtype))


def hydra(lesson: Lesson) -> Learned:
    """Hydra's heads: the target's law at every depth of the text itself, all weighted alike.

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
        mask = _shifted(batch.answer, 2 + i, to=length)[:, :length]
        tokens = torch.cat([embeddings[:, 1 + k : 1 + k + length][mask] for k in range(i + 1)], dim=-1)
        states, wanted = head.state(i, read[:, :length][mask], tokens), batch.final[:, 1 + i : 1 + i + length][mask]
        loss, agreement = _classified(lesson, states, head.lm_heads[i].weight, None, wanted)
        total = total + loss / head.num_slots
        figures |= {f"{name}_{i}" if i else name: value for name, value in agreement.items()}
    return Learned(total, figures)


def ctc(lesson: Lesson) -> Learned:
    """The CTC-based drafter: -log of the probability that the slots collapse to the next `labels` tokens or, with `prefixes`,
    the mean of those that what they collapse to begins with the next one, two, ... of them, the last of which is any of
    `_labelled`; without a blank, cross-entropy of slot k with token k. `regression` weighs SmoothL1 of slot k's state with
    the target's feature before token k, and of every pair's own with that before the next token.

    Slots are filled behind a share `anchors` of the pairs of each text, drawn anew in every step.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), section 3.2.
    """
    head, batch, frozen = lesson.head, lesson.batch, lesson.frozen
    mask = _shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
    anchors = _anchors(mask, lesson)
    pairs = frozen.embed(batch.ids[:, 1:]), batch.features[:, :-1]
    entries = head.enter(*pairs)
    later = head.enter_ahead(*(one.take_along_dim(anchors[..., None], 1) for one in pairs)).flatten(1, 2)
    attend = with_slots(lesson.rotary, entries.shape[1], anchors, head.num_slots - 1)
    paired, out = head(torch.cat([entries, later], dim=1), attend).split([entries.shape[1], later.shape[1]], dim=1)
    chosen = mask.gather(1, anchors)
    first = paired.take_along_dim(anchors[..., None], 1)
    states = torch.cat([first[:, :, None], out.unflatten(1, (anchors.shape[1], -1))], dim=2)[chosen]
    rows, _ = chosen.nonzero(as_tuple=True)
    count = lesson.options.get("labels", head.num_slots)
    following = _labelled(lesson, (rows, anchors[chosen]), count, states.dtype)
    labels, there = following.tokens, following.there
    regression = torch.zeros((), device=states.device)
    if lesson.options["regression"]:
        some = states[:, :count].float()  # labels may be fewer than slots, or more
        places = anchors[chosen][:, None] + 1 + torch.arange(some.shape[1], device=rows.device)
        wanted = batch.final[rows[:, None], places.clamp(max=batch.ids.shape[1] - 1)]
        behind = losses.smooth_l1(some, wanted, there[:, : some.shape[1]].float())
        every = losses.smooth_l1(paired.float(), _shifted(batch.final, 1), mask.float())
        regression = lesson.options["regression"] * (behind + every)
    if head.blank is None:
        learned = _spelled(lesson, [(one, frozen.weight) for one in states.unbind(1)], following)
        return learned._replace(loss=learned.loss + regression)
    ids = torch.cat([labels, following.likely.flatten(1)], dim=1)[:, None].expand(-1, head.num_slots, -1)
    found, log_sum = losses.logits_at(states.flatten(0, 1), frozen.weight, ids.flatten(0, 1))
    blank = head.blank(states.flatten(0, 1)).to(found.dtype)
    emitted = torch.cat([found, blank], dim=1) - torch.logaddexp(log_sum[:, None], blank)
    emitted = emitted.unflatten(0, ids.shape[:2])
    said = emitted[..., count:-1].unflatten(2, following.likely.shape[1:])
    emitted = torch.cat([emitted[..., :count], emitted[..., -1:]], dim=2)
    if lesson.options["prefixes"]:
        each = losses.ctc_prefixes(emitted, labels, following.likely, said)
        weights = following.shares * there[..., None]
    else:
        each, weights = losses.ctc_of(emitted, labels, there.sum(-1)) / count, there[:, 0].float()
    possible = each < losses.IMPOSSIBLE
    loss = losses.masked_mean(each.masked_fill(~possible, 0.0), weights * possible) + regression
    if lesson.generator is not None:
        return Learned(loss, {})
    best = head.logits(states, frozen.head).argmax(-1)
    figures = {"blank": (best == len(frozen.weight)).float().mean(), "top1": (best[:, 0] == labels[:, 0]).float().mean()}
    return Learned(loss, figures)


def _shifted(
    values: Float[Tensor, "b t *d"] | Int[Tensor, "b t"] | Bool[Tensor, "b t"], by: int, to: int | None = None
) -> Tensor:
    """``out[:, j] = values[:, j + by]``, zero beyond the end; as long as there are pairs."""
    length = values.shape[1] - 1 if to is None else to
    out = values.new_zeros(values.shape[0], length, *values.shape[2:])
    part = values[:, by : by + length]
    out[:, : part.shape[1]] = part
    return out


def _noisy(features: Float[Tensor, "b t f"], lesson: Lesson) -> Float[Tensor, "b t f"]:
    if lesson.generator is None:
        return features
    noise = torch.rand(features.shape, generator=lesson.generator, device=features.device).to(features) - 0.5
    return features + noise * (lesson.options["noise"] * NOISE_LENGTH / features.shape[1])


def _classified(
    lesson: Lesson,
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "w d"],
    token_ids: Int[Tensor, " w"] | None,
    wanted: Float[Tensor, "n f"],
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Soft cross-entropy with the target's law, over the tokens `token_ids` where only those can be drafted, and, while
    evaluating, the agreement with it.

    A position whose likeliest token cannot be drafted is left out, as in EAGLE-3.
    """
    target_weight, known = lesson.frozen.weight, wanted.new_ones(len(wanted))
    if token_ids is not None:
        known = torch.isin(lesson.frozen.head(wanted).argmax(-1), token_ids).float()
        target_weight = target_weight[token_ids]
    loss = losses.distilled(states, weight, wanted, target_weight, known)
    return loss, losses.agreement(states, weight, wanted, target_weight) if lesson.generator is None else {}


def _spelled(
    lesson: Lesson,
    slots: Sequence[tuple[Float[Tensor, "n d"], Float[Tensor, "v d"]]],
    following: Following,
) -> Learned:
    """Cross-entropy of slot k, a state and its output layer, with label k; weighted ``decay^k``."""
    total, figures = torch.zeros((), device=following.tokens.device), {}
    for k, (states, weight) in enumerate(slots):
        there = following.there[:, k]
        nll = -torch.linalg.vecdot(losses.log_probs(states, weight, following.likely[:, k]), following.shares[:, k])
        total = total + lesson.options["decay"] ** k * losses.masked_mean(nll, there.float())
        if lesson.generator is None:
            right = (F.linear(states, weight).argmax(-1) == following.tokens[:, k]) & there
            figures[f"top1_{k}" if k else "top1"] = right.sum() / there.sum().clamp(min=1)
    return Learned(total, figures)


def _anchors(mask: Bool[Tensor, "b p"], lesson: Lesson) -> Int[Tensor, "b a"]:
    """Pairs to draft behind, drawn among those of answers; evenly spread while evaluating."""
    count = max(1, round(lesson.options["anchors"] * mask.shape[1]))
    if lesson.generator is None:
        order = -torch.arange(mask.shape[1], device=mask.device).expand_as(mask).mul(7919).remainder(mask.shape[1]).float()
    else:
        order = torch.rand(mask.shape, generator=lesson.generator, device=mask.device)
    return order.masked_fill(~mask, -torch.inf).topk(count, dim=1).indices.sort(dim=1).values


class Following(NamedTuple):
    """The next answer tokens behind the roots of some pairs, and what else might have stood in the place of each.

    Attributes:
        there: which of the tokens there are.
        likely, shares: the target's likeliest tokens in each place, and their probabilities among themselves.
    """

    tokens: Int[Tensor, "n k"]
    there: Bool[Tensor, "n k"]
    likely: Int[Tensor, "n k m"]
    shares: Float[Tensor, "n k m"]


def _labelled(lesson: Lesson, pairs: tuple[Int[Tensor, " n"], ...], count: int, dtype: torch.dtype) -> Following:
    """The next `count` answer tokens behind the root of each pair; `soft_labels` of the target's law stand beside each, or
    else (and where whole sequences are learned) the token itself alone.

    Args:
        pairs: text and place of each.
    """
    batch, soft = lesson.batch, lesson.options["soft_labels"] if lesson.options.get("prefixes", True) else 0
    rows, places = pairs[0][:, None], pairs[1][:, None] + 2 + torch.arange(count, device=batch.ids.device)
    inside = places < batch.ids.shape[1]
    places = places.clamp(max=batch.ids.shape[1] - 1)
    tokens, there = batch.ids[rows, places], (batch.answer[rows, places] & inside).long().cumprod(-1).bool()
    if not soft:
        return Following(tokens, there, tokens[..., None], torch.ones(*tokens.shape, 1, device=tokens.device))
    before, weight = batch.final[rows, places - 1].flatten(0, 1).to(dtype), lesson.frozen.weight
    likely, shares = (one.unflatten(0, tokens.shape) for one in losses.likeliest(before, weight, min(soft, len(weight))))
    return Following(tokens, there, likely, shares)


def _over_positions(
    head: Any, scored: Float[Tensor, "b p d"], likeliest: Int[Tensor, " n"], mask: Bool[Tensor, "b p"], lesson: Lesson
) -> Float[Tensor, ""]:
    """CTC over six positions of the text, the target's likeliest three tokens as labels, token 0 as blank: a regulariser of
    EAGLE."""
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
        learn: its loss.
        options: of the loss, with their usual values.
        lr: peak learning rate.
    """

    learn: Callable[[Lesson], Learned]
    options: Mapping[str, Any]
    lr: float = 5e-3


def check(options: Mapping[str, Any]) -> None:
    """Looks at a recipe's options before anything is made.

    Raises:
        ValueError: one of them cannot be.
    """
    if not 0 < options.get("anchors", 1) <= 1:
        raise ValueError(f"anchors is a share of the places, above 0 and at most 1, got {options['anchors']}")
    if options.get("soft_labels", 0) < 0:
        raise ValueError(f"soft_labels must be at least 0 (0: the text's own tokens), got {options['soft_labels']}")


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
