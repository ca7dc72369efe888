"""Losses of draft heads against brute force, torch's own and finite differences."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exact import collapse
from foredraft.train.losses import (
    ctc,
    ctc_prefixes,
    distilled,
    log_probs,
    logits_at,
    masked_mean,
    smooth_l1,
)

BLANK = 0


def brute(logprobs: Tensor, labels: tuple[int, ...]) -> Tensor:
    """P(labels) over all paths of one example."""
    frames, width = logprobs.shape
    paths = [path for path in product(range(width), repeat=frames) if collapse(path, BLANK) == labels]
    if not paths:
        return logprobs.new_zeros(())
    return sum((logprobs[range(frames), path].sum().exp() for path in map(list, paths)), logprobs.new_zeros(()))


def frames(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize("labels", [(), (1,), (1, 2), (1, 1), (3, 3, 3), (1, 2, 1), (2, 2, 1, 3), (1, 2, 3, 1, 2, 3)], ids=str)
def test_ctc_is_the_sum_over_all_paths(labels: tuple[int, ...]) -> None:
    logprobs = frames(6, 4).requires_grad_()
    given = torch.tensor([labels or (1,)])
    loss = ctc(logprobs[None], given, torch.tensor([len(labels)]), BLANK)[0]
    expected = -brute(logprobs, labels).log()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    ours, theirs = (torch.autograd.grad(one, logprobs, retain_graph=True)[0] for one in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_probabilities_of_all_labels_sum_to_1() -> None:
    logprobs = frames(6, 4, seed=1)
    every = [labels for size in range(7) for labels in product((1, 2, 3), repeat=size)]
    losses = [float(ctc(logprobs[None], torch.tensor([one or (1,)]), torch.tensor([len(one)]), BLANK)) for one in every]
    assert np.exp(-np.array(losses)).sum() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("labels", "paths"), [((), 1), ((1,), 6), ((1, 2), 5), ((1, 1), 1), ((1, 2, 1), 1), ((2,), 6), ((2, 1), 5)]
)
def test_uniform_frames(labels: tuple[int, ...], paths: int) -> None:
    """Two symbols and the blank, three frames: 27 equal paths."""
    uniform = torch.full((1, 3, 3), 1 / 3, dtype=torch.float64).log()
    loss = ctc(uniform, torch.tensor([labels or (1,)]), torch.tensor([len(labels)]), BLANK)
    assert float(torch.exp(-loss)) == pytest.approx(paths / 27, abs=1e-15)


def test_ctc_is_torchs_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(5, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, 6, (5, 3), generator=generator)
    lengths = torch.tensor([3, 2, 1, 0, 3])
    ours = ctc(raw.log_softmax(-1), labels, lengths, BLANK)
    theirs = F.ctc_loss(
        raw.log_softmax(-1).transpose(0, 1), labels, torch.full((5,), 8), lengths, blank=BLANK, reduction="none"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    pair = [torch.autograd.grad(one.sum(), raw, retain_graph=True)[0] for one in (ours, theirs)]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_reached_is_finite_and_so_is_its_gradient() -> None:
    raw = torch.zeros(1, 2, 3, requires_grad=True)
    loss = ctc(raw.log_softmax(-1), torch.tensor([[1, 1]]), torch.tensor([2]), BLANK)
    assert float(loss.detach()) > 1e29
    assert torch.isfinite(torch.autograd.grad(loss.sum(), raw)[0]).all()


def test_collapse_is_applied_once() -> None:
    assert collapse((1, 1, 0, 1, 2, 2, 0), BLANK) == (1, 1, 2)
    assert collapse(collapse((1, 0, 1), BLANK), BLANK) == (1,) != collapse((1, 0, 1), BLANK)
    assert collapse((0, 0, 0), BLANK) == ()


LOGITS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROBS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)
MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.float64)


def soft_cross_entropy(logits: Tensor, target_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean of -sum_x q(x) log p(x), over whole laws."""
    return masked_mean(-(target_probs * logits.log_softmax(-1)).sum(-1), mask)


