"""Training recipes of the methods: RECIPES holds the loss and the default settings of every head.

The rows of a batch are aligned as in decoding, see `foredraft.heads.layers`: pair j is (token j + 1, feature j).

    pair                  0      1      2
    token                 t1     t2     t3
    feature               f0     f1     f2
    predicted feature     f1     f2     f3
    predicted token       t2     t3     t4

The target's output layer, applied to the predicted feature, gives the distribution of the predicted token.
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
"""Width of the uniform noise on input features, and the text length at which it applies (EAGLE's and FSPAD's released code).

The width is inversely proportional to the length of the text.
"""


class Learned(NamedTuple):
    """Result of a recipe on a batch.

    Attributes:
        loss: the loss to minimise.
        figures: other metrics, as means over the positions of the batch.
    """

    loss: Float[Tensor, ""]
    figures: Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Lesson:
    """Input of a recipe.

    Attributes:
        head: the head that is trained.
        batch: the texts with the target's features.
        frozen: the target's embedding and output layer.
        rotary: rotary tables of the head's layer.
        options: options of the recipe.
        generator: source of all randomness in this batch. None during evaluation, in which nothing is random.
    """

    head: Any
    batch: Batch
    frozen: Frozen
    rotary: Tables
    options: Mapping[str, Any]
    generator: torch.Generator | None


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
    """Computes the loss of Medusa, the sum of its heads' cross-entropies.

    Head k predicts the token k + 1 places after the root. Its cross-entropy is weighted ``decay^k``. With `soft_labels`, the
    target's most likely tokens at that place are the labels, see `_labelled`.

    Source: Medusa (arXiv 2401.10774), section 2.2.1.
    """
    batch, head = lesson.batch, lesson.head
    mask = _shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
    features = batch.features[:, :-1][mask]
    slots = [(block(features), lm_head.weight) for block, lm_head in zip(head.blocks, head.lm_heads, strict=True)]
    return _spelled(lesson, slots, _labelled(lesson, mask.nonzero(as_tuple=True), len(slots), features.dtype))


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
        mask = _shifted(batch.answer, 2 + i, to=length)[:, :length]
        tokens = torch.cat([embeddings[:, 1 + k : 1 + k + length][mask] for k in range(i + 1)], dim=-1)
        states, wanted = head.state(i, read[:, :length][mask], tokens), batch.final[:, 1 + i : 1 + i + length][mask]
        loss, agreement = _classified(lesson, states, head.lm_heads[i].weight, None, wanted)
        total = total + loss / head.num_slots
        figures |= {f"{name}_{i}" if i else name: value for name, value in agreement.items()}
    return Learned(total, figures)


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
    mask = _shifted(batch.answer, 2, to=batch.ids.shape[1] - 1)
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
        every = losses.smooth_l1(paired.float(), _shifted(batch.final, 1), mask.float())
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


def _shifted(
    values: Float[Tensor, "b t *d"] | Int[Tensor, "b t"] | Bool[Tensor, "b t"], by: int, to: int | None = None
) -> Tensor:
    """Shifts values along the text: ``out[:, j] = values[:, j + by]``, zero beyond the end.

    Args:
        to: length of the result; None: t - 1, the number of pairs.
    """
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
    """Computes the soft cross-entropy with the target's distribution and, during evaluation, the `agreement` with it.

    Args:
        token_ids: the tokens that can be drafted; None: all tokens. A position whose most likely token cannot be drafted is
            left out, as in EAGLE-3.
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
        raise ValueError(f"anchors must be a share of the positions, above 0 and at most 1, got {options['anchors']}")
    if options.get("soft_labels", 0) < 0:
        raise ValueError(f"soft_labels must be at least 0 (0: the tokens of the text), got {options['soft_labels']}")


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
