"""Measured acceptance of a tested child by sibling rank and draft probability. It is used to value draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from foredraft.core.errors import UserError

PROB_EDGES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower ends of the bins of draft probability."""

RANK_EDGES = (0, 1, 2, 3, 5, 9, 17)
"""First sibling rank of each group. The ranks of a group share a row of the table."""

_PRIOR = 20
"""Strength of the prior, in trials, that pulls the share of a bin towards the share of its row."""


class Trial(NamedTuple):
    """One test of a child.

    Attributes:
        rank: sibling rank of the child.
        prob: probability of the child under the draft law without its earlier siblings.
        accepted: outcome of the test.
    """

    rank: int
    prob: float
    accepted: bool


class Worth(NamedTuple):
    """Values of siblings in draw order, relative to the value of their parent.

    Attributes:
        promises: value of making each draw, before its token is known.
        values: value of each child, after its token is known.
    """

    promises: Float[np.ndarray, " k"]
    values: Float[np.ndarray, " k"]


@dataclass(frozen=True)
class AcceptanceTable:
    """Measured probability that a tested child is accepted.

    Attributes:
        share: acceptance by group of ranks and bin of draft probability.
        mean: acceptance by group of ranks.

    Raises:
        ValueError: a number is not a probability, or an array has a wrong shape.
    """

    share: Float[np.ndarray, "g b"]
    mean: Float[np.ndarray, " g"]

    def __post_init__(self) -> None:
        fits = self.share.shape == (len(RANK_EDGES), len(PROB_EDGES)) and self.mean.shape == (len(RANK_EDGES),)
        if not fits or not all(((table >= 0) & (table <= 1)).all() for table in (self.share, self.mean)):
            raise UserError(
                f"acceptance_by_prob must hold, for each kind of request, 'share' ({len(RANK_EDGES)} rows of "
                f"{len(PROB_EDGES)} probabilities) and 'mean' ({len(RANK_EDGES)})",
                "measure it with `foredraft calibrate`",
            )

    @classmethod
    def measured(cls, trials: Sequence[Trial]) -> AcceptanceTable:
        """Makes the table from trials."""
        ranks, probs, accepted = (np.array([trial[i] for trial in trials], float) for i in range(3))
        place = _groups(ranks), _bins(probs)
        shape = len(RANK_EDGES), len(PROB_EDGES)
        tested, passed = np.zeros(shape), np.zeros(shape)
        np.add.at(tested, place, 1)
        np.add.at(passed, place, accepted)
        mean = passed.sum(1) / np.maximum(tested.sum(1), 1)
        return cls((passed + _PRIOR * mean[:, None]) / (tested + _PRIOR), mean)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> AcceptanceTable:
        """Reads the table from a JSON object, see `written`."""
        given = given if isinstance(given, Mapping) else {}
        try:
            found = [np.asarray(given.get(name, ()), float) for name in ("share", "mean")]
        except (TypeError, ValueError):  # texts, or rows of unequal length
            found = [np.empty(0)] * 2
        return cls(*found)

    def written(self) -> dict[str, Any]:
        """Returns the table as a JSON object."""
        return {"share": self.share.round(4).tolist(), "mean": self.mean.round(4).tolist()}

    def worth(self, probs: Float[np.ndarray, " k"], sampled: bool) -> Worth:
        """Returns the values of siblings by their measured acceptance.

        Let a_i be the acceptance of child i and m_i the mean acceptance of its rank. The value of child i is
        a_i prod_{j<i} (1 - a_j). The value of a draw whose token is unknown is m_i / m_0 prod_{j<i} (1 - a_j).

        Args:
            probs: draft probabilities of the siblings, in draw order.
            sampled: whether the siblings are sampled. If not, their tokens are known beforehand, so `promises` are `values`.
        """
        group = _groups(np.arange(len(probs)))
        share = self.share[group, _bins(conditional(probs))]
        reached = np.append(1.0, (1 - share).cumprod())[:-1]
        values = reached * share
        mean = self.mean[group]
        return Worth(reached * mean / max(self.mean[0], 1e-9) if sampled else values, values)


def as_drafted(probs: Float[np.ndarray, " k"], sampled: bool) -> Worth:
    """Returns the values of DySpec: 1 - (draft mass of the earlier siblings) for a draw, the draft probability for a child.

    If nothing is sampled, the value of a draw is also the draft probability.
    """
    return Worth(_left_before(probs) if sampled else probs, probs)


def conditional(probs: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Returns the probability of each child under the draft law without its earlier siblings."""
    return np.minimum(1.0, probs / np.maximum(_left_before(probs), 1e-9))


def _left_before(probs: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Returns 1 - (draft mass of the earlier siblings) for each sibling."""
    left = np.ones(len(probs))
    left[1:] -= probs.cumsum()[:-1]
    return np.maximum(left, 0.0, out=left)


def _groups(ranks: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.searchsorted(RANK_EDGES, ranks, side="right") - 1


def _bins(probs: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.searchsorted(PROB_EDGES, probs, side="right") - 1
