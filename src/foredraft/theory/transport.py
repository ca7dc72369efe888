"""How much any lossless rule can accept at one node: the optimum over all couplings of k drafts and one token of q.

The chance that the emitted token is among the drafts is a flow from sets of drafts S to their tokens, limited by P(S) and by
q(x). Its maximum is the least cut: over sets H of tokens, ``1 + q(H) - P(S inside H)``.
"""

from __future__ import annotations

from itertools import combinations
from math import comb, perm
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import linprog

from foredraft.theory.chains import Row, residual, total_variation
from foredraft.theory.rejections import retry

MOST_SETS = 5000
"""Sets of drafts that the linear programme is solved with; above, a bound is given."""

_MOST_ORDERS = 1_000_000

_CUTS, _SPACING = 64, 0.05


class Bounds(NamedTuple):
    """The optimum lies between; equal where it is known exactly."""

    low: float
    high: float

    @property
    def gap(self) -> float:
        """What is not known."""
        return self.high - self.low


def check_count(k: int) -> None:
    """Checks a number of drafts.

    Raises:
        ValueError: it is below 1.
    """
    if k < 1:
        raise ValueError(f"the number of drafts must be at least 1, got {k}")


def with_replacement(p: Row, q: Row, k: int) -> float:
    """The optimum for k independent drafts, exactly, in O(V log V).

    The least of ``1 + q(H) - p(H)^k``: for a given p(H) the cut is least where H holds tokens of small q / p, so that only
    the beginnings of that order have to be looked at (a token of p = 0 never belongs to H).
    """
    check_count(k)
    draft, target = _by_ratio(p, q)
    return float(min(1.0, (1 + target - draft**k).min()))


def _by_ratio(p: Row, q: Row) -> tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]:
    """p(H) and q(H) of the beginnings H of the tokens by rising q / p, the empty one first."""
    order = np.argsort(np.divide(q, p, out=np.full_like(q, np.inf), where=p > 0), kind="stable")
    return np.concatenate([[0.0], p[order].cumsum()]), np.concatenate([[0.0], q[order].cumsum()])


def without_replacement(p: Row, q: Row, k: int) -> Bounds:
    """The optimum for k drafts without replacement: exact where there are few sets of drafts, else bounds.

    Above `MOST_SETS` the lower bound is the optimum with replacement, whose drafts are a beginning of those without; the upper
    bound is the least cut over 64 beginnings of the order by q / p, with P(S inside H) by numerical integration.
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
    """Probability that the first k draws without replacement all lie in a set of laws `p`, whose complement has mass `outside`.

    Each token has an exponential clock of rate p; the set wins if k of its clocks ring before the first one outside.
    """
    if outside <= 0:
        return 1.0
    grid = np.arange(-4.0, 4.0, _SPACING)  # tanh-sinh quadrature, which does not mind singular ends
    odds = np.exp(np.pi * np.sinh(grid))
    late = 1 / (1 + odds)  # probability that no clock outside has rung
    weights = _SPACING * np.pi * np.cosh(grid) * odds * late**2
    times = -np.log(late) / outside
    few = np.zeros((k, len(times)))  # probability that so many of the set's clocks have rung, fewer than k
    few[0] = 1.0
    for rate in p:
        rung = -np.expm1(-rate * times)
        few[1:] = few[1:] * (1 - rung) + few[:-1] * rung
        few[0] *= 1 - rung
    return float(weights @ (1 - few.sum(0)))


def set_probs(p: Row, k: int) -> dict[tuple[int, ...], float]:
    """Law of the set of the first k draws without replacement, by adding up the orders in which it can come."""
    found = {(): 1.0}
    for _ in range(k):
        grown: dict[tuple[int, ...], float] = {}
        for chosen, prob in found.items():
            left = 1 - p[list(chosen)].sum()
            for token in np.flatnonzero(p):
                if token not in chosen:
                    key = tuple(sorted((*chosen, int(token))))
                    grown[key] = grown.get(key, 0.0) + prob * p[token] / left
        found = grown
    return found


def iid_set_probs(p: Row, k: int) -> dict[tuple[int, ...], float]:
    """Law of the set of distinct tokens among k independent draws."""
    size = len(p)
    inside_of = {some: float(p[list(some)].sum()) ** k for n in range(k + 1) for some in combinations(range(size), n)}
    found: dict[tuple[int, ...], float] = {}
    for some in inside_of:
        parts = (sub for n in range(len(some) + 1) for sub in combinations(some, n))
        prob = sum((-1) ** (len(some) - len(sub)) * inside_of[sub] for sub in parts)
        if prob > 1e-15:
            found[some] = prob
    return found


def by_programme(sets: dict[tuple[int, ...], float], q: Row) -> float:
    """The optimum for a given law over sets of drafts, as a linear programme: the largest flow from sets to their tokens."""
    edges = [(i, token) for i, some in enumerate(sets) for token in some]
    limits = np.zeros((len(sets) + len(q), len(edges)))
    for column, (i, token) in enumerate(edges):
        limits[i, column] = limits[len(sets) + token, column] = 1.0
    capacity = np.concatenate([list(sets.values()), q])
    solved = linprog(-np.ones(len(edges)), A_ub=limits, b_ub=capacity, bounds=(0, None), method="highs")
    if not solved.success:
        raise ValueError(f"the linear programme was not solved: {solved.message}")
    return float(-solved.fun)


def deterministic(q: Row, k: int) -> float:
    """The optimum for k chosen candidates: the k largest target probabilities."""
    check_count(k)
    return float(np.sort(q)[::-1][:k].sum())


def reached(p: Row, q: Row, k: int) -> dict[str, float]:
    """What rules accept at one node with k drafts: the likeliest of p, and independent draws.

    Source: one minus the product of the distances (SpecInfer, section 4.3); SpecTr (arXiv 2310.15141), Theorem 2; EAGLE-2.
    """
    check_count(k)
    fail, _ = retry(p[None], q[None], k)
    import torch

    from foredraft.verify.kseq import discount

    rho = discount(torch.from_numpy(q), torch.from_numpy(p), k)
    likeliest = np.argsort(-p, kind="stable")[:k]
    return {
        "multiround-iid": 1 - float(fail[0]),
        "kseq": 1 - (1 - float(np.minimum(p, q / rho).sum())) ** k,
        "deterministic": float(q[likeliest].sum()),
    }


def multiround_without_replacement(p: Row, q: Row, k: int) -> float:
    """Acceptance of the multi-round rule for k drafts without replacement, by visiting every order of draws (small V).

    Raises:
        ValueError: there are too many orders.

    Source: Sequoia (arXiv 2402.12374), Algorithm 2; DySpec (arXiv 2410.11744), Algorithm 3.
    """
    check_count(k)
    if (orders := perm(len(p), k - 1)) > _MOST_ORDERS:
        raise ValueError(
            f"vocabulary too large to enumerate: {k} drafts among {len(p)} tokens come in {orders:,} orders, at most "
            f"{_MOST_ORDERS:,} are visited. Take fewer tokens or drafts"
        )
    accepted = float(np.minimum(p, q).sum())
    if k == 1:
        return accepted
    after = residual(p[None], q[None])[0]
    for token in np.flatnonzero(p > q):  # only these can be rejected
        left = p.copy()
        left[token] = 0.0
        if left.sum() > 0:
            accepted += float(p[token] - q[token]) * multiround_without_replacement(left / left.sum(), after, k - 1)
    return accepted


def distance(p: Row, q: Row) -> float:
    """TV(p, q)."""
    return float(total_variation(p[None], q[None])[0])
