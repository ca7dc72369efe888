"""Losses of draft heads: pure functions, averaged over the positions that count.

p is what the head gives, q the target's law, as everywhere here. Masks are 1 where a position counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_SMALL = 1e-5
"""Added to the number of positions, so that a batch without any has loss 0 (EAGLE's released code)."""

_ROWS, _ROWS_ON_A_CARD = 128, 4096
"""Rows whose logits are held at once: on a CPU they fit in its cache, a card is kept busy."""

_NEVER = -1e30
"""Log-probability of what cannot happen: finite, because the gradient through two infinities would not be a number."""

IMPOSSIBLE = 1e20
"""A loss above this is of labels that no path of the frames stands for."""


def masked_mean(values: Float[Tensor, "*n"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean of `values` where the mask is 1, or weighted by it."""
    return (values * mask).sum() / (mask.sum() + _SMALL)


def cross_entropy(logits: Float[Tensor, "*n v"], labels: Int[Tensor, "*n"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean of -log p(label).

    Source: Medusa (arXiv 2401.10774), equation 1.
    """
    nll = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return masked_mean(nll.view(mask.shape), mask)


def soft_cross_entropy(
    logits: Float[Tensor, "*n v"], target_probs: Float[Tensor, "*n v"], mask: Float[Tensor, "*n"]
) -> Float[Tensor, ""]:
    """Mean of -sum_x q(x) log p(x): the classification loss of EAGLE and FSPAD.

    Source: EAGLE (arXiv 2401.15077), section 3.2; FSPAD (arXiv 2408.15562), released code.
    """
    return masked_mean(-(target_probs * logits.log_softmax(-1)).sum(-1), mask)


def distilled(
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "w d"],
    wanted: Float[Tensor, "n f"],
    target_weight: Float[Tensor, "w f"],
    mask: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """`soft_cross_entropy` of two linear output layers, some rows at a time: logits of all rows are never held at once,
    and their gradient is made where they are.

    Args:
        states, weight: the draft's state and output layer, `weight` row for row of the same tokens as `target_weight`.
        wanted: the target's state.
    """
    return _Distilled.apply(states, weight, wanted, target_weight, mask) / (mask.sum() + _SMALL)


def _parts(states: Tensor) -> Iterator[slice]:
    """Some rows at a time."""
    rows = _ROWS if states.device.type == "cpu" else _ROWS_ON_A_CARD
    return (slice(first, first + rows) for first in range(0, len(states), rows))


class _Distilled(torch.autograd.Function):
    """The sum over rows, with its gradient already made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:  # type: ignore[override]
        states, weight, wanted, target_weight, mask = args
        output, target_output = weight.to(states.dtype), target_weight.to(states.dtype)
        wanted = wanted.to(states.dtype)
        exact = torch.promote_types(states.dtype, torch.float32)
        total, to_states = mask.new_zeros(()), torch.empty_like(states)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(states):
            logits, wanted_logits = F.linear(states[part], output).to(exact), F.linear(wanted[part], target_output).to(exact)
            draft, probs = logits.softmax(-1), wanted_logits.softmax(-1)
            log_sum = logits.amax(-1) - draft.amax(-1).log()
            total += ((log_sum - torch.linalg.vecdot(probs, logits)) * mask[part]).sum()
            slope, rows = draft.sub_(probs).to(states.dtype), mask[part, None].to(states.dtype)
            to_states[part] = (slope @ output) * rows
            if to_weight is not None:
                to_weight += slope.T @ (states[part] * rows)
        ctx.save_for_backward(to_states, to_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_states, to_weight = ctx.saved_tensors
        return to_states * grad, None if to_weight is None else to_weight * grad, None, None, None


def log_probs(states: Float[Tensor, "n d"], weight: Float[Tensor, "w d"], ids: Int[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """``log_softmax(states weight^T)`` at `ids`, some rows at a time."""
    found, log_sum = logits_at(states, weight, ids)
    return found - log_sum[:, None]


def logits_at(
    states: Float[Tensor, "n d"], weight: Float[Tensor, "w d"], ids: Int[Tensor, "n s"]
) -> tuple[Float[Tensor, "n s"], Float[Tensor, " n"]]:
    """``states weight^T`` at `ids`, and the log of the sum of the exponentials of all; some rows at a time."""
    return _LogitsAt.apply(states, weight, ids)


class _LogitsAt(torch.autograd.Function):
    """Keeps the probabilities in the dtype of the states, for the gradient is made of them."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        states, weight, ids = args
        output, probs = weight.to(states.dtype), states.new_empty(len(states), len(weight))
        found = torch.empty(ids.shape, dtype=torch.promote_types(states.dtype, torch.float32), device=states.device)
        log_sum = found.new_empty(len(states))
        for part in _parts(states):
            logits = F.linear(states[part], output).to(found.dtype)
            chances = logits.softmax(-1)
            log_sum[part] = logits.amax(-1) - chances.amax(-1).log()
            found[part], probs[part] = logits.gather(1, ids[part]), chances
        ctx.save_for_backward(states, output, ids, probs)
        return found, log_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        states, output, ids, probs = ctx.saved_tensors
        to_states = torch.empty_like(states)
        to_weight = torch.zeros_like(output, dtype=grads[0].dtype) if ctx.needs_input_grad[1] else None
        to_found, to_sum = (one.to(probs.dtype) for one in grads)
        for part in _parts(states):
            slope = (probs[part] * to_sum[part, None]).scatter_add_(1, ids[part], to_found[part])
            to_states[part] = slope @ output
            if to_weight is not None:
                to_weight += slope.T @ states[part]
        return to_states, to_weight, None


@torch.no_grad()
def agreement(
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "w d"],
    wanted: Float[Tensor, "n f"],
    target_weight: Float[Tensor, "w f"],
) -> dict[str, Float[Tensor, ""]]:
    """Share of positions where ``states weight^T`` and ``wanted target_weight^T`` have the same likeliest token, and of sampled
    drafts that would be accepted; some rows at a time."""
    if not len(states):
        return {}
    same, kept = [], []
    for part in _parts(states):
        logits, target_logits = F.linear(states[part], weight), F.linear(wanted[part], target_weight)
        same.append(logits.argmax(-1) == target_logits.argmax(-1))
        kept.append(torch.minimum(logits.float().softmax(-1), target_logits.float().softmax(-1)).sum(-1))
    return {"top1": torch.cat(same).float().mean(), "acceptance": torch.cat(kept).mean()}


@torch.no_grad()
def likeliest(
    states: Float[Tensor, "n d"], weight: Float[Tensor, "w d"], count: int
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """The `count` likeliest tokens by ``softmax(states weight^T)``, and their probabilities among themselves; some rows at a
    time."""
    found = [F.linear(some, weight.to(some.dtype)).topk(count) for some in map(states.__getitem__, _parts(states))]
    ids, logits = torch.cat([one.indices for one in found]), torch.cat([one.values for one in found])
    return ids, logits.float().softmax(-1)


def kl(logits: Float[Tensor, "*n v"], target_probs: Float[Tensor, "*n v"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean of KL(q || p): `soft_cross_entropy` less the entropy of q, which has no gradient."""
    entropy = torch.special.entr(target_probs).sum(-1)
    return masked_mean(-(target_probs * logits.log_softmax(-1)).sum(-1) - entropy, mask)


def total_variation(
    logits: Float[Tensor, "*n v"], target_probs: Float[Tensor, "*n v"], mask: Float[Tensor, "*n"]
) -> Float[Tensor, ""]:
    """Mean of TV(p, q), which is 1 - the probability that a drafted token is accepted (Yin et al., Theorem 1)."""
    return masked_mean((logits.softmax(-1) - target_probs).abs().sum(-1) / 2, mask)


def smooth_l1(features: Float[Tensor, "*n d"], wanted: Float[Tensor, "*n d"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Mean over positions of the mean over entries of SmoothL1 with beta 1: the regression loss of EAGLE and FSPAD.

    Source: EAGLE (arXiv 2401.15077), section 3.2.
    """
    return masked_mean(F.smooth_l1_loss(features, wanted, reduction="none").mean(-1), mask)


def ctc(
    logprobs: Float[Tensor, "n t w"], labels: Int[Tensor, "n s"], lengths: Int[Tensor, " n"], blank: int
) -> Float[Tensor, " n"]:
    """-log P(labels), summed over all paths of t frames that collapse to them (repeats merged, then blanks dropped).

    ``alpha_t(s) = P_t(y'_s) (alpha_{t-1}(s) + alpha_{t-1}(s - 1) + [y'_s is no blank and not y'_{s-2}] alpha_{t-1}(s - 2))``
    on y' = (blank, y_1, blank, ..., y_s, blank), and P = alpha_T(last) + alpha_T(last but one).

    Args:
        lengths: how many of each row's labels count, 0 or more.

    Returns:
        One loss a row; 1e30 or so where no path of t frames collapses to the labels.

    Source: Graves et al. 2006, Connectionist Temporal Classification, section 4.1.
    """
    spelled = torch.cat([labels, torch.full_like(labels[:, :1], blank)], dim=1)
    return ctc_of(logprobs.gather(2, spelled[:, None].expand(-1, logprobs.shape[1], -1)), labels, lengths)


def ctc_of(emitted: Float[Tensor, "n t _"], labels: Int[Tensor, "n s"], lengths: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`ctc` from the log-probabilities of each row's own labels and, last, of the blank: nothing else enters it."""
    *_, alpha = _walk(emitted, labels)
    last = 2 * lengths[:, None]
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, _NEVER)], dim=1)
    return -ends.logsumexp(1)


def ctc_prefixes(
    emitted: Float[Tensor, "n t _"],
    labels: Int[Tensor, "n s"],
    lasts: Int[Tensor, "n s m"],
    said: Float[Tensor, "n t s m"],
) -> Float[Tensor, "n s m"]:
    """-log of the probability that what the frames collapse to *begins* with the first k labels and then one of `lasts[k]`,
    whatever follows.

    A prefix is complete in the frame in which its last token is said first; what the later frames say is free. This is the
    probability by which drafts are chosen, and that the first k + 1 drafted tokens are those.

    Args:
        emitted: as for `ctc_of`.
        said: log-probabilities of `lasts`, in every frame.
    """
    repeats = lasts == F.pad(labels, (1, 0), value=-1)[:, :-1, None]
    before = F.pad(emitted.new_zeros(len(labels), 1), (0, 2 * labels.shape[1]), value=_NEVER)
    found = []
    for frame, alpha in zip(said.unbind(1), _walk(emitted, labels), strict=True):
        label = F.pad(before[:, 1:-2:2], (1, 0), value=_NEVER)[..., None].masked_fill(repeats, _NEVER)
        found.append(torch.logaddexp(before[:, :-1:2, None], label).clamp(min=_NEVER) + frame)
        before = alpha
    return -torch.stack(found).logsumexp(0)


def _walk(emitted: Float[Tensor, "n t _"], labels: Int[Tensor, "n s"]) -> Iterator[Tensor]:
    """Frame by frame, log alpha of all states of ``(blank, y_1, blank, ..., y_s, blank)``."""
    count, size = labels.shape
    skips = torch.zeros(count, 2 * size + 1, dtype=torch.bool, device=labels.device)
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    states = torch.arange(2 * size + 1, device=labels.device)
    emitted = emitted[:, :, torch.where(states % 2 == 1, states // 2, size)]
    alpha = torch.cat([emitted[:, 0, :2], emitted.new_full((count, 2 * size - 1), _NEVER)], dim=1)[:, : len(states)]
    yield alpha
    for frame in emitted.unbind(1)[1:]:
        one, two = (F.pad(alpha, (back, 0), value=_NEVER)[:, :-back] for back in (1, 2))
        entered = torch.logaddexp(one, two.masked_fill(~skips, _NEVER)).clamp(min=_NEVER)
        alpha = torch.logaddexp(alpha, entered).clamp(min=_NEVER) + frame
        yield alpha
