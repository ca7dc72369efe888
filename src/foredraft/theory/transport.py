"""The optimal acceptance at one node: the most that any lossless rule can accept with k drafts.

It is the optimum over all couplings of k drafts and one token of q. The probability that the emitted token is among the drafts
is a flow from sets of drafts S to their tokens, limited by P(S) and by q(x). The maximum flow is the minimum cut, the minimum
of ``1 + q(H) - P(S inside H)`` over sets H of tokens.
"""

from __future__ import annotations

from math import comb, perm
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog

from foredraft.core.errors import UserError
from foredraft.theory.chains import Row, residual
from foredraft.theory.rejections import retry

MOST_SETS = 5000
"""Largest number of sets of drafts for which the linear programme is solved. For more sets, bounds are given."""

_MOST_ORDERS = 1_000_000

_CUTS, _SPACING = 64, 0.05


class Bounds(NamedTuple):
    """Lower and upper bound of the optimum. They are equal if the optimum is known exactly."""

    low: float
    high: float


def check_count(k: int) -> None:
    """Checks a number of drafts.

    Raises:
        ValueError: the number is below 1.
    """
    if k < 1:
        raise UserError(f"the number of drafts must be at least 1, got {k}")


def with_replacement(p: Row, q: Row, k: int) -> float:
    """Computes the optimum for k independent drafts exactly, in O(V log V).

    It is the minimum of ``1 + q(H) - p(H)^k``. For a given p(H) the cut is smallest if H holds the tokens of smallest q / p.
    Only the prefixes of this order are therefore compared. A token with p = 0 never belongs to H.
    """
    check_count(k)
    draft, target = _by_ratio(p, q)
    return float(min(1.0, (1 + target - draft**k).min()))


def _by_ratio(p: Row, q: Row) -> tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]:
    """Computes p(H) and q(H) of all prefixes H of the tokens in the order of rising q / p, starting with the empty prefix."""
    order = np.argsort(np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0), kind="stable")
    return np.concatenate([[0.0], p[order].cumsum()]), np.concatenate([[0.0], q[order].cumsum()])


def without_replacement(p: Row, q: Row, k: int) -> Bounds:
    """Computes the optimum for k drafts without replacement, exactly up to `MOST_SETS` sets of drafts, else as bounds.

    The lower bound is the optimum with replacement, whose distinct drafts are a prefix of the drafts without replacement. The
    upper bound is the smallest cut over 64 prefixes of the order by q / p, with P(S inside H) by numerical integration.
    """
    check_count(k)
    k = min(k, int((p > 0).sum()))
    if comb(len(p), k) <= MOST_SETS:
        exact = by_programme(set_probs(p, k), q)
        return Bounds(exact, exact)
    draft, target = _by_ratio(p, q)
    order = np.argsort(np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0), kind="stable")
    sizes = np.unique(np.linspace(k, int((p > 0).sum()), _CUTS).astype(int))
    cuts = [1 + target[size] - inside(p[order[:size]], float(1 - draft[size]), k) for size in sizes]
    return Bounds(with_replacement(p, q, k), float(min(1.0, *cuts)))


def inside(p: Row, outside: float | int, k: int) -> float:
    """Computes the probability that the first k draws without replacement are all in a set of tokens.

    Each token has an exponential clock of rate p. The draws are all in the set if k clocks of the set ring before the first
    clock outside.

    Args:
        p: probabilities of the tokens in the set.
        outside: probability of all tokens outside the set.
    """
    if outside <= 0:
        return 1.0
    grid = np.arange(-4.0, 4.0, _SPACING)  # tanh-sinh quadrature, which tolerates singularities at the ends
    odds = np.exp(np.pi * np.sinh(grid))
    late = 1 / (1 + odds)  # probability that no clock outside has rung
    weights = _SPACING * np.pi * np.cosh(grid) * odds * late**2
    times = -np.log(late) / outside
    counts = np.zeros((k, len(times)))  # row n: probability that exactly n clocks of the set have rung, for n < k
    counts[0] = 1.0
    for rate in p:
        rung = -np.expm1(-rate * times)
        counts[1:] = counts[1:] * (1 - rung) + counts[:-1] * rung
        counts[0] *= 1 - rung
    return float(weights @ (1 - counts.sum(0)))


