"""Quality against rejections: what accepting more than is lossless costs (Yin et al., arXiv 2411.00841, section 4).

One step accepts a draft x ~ p with probability b(x) and draws from some law P after a rejection. Its law is
``b p + Z P`` with ``Z = sum (1 - b) p``, the probability of a rejection; its loss is the total variation distance to q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from foredraft.theory.chains import Row


class Point(NamedTuple):
    """One rule on one pair of laws.

    Attributes:
        reject: probability of a rejection.
        loss: total variation distance between the step's law and q.
    """

    reject: float
    loss: float


def reject_prob(p: Row, b: Row) -> float:
    """Z = sum (1 - b) p."""
    return float(((1 - b) * p).sum())


def best_residual(p: Row, q: Row, b: Row) -> Row:
    """The law after a rejection that loses least: ``norm([q - b p]+)``; q where nothing is missing.

    All minimisers are the laws that are 0 where q < b p and at most (q - b p) / Z elsewhere; this is one of them.
    Source: Yin et al. (arXiv 2411.00841), Theorem 4.
    """
    missing = np.maximum(q - b * p, 0.0)
    return missing / missing.sum() if missing.sum() > 0 else q


def loss(p: Row, q: Row, b: Row, after: Row) -> float:
    """Total variation distance of the step's law ``b p + Z after`` to q."""
    return float(np.abs(q - b * p - reject_prob(p, b) * after).sum() / 2)


def least_loss(p: Row, q: Row, b: Row) -> float:
    """The loss with the best residual: (sum |q - b p| - sum (1 - b) p) / 2.

    Source: Yin et al. (arXiv 2411.00841), Theorem 4.
    """
    return max(0.0, float((np.abs(q - b * p).sum() - reject_prob(p, b)) / 2))


def over_acceptance(p: Row, q: Row, epsilon: float | int) -> Row:
    """b = min(1, (q + epsilon) / p), which accepts more than is lossless.

    Source: Yin et al. (arXiv 2411.00841), section 4.2 (form computed, see the tests).

    Raises:
        ValueError: epsilon is negative.
    """
    check_epsilon(epsilon)
    return np.minimum(1.0, np.divide(q + epsilon, p, out=np.ones_like(q), where=p > 0))


def check_epsilon(epsilon: float | int) -> None:
    """Checks the size of over-acceptance.

    Raises:
        ValueError: it is negative or not a number.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be 0 (lossless) or more, got {epsilon:g}")


def optimal(p: Row, q: Row, epsilon: float | int) -> Point:
    """Over-acceptance with the best residual ("Decoding-OPT"): on the Pareto front, reject + loss = TV(p, q).

    Source: Yin et al. (arXiv 2411.00841), Theorem 5.
    """
    b = over_acceptance(p, q, epsilon)
    return Point(reject_prob(p, b), least_loss(p, q, b))


def uno(p: Row, q: Row, epsilon: float | int) -> Point:
    """Over-acceptance with a redraw from q itself ("Decoding-UNO"): biased even at epsilon 0."""
    b = over_acceptance(p, q, epsilon)
    return Point(reject_prob(p, b), loss(p, q, b, q))


def front(p: Row, q: Row, count: int) -> list[Point]:
    """Points of the Pareto front, the line from (TV, 0) to (0, TV): what no rule of this family passes below.

    Source: Yin et al. (arXiv 2411.00841), Theorem 5.
    """
    distance = float(np.abs(p - q).sum() / 2)
    return [Point(distance * (1 - share), distance * share) for share in np.linspace(0, 1, count)]


def curve(p: Row, q: Row, epsilons: Sequence[float]) -> dict[str, list[Point]]:
    """The points of both rules at given sizes of over-acceptance."""
    return {"opt": [optimal(p, q, one) for one in epsilons], "uno": [uno(p, q, one) for one in epsilons]}
