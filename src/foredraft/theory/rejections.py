"""Expected rejections of speculative decoding, computed exactly.

The module computes Theorems 1 to 3 of Yin et al. (arXiv 2411.00841), and the effect of a finite lookahead and the bonus token.

p is the draft law, q the target law, and TV their total variation distance. T is the horizon and M the number of drafts. A sum
over prefixes is kept as one number per last token, so the cost is O(T V^2 M). ``f`` is the measure of the prefixes whose last
token replaced a rejected draft. After such a prefix a new retry among M drafts begins.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.core.errors import UserError
from foredraft.theory.chains import Pair, Rows, residual, total_variation


def speculative_rejections(pair: Pair, horizon: int) -> float:
    """Computes the expected rejections with one draft: the sum over n of E_q[TV(p_n, q_n)].

    By Theorem 2, it is also the minimum over all unbiased algorithms that accept or reject one draft per position.

    Source: Yin et al. (arXiv 2411.00841), Theorem 1.
    """
    return batch_rejections(pair, horizon, 1)


def batch_rejections(pair: Pair, horizon: int, drafts: float | int) -> float:
    """Computes the expected rejections of Algorithm 4 with independent drafts to the horizon and no bonus token.

    E[N] = sum_n E_q[TV_n] - sum_x f(x) (TV_n - prod_m TV(q_n^(m), p_n))

    Args:
        drafts: number of drafts M; `math.inf` gives the limit of many drafts.

    Source: Yin et al. (arXiv 2411.00841), Theorem 3.

    Raises:
        ValueError: there are fewer than one draft, the horizon is below 1, or the limit does not exist because p does not
            cover q.
    """
    return float(sum(rejections_by_position(pair, horizon, drafts)))


def rejections_by_position(pair: Pair, horizon: int, drafts: float | int) -> list[float]:
    """Computes the terms of `batch_rejections`: the probability of a rejection at each position n = 1 to `horizon`."""
    check_drafts(drafts)
    if drafts == inf:
        pair.require_support()
    output = retried = np.ones(1)  # measures of the last token: all prefixes (q), and those ending in a replacement (f)
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
        ValueError: the number is below 1, or not a whole number.
    """
    if drafts != inf and (drafts < 1 or drafts != int(drafts)):
        raise UserError(f"the number of drafts M must be a whole number of at least 1, or inf, got {drafts:g}")


def retry(p: Rows, q: Rows, drafts: float | int) -> tuple[Float[np.ndarray, " s"], Rows]:
    """Tests M independent draws from p one after another.

    Each rejection replaces q by ``norm([q - p]+)``.

    Returns:
        The probability that all draws are rejected, and the law after that. If M is infinite, the probability is 0 and the law
        has no meaning.
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
        rejections: number of rejected drafts. A retry whose M drafts all fail counts once.
        target_calls: number of steps of the target, one per round.
    """

    rejections: float
    target_calls: float


def lookahead_rejections(
    pair: Pair, horizon: int, lookahead: int, *, drafts: int = 1, bonus: bool = True, tests_last: bool = False
) -> Rounds:
    """Computes expected rejections and target calls for rounds with a finite number of draft tokens, as in engines.

    Each round tests M drafts at its first position and one draft at each later position. Without the bonus token, and with a
    lookahead of at least the horizon, the rejections are those of Theorems 1 and 3.

    Args:
        lookahead: number of tokens that a round drafts.
        drafts: number of drafts M at the first position of a round.
        bonus: whether a round with only accepted drafts emits one more token from q, which is never tested.
        tests_last: whether the last token before the horizon is drafted too. The engine leaves it to the target, and drafts
            one token less than remain.

    Source: own recursion over (position, place in the round). The theorems assume a lookahead to the horizon and no bonus
    token.

    Raises:
        ValueError: lookahead, drafts or horizon are below 1.
    """
    check_drafts(drafts)
    if lookahead < 1:
        raise UserError(f"the lookahead K must be at least 1 token, got {lookahead}")
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
    """Rules for the place of a position in its round.

    Attributes:
        lookahead, bonus, tests_last: as in `lookahead_rejections`.
    """

    lookahead: int
    bonus: bool
    tests_last: bool

    def is_tested(self, accepted: int, left: int) -> bool:
        """Returns whether the next token is tested as a draft. If not, it is the bonus token.

        Args:
            accepted: number of tokens of the round that are accepted so far.
            left: number of tokens up to the horizon, the next token included.
        """
        return not self.bonus or (accepted < self.lookahead and (left > 1 or self.tests_last))

    def after(self, accepted: int, left: int) -> int:
        """Returns the number of accepted tokens of the round after the next token is accepted; 0 if a new round begins."""
        if not self.is_tested(accepted, left):
            return 0
        return 0 if not self.bonus and accepted + 1 == self.lookahead else accepted + 1


def speedup(horizon: int, rejections: float | int) -> float:
    """Computes the paper's speed-up, T / E[rejections]. It is at most T, since there is at least one call of the target."""
    return horizon / max(1.0, rejections)


Acceptance = Callable[[Rows, Rows], Rows]
"""Function of p and q (a row per last token) that returns the probability b(x) of accepting draft x."""


def least_acceptance(p: Float[np.ndarray, "*s v"], q: Float[np.ndarray, "*s v"]) -> Float[np.ndarray, "*s v"]:
    """Computes the acceptance function of speculative decoding, b = min(1, q / p)."""
    return np.minimum(1.0, np.divide(q, p, out=np.ones_like(q), where=p > 0))


class Checked(NamedTuple):
    """An acceptance function, compared with the bound of Theorem 2.

    Attributes:
        rejections: expected rejections, if prefixes have the target's distribution.
        bound: lower bound on the expected rejections of every unbiased algorithm.
        is_unbiased: whether b p <= q everywhere, so that some law after a rejection makes the algorithm unbiased.
    """

    rejections: float
    bound: float
    is_unbiased: bool


def check_acceptance(pair: Pair, horizon: int, acceptance: Acceptance) -> Checked:
    """Computes the expected rejections of an acceptance function, and the lower bound for unbiased algorithms.

    Source: Yin et al. (arXiv 2411.00841), Theorem 2: unbiased means b p <= q, hence acceptance of at most sum min(p, q).

    Raises:
        ValueError: b is outside 0 to 1.
    """
    output, rejections, unbiased = np.ones(1), 0.0, True
    for p, q in pair.steps(horizon):
        b = acceptance(p, q)
        if not ((b >= 0) & (b <= 1)).all():
            raise UserError("an acceptance function must lie between 0 and 1")
        rejections += float(output @ (1 - (b * p).sum(-1)))
        unbiased = unbiased and bool((b * p <= q * (1 + 1e-12)).all())
        output = output @ q
    return Checked(rejections, speculative_rejections(pair, horizon), unbiased)