def set_probs(p: Row, k: int) -> dict[tuple[int, ...], float]:
    """Computes the distribution of the set of the first k draws without replacement, by summing over all orders."""
    probs = {(): 1.0}
    for _ in range(k):
        grown: dict[tuple[int, ...], float] = {}
        for chosen, prob in probs.items():
            left = 1 - p[list(chosen)].sum()
            for token in np.flatnonzero(p):
                if token not in chosen:
                    key = tuple(sorted((*chosen, int(token))))
                    grown[key] = grown.get(key, 0.0) + prob * p[token] / left
        probs = grown
    return probs


def by_programme(sets: dict[tuple[int, ...], float], q: Row) -> float:
    """Computes the optimum for a given distribution over sets of drafts, as a linear programme.

    The optimum is the maximum flow from the sets to their tokens.

    Raises:
        ValueError: the linear programme was not solved.
    """
    edges = [(i, token) for i, tokens in enumerate(sets) for token in tokens]
    limits = np.zeros((len(sets) + len(q), len(edges)))
    for column, (i, token) in enumerate(edges):
        limits[i, column] = limits[len(sets) + token, column] = 1.0
    capacity = np.concatenate([list(sets.values()), q])
    solved = linprog(-np.ones(len(edges)), A_ub=limits, b_ub=capacity, bounds=(0, None), method="highs")
    if not solved.success:
        raise ValueError(f"the linear programme was not solved: {solved.message}")
    return float(-solved.fun)


def reached(p: Row, q: Row, k: int) -> dict[str, float]:
    """Computes the acceptance of three rules at one node with k drafts.

    ``multiround-iid`` and ``kseq`` test k independent draws from p. ``deterministic`` tests the k most likely tokens of p.

    Source: one minus the product of the distances (SpecInfer, section 4.3); SpecTr (arXiv 2310.15141), Theorem 2; EAGLE-2.
    """
    check_count(k)
    fail, _ = retry(p[None], q[None], k)
    import torch

    from foredraft.rules.kseq import discount

    rho = discount(torch.from_numpy(q), torch.from_numpy(p), k)
    likeliest = np.argsort(-p, kind="stable")[:k]
    return {
        "multiround-iid": 1 - float(fail[0]),
        "kseq": 1 - (1 - float(np.minimum(p, q / rho).sum())) ** k,
        "deterministic": float(q[likeliest].sum()),
    }


def multiround_without_replacement(p: Row, q: Row, k: int) -> float:
    """Computes the acceptance of the multi-round rule for k drafts without replacement, by enumerating all orders (small V).

    Raises:
        ValueError: there are too many orders.

    Source: Sequoia (arXiv 2402.12374), Algorithm 2; DySpec (arXiv 2410.11744), Algorithm 3.
    """
    check_count(k)
    if (orders := perm(len(p), k - 1)) > _MOST_ORDERS:
        raise UserError(
            f"vocabulary too large to enumerate: {k} drafts among {len(p)} tokens come in {orders:,} orders, and the limit is "
            f"{_MOST_ORDERS:,}",
            "Take fewer tokens or drafts",
        )
    accepted = float(np.minimum(p, q).sum())
    if k == 1:
        return accepted
    after = residual(p[None], q[None])[0]
    for token in np.flatnonzero(p > q):  # other tokens are never rejected
        left = p.copy()
        left[token] = 0.0
        if left.sum() > 0:
            accepted += float(p[token] - q[token]) * multiround_without_replacement(left / left.sum(), after, k - 1)
    return accepted
