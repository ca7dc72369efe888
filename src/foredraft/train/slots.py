"""Recipes of heads that predict several slots at once: Medusa, parallel and CTC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.train import losses
from foredraft.train.attention import with_slots
from foredraft.train.lesson import Learned, Lesson, shifted


def medusa(lesson: Lesson) -> Learned:
    """Computes the loss of Medusa, the sum of its heads' cross-entropies.

    Head k predicts the token k + 1 places after the root. Its cross-entropy is weighted ``decay^k``. With `soft_labels`, the
    target's most likely tokens at that place are the labels, see `_labelled`.

    Source: Medusa (arXiv 2401.10774), section 2.2.1.
    """
    batch, head = lesson.batch, lesson.head
    mask = shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
    features = batch.features[:, :-1][mask]
    slots = [(block(features), lm_head.weight) for block, lm_head in zip(head.blocks, head.lm_heads, strict=True)]
    return _spelled(lesson, slots, _labelled(lesson, mask.nonzero(as_tuple=True), len(slots), features.dtype))


def ctc(lesson: Lesson) -> Learned:
    """Computes the loss of the CTC-based drafter and of the parallel drafter.

    Without `prefixes` it is -log of the probability that the slots collapse to the next `labels` tokens. With `prefixes` it is
    the mean of -log of the probabilities that the collapsed slots begin with the next 1, 2, ... tokens. The last token of each
    prefix is then a soft label, see `_labelled`. A head without a blank (the parallel drafter) uses the cross-entropy of slot
    k with token k.

    The option `regression` weighs SmoothL1 of slot k's state against the target's feature before token k, and of every pair's
    state against the target's feature before the next token.

    Slots follow a share `anchors` of the pairs of each text. The pairs are drawn anew in every step.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), section 3.2.
    """
    head, batch, frozen = lesson.head, lesson.batch, lesson.frozen
    mask = shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
    anchors = _anchors(mask, lesson)
    pairs = frozen.embed(batch.ids[:, 1:]), batch.features[:, :-1]
    entries = head.enter(*pairs)
    later = head.enter_ahead(*(rows.take_along_dim(anchors[..., None], 1) for rows in pairs)).flatten(1, 2)
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
        labelled = states[:, :count].float()  # there may be fewer labels than slots, or more
        places = anchors[chosen][:, None] + 1 + torch.arange(labelled.shape[1], device=rows.device)
        wanted = batch.final[rows[:, None], places.clamp(max=batch.ids.shape[1] - 1)]
        behind = losses.smooth_l1(labelled, wanted, there[:, : labelled.shape[1]].float())
        every = losses.smooth_l1(paired.float(), shifted(batch.final, 1), mask.float())
        regression = lesson.options["regression"] * (behind + every)
    if head.blank is None:
        learned = _spelled(lesson, [(slot, frozen.weight) for slot in states.unbind(1)], following)
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


def _spelled(
    lesson: Lesson, slots: Sequence[tuple[Float[Tensor, "n d"], Float[Tensor, "v d"]]], following: Following
) -> Learned:
    """Computes the cross-entropy of slot k with label k, weighted ``decay^k``.

    Args:
        slots: the states and the output layer's weight of each slot.
    """
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
    """Chooses the pairs that slots follow, among the pairs of answers: at random, or spread evenly during evaluation."""
    count = max(1, round(lesson.options["anchors"] * mask.shape[1]))
    if lesson.generator is None:
        order = -torch.arange(mask.shape[1], device=mask.device).expand_as(mask).mul(7919).remainder(mask.shape[1]).float()
    else:
        order = torch.rand(mask.shape, generator=lesson.generator, device=mask.device)
    return order.masked_fill(~mask, -torch.inf).topk(count, dim=1).indices.sort(dim=1).values


class Following(NamedTuple):
    """The labels of n pairs: the next k answer tokens after each pair's root, and m soft labels for each of them.

    Attributes:
        tokens: the answer tokens.
        there: whether the token exists; false after the end of the answer.
        likely: the target's most likely tokens at each place.
        shares: their probabilities, normalised to sum to 1 over these tokens.
    """

    tokens: Int[Tensor, "n k"]
    there: Bool[Tensor, "n k"]
    likely: Int[Tensor, "n k m"]
    shares: Float[Tensor, "n k m"]


def _labelled(lesson: Lesson, pairs: tuple[Int[Tensor, " n"], ...], count: int, dtype: torch.dtype) -> Following:
    """Returns the next `count` answer tokens after the root of each pair.

    The option `soft_labels` adds that many of the target's most likely tokens at each place. The token itself is the only
    label if the option is 0 or if the head learns whole sequences (`prefixes` is false).

    Args:
        pairs: number of the text, and place in it, of each pair.
    """
    batch, soft = lesson.batch, lesson.options["soft_labels"] if lesson.options.get("prefixes", True) else 0
    rows, places = pairs[0][:, None], pairs[1][:, None] + 2 + torch.arange(count, device=batch.ids.device)
    inside = places < batch.ids.shape[1]
    places = places.clamp(max=batch.ids.shape[1] - 1)
    tokens, there = batch.ids[rows, places], (batch.answer[rows, places] & inside).long().cumprod(-1).bool()
    if not soft:
        return Following(tokens, there, tokens[..., None], torch.ones(*tokens.shape, 1, device=tokens.device))
    before, weight = batch.final[rows, places - 1].flatten(0, 1).to(dtype), lesson.frozen.weight
    likely, shares = (rows.unflatten(0, tokens.shape) for rows in losses.likeliest(before, weight, min(soft, len(weight))))
    return Following(tokens, there, likely, shares)
