"""Expected rejections of speculative decoding, exactly: Theorems 1 to 3 of Yin et al. (arXiv 2411.00841) and what a finite
lookahead and the bonus token change.

p is the draft law, q the target's, TV their total variation distance; T is the horizon, M the number of drafts. Sums over
prefixes are carried as one number per last token, which makes them O(T V^2 M). ``f`` is the measure of prefixes whose last
token replaced a rejected one, so that a new retry among M drafts begins after it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.theory.chains import Pair, Rows, residual, total_variation


def speculative_rejections(pair: Pair, horizon: int) -> float:
    """Expected rejections of one draft: the sum over n of E_q[TV(p_n, q_n)].

    Source: Yin et al. (arXiv 2411.00841), Theorem 1. By Theorem 2 also the least that any unbiased algorithm reaches that
    accepts or rejects one draft per position.
    """
    return batch_rejections(pair, horizon, 1)


def batch_rejections(pair: Pair, horizon: int, drafts: float | int) -> float:
    """Expected rejections of Algorithm 4 with `drafts` independent continuations to the horizon, no bonus token.

    E[N] = sum_n E_q[TV_n] - sum_x f(x) (TV_n - prod_m TV(q_n^(m), p_n)); `math.inf` gives the limit of many drafts.
    Source: Yin et al. (arXiv 2411.00841), Theorem 3.

    Raises:
        ValueError: fewer than one draft, a horizon below 1, or no limit because p does not cover q.
    """
    return float(sum(rejections_by_position(pair, horizon, drafts)))


def rejections_by_position(pair: Pair, horizon: int, drafts: float | int) -> list[float]:
    """The terms of `batch_rejections`: the probability that position n is a rejection, for n = 1 to `horizon`."""
    check_drafts(drafts)
    if drafts == inf:
        pair.require_support()
    output = retried = np.ones(1)  # measure of the last token: under q, and of those that replaced a rejected one (f)
    found = []
    for p, q in pair.steps(horizon):
        fail, last = retry(p, q, drafts)
        found.append(float((output - retried) @ total_variation(p, q) + retried @ fail))
        retried = (retried * fail) @ last + (output - retried) @ np.maximum(q - p, 0.0)
        output = output @ q
    return found


def check_drafts(drafts: float | int) -> None:
    """Checks a number of drafts.

    Raises:
        ValueError: it is below 1, or no whole number.
    """
    if drafts != inf and (drafts < 1 or drafts != int(drafts)):
        raise ValueError(f"the number of drafts M must be a whole number of at least 1, or inf, got {drafts:g}")


def retry(p: Rows, q: Rows, drafts: float | int) -> tuple[Float[np.ndarray, " s"], Rows]:
    """Testing M independent draws from p one after another: the probability that all fail, and the law after that.

    Each failure leaves ``q <- norm([q - p]+)``. With M = inf nothing fails, and the law is of no meaning.
    """
    if drafts == inf:
        return np.zeros(len(q)), q
    fail = np.ones(len(q))
    for _ in range(int(drafts)):
        fail = fail * total_variation(p, q)
        q = residual(p, q)
    return fail, q


class Rounds(NamedTuple):
    """Expected counts of one output.

    Attributes:
        rejections: drafts (or retries of all M) that failed.
        target_calls: steps of the target, one a round.
    """

    rejections: float
    target_calls: float


def lookahead_rejections(
    pair: Pair, horizon: int, lookahead: int, *, drafts: int = 1, bonus: bool = True, tests_last: bool = False
) -> Rounds:
    """Rejections and target calls where a round drafts `lookahead` tokens, as engines do, M drafts being retried at its first.

    With `bonus`, a round whose drafts are all accepted emits one more token from q, which is never tested. The engine leaves
    the last token before the horizon to the target, and drafts one token less than what remains; `tests_last` drafts it too.
    Without the bonus token, and with a lookahead of the horizon, the rejections are those of Theorems 1 and 3.

    Source: recursion over (position, place in the round); the theorems assume lookahead to the horizon and no bonus token.

    Raises:
        ValueError: lookahead, drafts or horizon are below 1.
    """
    check_drafts(drafts)
    if lookahead < 1:
        raise ValueError(f"the lookahead K must be at least 1 token, got {lookahead}")
    place = Place(lookahead, bonus, tests_last)
    weights = {0: np.ones(1)}  # tokens of this round accepted so far -> measure of the last token
    rejections = calls = 0.0
    for n, (p, q) in enumerate(pair.steps(horizon)):
        fail, last = retry(p, q, drafts)
        starts = weights.get(0, np.zeros(len(p)))
        calls += float(starts.sum())
        following: dict[int, np.ndarray] = {}
        for accepted, weight in weights.items():
            failed, after = (fail, last) if accepted == 0 else (total_variation(p, q), residual(p, q))
            if not place.is_tested(accepted, horizon - n):
                failed = np.zeros(len(p))
            rejected = (weight * failed) @ after
            rejections += float(weight @ failed)
            for then, measure in ((0, rejected), (place.after(accepted, horizon - n), weight @ q - rejected)):
                following[then] = following.get(then, 0.0) + measure
        weights = following
    return Rounds(rejections, calls)


class Place(NamedTuple):
    """Where a position stands in its round."""

    lookahead: int
    bonus: bool
    tests_last: bool

    def is_tested(self, accepted: int, left: int) -> bool:
        """Whether the next token is a draft; else it is the bonus token. `left` counts it and those after it."""
        return not self.bonus or (accepted < self.lookahead and (left > 1 or self.tests_last))

    def after(self, accepted: int, left: int) -> int:
        """Tokens of the round accepted once this one is; 0 where a new round begins."""
        if not self.is_tested(accepted, left):
            return 0
        return 0 if not self.bonus and accepted + 1 == self.lookahead else accepted + 1


def speedup(horizon: int, rejections: float | int) -> float:
    """T / E[rejections], the paper's speed-up; at most T, since there is one call of the target at least."""
    return horizon / max(1.0, rejections)


