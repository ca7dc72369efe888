"""How often a tested child is accepted, by sibling rank and draft probability: measured, and used to value draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

PROB_EDGES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower ends of the bins of draft probability."""

RANK_EDGES = (0, 1, 2, 3, 5, 9, 17)
"""First ranks of the groups of siblings that share a row."""

_PRIOR = 20
"""A bin's share is drawn to the share of its row as if by so many trials."""


class Trial(NamedTuple):
    """One test of a child: its sibling rank, its probability in the draft law without its earlier siblings, the outcome."""

    rank: int
    prob: float
    accepted: bool


class Worth(NamedTuple):
    """Of siblings in draw order, relative to their parent: what making each draw promises before its token is known, and what
    the child is worth once it is."""

    promises: Float[np.ndarray, " k"]
    values: Float[np.ndarray, " k"]


@dataclass(frozen=True)
class AcceptanceTable:
    """Measured acceptance of a tested child.

    Attributes:
        share: by group of ranks and bin of probability.
        mean: by group of ranks.

    Raises:
        ValueError: the numbers are no probabilities, or there are too few of them.
    """

    share: Float[np.ndarray, "g b"]
    mean: Float[np.ndarray, " g"]

    def __post_init__(self) -> None:
        fits = self.share.shape == (len(RANK_EDGES), len(PROB_EDGES)) and self.mean.shape == (len(RANK_EDGES),)
        if not fits or not all(((one >= 0) & (one <= 1)).all() for one in (self.share, self.mean)):
            raise ValueError(
                f"acceptance_by_prob must hold, for each kind of request, 'share' ({len(RANK_EDGES)} rows of {len(PROB_EDGES)} "
                f"probabilities) and 'mean' ({len(RANK_EDGES)}); measure it with `foredraft calibrate`"
            )

    @classmethod
    def measured(cls, trials: Sequence[Trial]) -> AcceptanceTable:
        """From trials."""
        ranks, probs, accepted = (np.array([one[i] for one in trials], float) for i in range(3))
        place = _groups(ranks), _bins(probs)
        shape = len(RANK_EDGES), len(PROB_EDGES)
        tested, passed = np.zeros(shape), np.zeros(shape)
        np.add.at(tested, place, 1)
        np.add.at(passed, place, accepted)
        mean = passed.sum(1) / np.maximum(tested.sum(1), 1)
        return cls((passed + _PRIOR * mean[:, None]) / (tested + _PRIOR), mean)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> AcceptanceTable:
        """From JSON, see `written`."""
        given = given if isinstance(given, Mapping) else {}
        try:
            found = [np.asarray(given.get(name, ()), float) for name in ("share", "mean")]
        except (TypeError, ValueError):  # texts, or rows of unequal length
            found = [np.empty(0)] * 2
        return cls(*found)

    def written(self) -> dict[str, Any]:
        """As JSON."""
        return {"share": self.share.round(4).tolist(), "mean": self.mean.round(4).tolist()}

    def worth(self, probs: Float[np.ndarray, " k"], sampled: bool) -> Worth:
        """With a_i the acceptance of a child and m_i the mean of its rank: a child is worth a_i prod_{j<i} (1 - a_j), a draw
        whose token is not known m_i / m_0 prod_{j<i} (1 - a_j)."""
        group = _groups(np.arange(len(probs)))
        share = self.share[group, _bins(conditional(probs))]
        reached = np.append(1.0, (1 - share).cumprod())[:-1]
        values = reached * share
        mean = self.mean[group]
        return Worth(reached * mean / max(self.mean[0], 1e-9) if sampled else values, values)


def as_drafted(probs: Float[np.ndarray, " k"], sampled: bool) -> Worth:
    """DySpec's own: the i-th draw promises 1 - (draft mass of its earlier siblings), a child is worth its probability."""
    return Worth(_left_before(probs) if sampled else probs, probs)


def conditional(probs: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Probability of each child in the law without its earlier siblings."""
    return np.minimum(1.0, probs / np.maximum(_left_before(probs), 1e-9))


def _left_before(probs: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """1 - (draft mass of the earlier siblings)."""
    left = np.ones(len(probs))
    left[1:] -= probs.cumsum()[:-1]
    return np.maximum(left, 0.0, out=left)


def _groups(ranks: Float[np.ndarray, " n"] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.searchsorted(RANK_EDGES, ranks, side="right") - 1


def _bins(probs: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.searchsorted(PROB_EDGES, probs, side="right") - 1
