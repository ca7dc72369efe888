"""Figures of a run, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foredraft.core.metrics import Metrics, StepRecord, summarize

FIVE = [
    StepRecord(3, 3, 3, "bonus", draft_s=1.0, verify_s=2.0, rule_s=0.25, cache_s=0.5),
    StepRecord(3, 0, 3, "recovered", draft_s=1.0, verify_s=2.0, rule_s=0.25, cache_s=0.5),
    StepRecord(6, 1, 2, "recovered", branched=True, draft_s=3.0, verify_s=4.0, rule_s=0.5, cache_s=0.5),
    StepRecord(1, 1, 1, "bonus", draft_s=0.5, verify_s=1.0),
    StepRecord(0, 0, 0, "bonus", verify_s=1.0),
]
"""Accepted 3, 0, 1, 1, 0 of trees that are 3, 3, 2, 1, 0 deep."""


def test_nothing_ran() -> None:
    empty = summarize([])
    assert empty == Metrics()
    assert (empty.num_steps, empty.acceptance_length, empty.acceptance_rate) == (0, 1.0, 0.0)
    assert empty.joint_acceptance_rate == empty.conditional_acceptance_rate == []


@pytest.mark.parametrize("steps", [1, 4])
def test_plain_decoding_accepts_nothing(steps: int) -> None:
    result = summarize([StepRecord(0, 0, 0, "plain", verify_s=0.5)] * steps)
    assert result == Metrics(num_steps=steps, verify_s=0.5 * steps)


def test_five_steps_by_hand() -> None:
    result = summarize(FIVE)
    assert (result.num_steps, result.num_draft_tokens, result.num_accepted_tokens) == (5, 13, 5)
    assert result.acceptance_length == pytest.approx(1 + 5 / 5)
    assert result.acceptance_rate == pytest.approx(5 / 13)
    assert result.joint_acceptance_rate == pytest.approx([3 / 5, 1 / 5, 1 / 5])
    # first token: 4 trees had one, 3 times it was accepted; second: the trees of depth 3 and 2 that got there; third: one
    assert result.conditional_acceptance_rate == pytest.approx([3 / 4, 1 / 2, 1 / 1])
    assert result.branched_rate == pytest.approx(1 / 5)
    assert (result.draft_s, result.verify_s, result.rule_s, result.cache_s) == pytest.approx((5.5, 10.0, 1.0, 1.5))


def test_a_position_that_no_step_reached() -> None:
    result = summarize([StepRecord(2, 0, 2, "recovered")] * 3)
    assert result.joint_acceptance_rate == result.conditional_acceptance_rate == [0.0, 0.0]
    assert result.acceptance_length == 1.0 and result.acceptance_rate == 0.0


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_chains_of_one_depth(depth: int) -> None:
    """There the joint rate is the product of the conditional ones, and its sum is the mean number accepted."""
    result = summarize([StepRecord(depth, accepted, depth, "any") for accepted in range(depth + 1)])
    product = 1.0
    for k in range(depth):
        product *= result.conditional_acceptance_rate[k]
        assert result.joint_acceptance_rate[k] == pytest.approx(product)
        assert result.conditional_acceptance_rate[k] == pytest.approx((depth - k) / (depth - k + 1))
    assert result.acceptance_length == pytest.approx(1 + sum(result.joint_acceptance_rate)) == pytest.approx(1 + depth / 2)


def test_the_order_of_steps_does_not_matter() -> None:
    assert summarize(FIVE[::-1]) == summarize(FIVE)
    assert summarize([replace(FIVE[0], kind="recovered"), *FIVE[1:]]) == summarize(FIVE)