Acceptance = Callable[[Rows, Rows], Rows]
"""Probability b(x) of accepting draft x, from p and q, a row per last token."""


def least_acceptance(p: Float[np.ndarray, "*s v"], q: Float[np.ndarray, "*s v"]) -> Float[np.ndarray, "*s v"]:
    """b = min(1, q / p), speculative decoding's own."""
    return np.minimum(1.0, np.divide(q, p, out=np.ones_like(q), where=p > 0))


class Checked(NamedTuple):
    """What Theorem 2 says of an acceptance function.

    Attributes:
        rejections: expected ones, if prefixes have the target's law.
        bound: of every unbiased algorithm.
        is_unbiased: whether some law after a rejection makes it unbiased: b p <= q everywhere.
    """

    rejections: float
    bound: float
    is_unbiased: bool


def check_acceptance(pair: Pair, horizon: int, acceptance: Acceptance) -> Checked:
    """Expected rejections of an acceptance function beside the lower bound, which no unbiased one passes.

    Source: Yin et al. (arXiv 2411.00841), Theorem 2: unbiased means b p <= q, hence acceptance of at most sum min(p, q).

    Raises:
        ValueError: b leaves the range 0 to 1.
    """
    output, rejections, unbiased = np.ones(1), 0.0, True
    for p, q in pair.steps(horizon):
        b = acceptance(p, q)
        if not ((b >= 0) & (b <= 1)).all():
            raise ValueError("an acceptance function must lie between 0 and 1")
        rejections += float(output @ (1 - (b * p).sum(-1)))
        unbiased = unbiased and bool((b * p <= q * (1 + 1e-12)).all())
        output = output @ q
    return Checked(rejections, speculative_rejections(pair, horizon), unbiased)
