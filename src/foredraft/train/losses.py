"""Losses of draft heads: pure functions, averaged over the positions that count.

p is the head's distribution and q the target's. A mask is 1 at a position that counts and 0 elsewhere.
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
"""Number of rows whose logits are held at the same time. On a CPU they fit in its cache; on a GPU they keep it busy."""

_NEVER = -1e30
"""Log-probability of an impossible event. It is finite, because the gradient through two infinities would be NaN."""

IMPOSSIBLE = 1e20
"""A CTC loss above this value means that no path of the frames collapses to the labels."""


def masked_mean(values: Float[Tensor, "*n"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Computes the mean of `values`, weighted by the mask."""
    return (values * mask).sum() / (mask.sum() + _SMALL)


def distilled(
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "w d"],
    wanted: Float[Tensor, "n f"],
    target_weight: Float[Tensor, "w f"],
    mask: Float[Tensor, " n"],
) -> Float[Tensor, ""]:
    """Computes the mean of -sum_x q(x) log p(x), the classification loss of EAGLE and FSPAD, from two linear output layers.

    The logits of all rows are never held at the same time. The forward pass computes the gradient of each chunk of rows.

    Args:
        states: the draft head's states before its output layer.
        weight: weight of the draft head's output layer. Row i belongs to the same token as row i of `target_weight`.
        wanted: the target's states before its output layer.
        target_weight: weight of the target's output layer, for the tokens that can be drafted.
        mask: weight of each row.

    Source: EAGLE (arXiv 2401.15077), section 3.2; FSPAD (arXiv 2408.15562), released code.
    """
    return _Distilled.apply(states, weight, wanted, target_weight, mask) / (mask.sum() + _SMALL)


def _parts(states: Tensor) -> Iterator[slice]:
    """Yields the chunks of rows that are computed together."""
    rows = _ROWS if states.device.type == "cpu" else _ROWS_ON_A_CARD
    return (slice(first, first + rows) for first in range(0, len(states), rows))


class _Distilled(torch.autograd.Function):
    """Sum of the cross-entropy over the rows. The forward pass already computes the gradient."""

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
    """Computes ``log_softmax(states weight^T)`` at `ids`, in chunks of rows to save memory."""
    found, log_sum = logits_at(states, weight, ids)
    return found - log_sum[:, None]


def logits_at(
    states: Float[Tensor, "n d"], weight: Float[Tensor, "w d"], ids: Int[Tensor, "n s"]
) -> tuple[Float[Tensor, "n s"], Float[Tensor, " n"]]:
    """Computes ``states weight^T`` at `ids`, in chunks of rows to save memory.

    Returns:
        The logits at `ids`, and the logsumexp over all logits of each row.
    """
    return _LogitsAt.apply(states, weight, ids)


class _LogitsAt(torch.autograd.Function):
    """Computes `logits_at`. It keeps the probabilities in the dtype of the states, for the backward pass."""

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
        to_found, to_sum = (grad.to(probs.dtype) for grad in grads)
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
    """Compares the draft logits ``states weight^T`` with the target logits ``wanted target_weight^T``, in chunks of rows.

    Returns:
        ``top1``: share of positions at which both have the same most likely token. ``acceptance``: probability that a sampled
        draft is accepted, averaged over the positions. Empty if there are no positions.
    """
    if not len(states):
        return {}
    same, accepted = [], []
    for part in _parts(states):
        logits, target_logits = F.linear(states[part], weight), F.linear(wanted[part], target_weight)
        same.append(logits.argmax(-1) == target_logits.argmax(-1))
        accepted.append(torch.minimum(logits.float().softmax(-1), target_logits.float().softmax(-1)).sum(-1))
    return {"top1": torch.cat(same).float().mean(), "acceptance": torch.cat(accepted).mean()}


@torch.no_grad()
def likeliest(
    states: Float[Tensor, "n d"], weight: Float[Tensor, "w d"], count: int
) -> tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]:
    """Finds the `count` most likely tokens by ``softmax(states weight^T)``, in chunks of rows to save memory.

    Returns:
        Their token ids, and their probabilities, normalised to sum to 1 over these tokens.
    """
    chunks = [F.linear(rows, weight.to(rows.dtype)).topk(count) for rows in map(states.__getitem__, _parts(states))]
    ids, logits = torch.cat([chunk.indices for chunk in chunks]), torch.cat([chunk.values for chunk in chunks])
    return ids, logits.float().softmax(-1)


