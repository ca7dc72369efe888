"""The trade-off between rejections and loss, if more drafts are accepted than lossless decoding allows.

A step accepts a draft x ~ p with probability b(x), and draws from a law P after a rejection. The step's law is ``b p + Z P``,
where ``Z = sum (1 - b) p`` is the probability of a rejection. The loss is the total variation distance of the step's law to q.

Source: Yin et al. (arXiv 2411.00841), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from foredraft.core.errors import UserError
from foredraft.theory.chains import Row


class Point(NamedTuple):
    """Rejections and loss of one rule on one pair of laws.

    Attributes:
        reject: probability of a rejection.
        loss: total variation distance between the step's law and q.
    """

    reject: float
    loss: float


def reject_prob(p: Row, b: Row) -> float:
    """Computes the probability of a rejection, Z = sum (1 - b) p."""
    return float(((1 - b) * p).sum())


def best_residual(p: Row, q: Row, b: Row) -> Row:
    """Computes a law after a rejection that minimises the loss: ``norm([q - b p]+)``; q where q - b p is nowhere positive.

    A law minimises the loss if and only if it is 0 where q < b p and at most (q - b p) / Z elsewhere.

    Source: Yin et al. (arXiv 2411.00841), Theorem 4.
    """
    missing = np.maximum(q - b * p, 0.0)
    return missing / missing.sum() if missing.sum() > 0 else q


def loss(p: Row, q: Row, b: Row, after: Row) -> float:
    """Computes the total variation distance of the step's law ``b p + Z after`` to q."""
    return float(np.abs(q - b * p - reject_prob(p, b) * after).sum() / 2)


def least_loss(p: Row, q: Row, b: Row) -> float:
    """Computes the loss with the best residual: (sum |q - b p| - sum (1 - b) p) / 2.

    Source: Yin et al. (arXiv 2411.00841), Theorem 4.
    """
    return max(0.0, float((np.abs(q - b * p).sum() - reject_prob(p, b)) / 2))


def over_acceptance(p: Row, q: Row, epsilon: float | int) -> Row:
    """Computes b = min(1, (q + epsilon) / p), which accepts more than lossless decoding if epsilon is above 0.

    Source: Yin et al. (arXiv 2411.00841), section 4.2 (form computed, see the tests).

    Raises:
        ValueError: epsilon is negative.
    """
    check_epsilon(epsilon)
    return np.minimum(1.0, np.divide(q + epsilon, p, out=np.ones_like(q), where=p > 0))


def check_epsilon(epsilon: float | int) -> None:
    """Checks the size epsilon of over-acceptance.

    Raises:
        ValueError: epsilon is negative or NaN.
    """
    if not epsilon >= 0:
        raise UserError(f"epsilon must be 0 (lossless) or more, got {epsilon:g}")


def optimal(p: Row, q: Row, epsilon: float | int) -> Point:
    """Computes over-acceptance with the best residual ("Decoding-OPT"), on the Pareto front: reject + loss = TV(p, q).

    Source: Yin et al. (arXiv 2411.00841), Theorem 5.
    """
    b = over_acceptance(p, q, epsilon)
    return Point(reject_prob(p, b), least_loss(p, q, b))


def uno(p: Row, q: Row, epsilon: float | int) -> Point:
    """Computes over-acceptance with a redraw from q ("Decoding-UNO"), which is biased even at epsilon 0."""
    b = over_acceptance(p, q, epsilon)
    return Point(reject_prob(p, b), loss(p, q, b, q))


def front(p: Row, q: Row, count: int) -> list[Point]:
    """Returns points of the Pareto front, the line from (TV, 0) to (0, TV). No rule of this family is below it.

    Source: Yin et al. (arXiv 2411.00841), Theorem 5.
    """
    distance = float(np.abs(p - q).sum() / 2)
    return [Point(distance * (1 - share), distance * share) for share in np.linspace(0, 1, count)]


def curve(p: Row, q: Row, epsilons: Sequence[float]) -> dict[str, list[Point]]:
    """Computes the points of both rules for the given sizes of over-acceptance."""
    return {"opt": [optimal(p, q, epsilon) for epsilon in epsilons], "uno": [uno(p, q, epsilon) for epsilon in epsilons]}