def test_gradients_of_features() -> None:
    torch.autograd.gradcheck(lambda x: smooth_l1(x, PROBS, MASK), LOGITS.clone().requires_grad_())


def test_values() -> None:
    one_hot = F.one_hot(torch.arange(3), 5).double().expand(4, 3, 5)
    labels = torch.arange(3).expand(4, 3)
    nll = F.cross_entropy(LOGITS.flatten(0, -2), labels.flatten(), reduction="none")
    torch.testing.assert_close(soft_cross_entropy(LOGITS, one_hot, MASK), masked_mean(nll.view(MASK.shape), MASK))


def test_only_the_masked_positions_count() -> None:
    other = LOGITS.clone()
    other[MASK == 0] += 7 * torch.arange(5.0, dtype=torch.float64)
    for loss in (soft_cross_entropy, smooth_l1):
        assert float(loss(other, PROBS, MASK)) == float(loss(LOGITS, PROBS, MASK))
        assert float(loss(LOGITS, PROBS, MASK * 0)) == 0


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_distilled_is_soft_cross_entropy_of_two_output_layers(rows):
    generator = torch.Generator().manual_seed(rows)
    states, weight, wanted, target_weight = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=i < 2)
        for i, size in enumerate([(rows, 6), (11, 6), (rows, 8), (11, 8)])
    )
    mask = (torch.rand(rows, generator=generator) < 0.7).double()
    plain = soft_cross_entropy(states @ weight.T, (wanted @ target_weight.T).softmax(-1), mask)
    fused = distilled(states, weight, wanted, target_weight, mask)
    torch.testing.assert_close(fused, plain)
    for one, other in zip(
        torch.autograd.grad(3 * fused, [states, weight]), torch.autograd.grad(3 * plain, [states, weight]), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [1, 3, 300])
def test_log_probs_at_some_tokens_are_those_of_all(rows):
    generator = torch.Generator().manual_seed(rows)
    states, weight, upstream = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in [(rows, 6), (11, 6), (rows, 4)]
    )
    ids = torch.randint(11, (rows, 3), generator=generator)
    logits = states @ weight.T
    plain = torch.cat([logits.gather(1, ids), logits.logsumexp(1, keepdim=True)], dim=1)
    found, log_sum = logits_at(states, weight, ids)
    some = torch.cat([found, log_sum[:, None]], dim=1)
    torch.testing.assert_close(some, plain)
    for one, other in zip(
        torch.autograd.grad((some * upstream).sum(), [states, weight], retain_graph=True),
        torch.autograd.grad((plain * upstream).sum(), [states, weight], retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(log_probs(states, weight, ids), logits.log_softmax(-1).gather(1, ids))


@pytest.mark.parametrize("labels", [(1,), (1, 2), (1, 1), (3, 3, 3), (1, 2, 1), (2, 2, 1, 3), (1, 2, 3, 1, 2, 3)], ids=str)
def test_a_prefix_is_the_sum_over_all_paths_that_begin_with_it(labels: tuple[int, ...]) -> None:
    raw = frames(6, 4, seed=2).requires_grad_()
    logprobs = raw.log_softmax(-1)
    every = [(path, collapse(path, BLANK)) for path in product(range(4), repeat=6)]
    spelled = torch.tensor([*labels, BLANK])
    lasts = torch.tensor([1, 2, 3]).expand(1, len(labels), -1)
    said = logprobs[None, :, lasts[0].flatten()].unflatten(2, lasts.shape[1:])
    found = ctc_prefixes(logprobs[None, :, spelled], torch.tensor([labels]), lasts, said)[0]
    for k, last in product(range(len(labels)), (1, 2, 3)):
        paths = [list(path) for path, said in every if said[: k + 1] == (*labels[:k], last)]
        loss = found[k, last - 1]
        if not paths:
            assert loss > 1e29
            continue
        expected = -sum(logprobs[range(6), path].sum().exp() for path in paths).log()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(one, raw, retain_graph=True)[0] for one in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