def smooth_l1(features: Float[Tensor, "*n d"], wanted: Float[Tensor, "*n d"], mask: Float[Tensor, "*n"]) -> Float[Tensor, ""]:
    """Computes the mean over positions of the mean over entries of SmoothL1 (beta 1), the regression loss of EAGLE and FSPAD.

    Source: EAGLE (arXiv 2401.15077), section 3.2.
    """
    return masked_mean(F.smooth_l1_loss(features, wanted, reduction="none").mean(-1), mask)


def ctc(
    logprobs: Float[Tensor, "n t w"], labels: Int[Tensor, "n s"], lengths: Int[Tensor, " n"], blank: int
) -> Float[Tensor, " n"]:
    """Computes -log P(labels): P sums over all paths of t frames that collapse to the labels.

    A path collapses when its repeats are merged and then its blanks are dropped. The recursion is

    ``alpha_t(s) = P_t(y'_s) (alpha_{t-1}(s) + alpha_{t-1}(s - 1) + [y'_s is no blank and not y'_{s-2}] alpha_{t-1}(s - 2))``
    on y' = (blank, y_1, blank, ..., y_s, blank), and P = alpha_T(last) + alpha_T(last but one).

    Args:
        lengths: number of labels of each row that count, 0 or more.

    Returns:
        One loss per row, about 1e30 where no path of t frames collapses to the labels.

    Source: Graves et al. 2006, Connectionist Temporal Classification, section 4.1.
    """
    spelled = torch.cat([labels, torch.full_like(labels[:, :1], blank)], dim=1)
    return ctc_of(logprobs.gather(2, spelled[:, None].expand(-1, logprobs.shape[1], -1)), labels, lengths)


def ctc_of(emitted: Float[Tensor, "n t _"], labels: Int[Tensor, "n s"], lengths: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Computes `ctc` from the log-probabilities that it needs.

    Args:
        emitted: log-probabilities in each frame of the row's own labels and, in the last column, of the blank.
        labels, lengths: as for `ctc`.
    """
    *_, alpha = _walk(emitted, labels)
    last = 2 * lengths[:, None]
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0)).masked_fill(last == 0, _NEVER)], dim=1)
    return -ends.logsumexp(1)


def ctc_prefixes(
    emitted: Float[Tensor, "n t _"], labels: Int[Tensor, "n s"], lasts: Int[Tensor, "n s m"], said: Float[Tensor, "n t s m"]
) -> Float[Tensor, "n s m"]:
    """Computes -log of the probability of prefixes of the collapsed frames.

    Prefix (k, m) consists of the first k labels and then the token ``lasts[k, m]``. Any tokens may follow it. A prefix is
    complete in the frame that first emits its last token, and the later frames are free. Drafts are chosen by this
    probability: it is the probability that the first k + 1 drafted tokens are the prefix.

    Args:
        emitted: as for `ctc_of`.
        labels: the labels of each row.
        lasts: candidates for the last token of each prefix.
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
    """Yields for each frame log alpha of all states of ``(blank, y_1, blank, ..., y_s, blank)``."""
    count, size = labels.shape
    skips = torch.zeros(count, 2 * size + 1, dtype=torch.bool, device=labels.device)
    skips[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    states = torch.arange(2 * size + 1, device=labels.device)
    emitted = emitted[:, :, torch.where(states % 2 == 1, states // 2, size)]
    alpha = torch.cat([emitted[:, 0, :2], emitted.new_full((count, 2 * size - 1), _NEVER)], dim=1)[:, : len(states)]
    yield alpha
    for frame in emitted.unbind(1)[1:]:
        stepped, skipped = (F.pad(alpha, (back, 0), value=_NEVER)[:, :-back] for back in (1, 2))
        entered = torch.logaddexp(stepped, skipped.masked_fill(~skips, _NEVER)).clamp(min=_NEVER)
        alpha = torch.logaddexp(alpha, entered).clamp(min=_NEVER) + frame
        yield alpha
