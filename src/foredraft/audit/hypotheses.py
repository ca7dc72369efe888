"""Tests of emitted tokens against the target's law at their own prefixes.

Every statistic is a sum of terms whose expectation given the prefix is 0 if the token has the target's law, whatever came
before; so each sum is a martingale, normal in the limit with the variance that the laws themselves give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import kstest, norm

FALSE_ALARM = 1e-3
"""Probability that an audit of a lossless run finds a deviation."""

POWER = 0.95
NUM_TESTS = 4


class Tested(NamedTuple):
    """One test.

    Attributes:
        statistic: z, or the Kolmogorov-Smirnov distance.
        p_value: two-sided.
        threshold: the p-value that Holm's procedure asks of it.
    """

    name: str
    statistic: float
    p_value: float
    threshold: float

    @property
    def deviates(self) -> bool:
        """Whether the tokens do not have the law."""
        return self.p_value < self.threshold


@dataclass
class Terms:
    """Centred terms of one statistic, and their variances."""

    values: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)

    def add(self, value: float, expected: float, variance: float) -> None:
        """One token's."""
        self.values.append(value - expected)
        self.variances.append(variance)

    @property
    def z(self) -> float:
        """Standard deviations from 0; 0 where nothing was random."""
        spread = sqrt(sum(self.variances))
        total = sum(self.values)
        return total / spread if spread > 0 else (0.0 if abs(total) < 1e-9 else inf)


@dataclass
class Evidence:
    """What the emitted tokens say.

    Attributes:
        drift: whether the draft law gives the token more than the target's does: the direction in which a rule drifts that
            accepts too much or too little.
        surprise: surprisal minus entropy.
        top: whether it is the target's likeliest token.
        levels: randomised probability-integral transforms over tokens ordered by the target's probability.
        impossible: tokens that the target's law excludes.
    """

    drift: Terms = field(default_factory=Terms)
    surprise: Terms = field(default_factory=Terms)
    top: Terms = field(default_factory=Terms)
    levels: list[float] = field(default_factory=list)
    impossible: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return len(self.levels) + self.impossible

    def see(self, token: int, law: Float[np.ndarray, " v"], draft: Float[np.ndarray, " v"] | None, uniform: float) -> None:
        """Adds one emitted token.

        Args:
            law: the target's at its prefix.
            draft: that of the drafter there (1 at every candidate that was not sampled); None where nothing was drafted.
            uniform: a random number of its own, in [0, 1).
        """
        if not law[token] > 0:
            self.impossible += 1
            return
        if draft is not None:
            over = draft > law
            share = float(law[over].sum())
            self.drift.add(float(over[token]), share, share * (1 - share))
        support = law[law > 0]
        surprisal = -np.log(support)
        entropy = float((support * surprisal).sum())
        spread = max(0.0, float((support * surprisal**2).sum()) - entropy**2)
        self.surprise.add(float(-np.log(law[token])), entropy, spread)
        best = law == law.max()
        share = float(law[best].sum())
        self.top.add(float(best[token]), share, share * (1 - share))
        above = float(law[law > law[token]].sum())
        equal = float(law[law == law[token]].sum())  # tokens of equal probability share their stretch
        self.levels.append(min(1.0, above + equal * uniform))

    def tests(self) -> list[Tested]:
        """All tests, most significant first, with Holm's thresholds for a false-alarm rate of `FALSE_ALARM` together."""
        found = [(name, terms.z, 2 * float(norm.sf(abs(terms.z)))) for name, terms in self._terms()]
        if self.levels:
            ks = kstest(self.levels, "uniform")
            found.append(("uniform levels (KS)", float(ks.statistic), float(ks.pvalue)))
        return holm(found)

    def _terms(self) -> list[tuple[str, Terms]]:
        names = ("drafted more than wanted (z)", "surprisal minus entropy (z)", "likeliest token (z)")
        return [pair for pair in zip(names, (self.drift, self.surprise, self.top), strict=True) if pair[1].values]

    @property
    def deviates(self) -> bool:
        """Whether any test says that the tokens do not have the target's law."""
        return self.impossible > 0 or any(one.deviates for one in self.tests())

    @property
    def detectable(self) -> float:
        """The smallest bias (total variation, towards what the drafter prefers) that would have been found with `POWER`."""
        if not self.drift.values:
            return inf
        z = float(norm.isf(FALSE_ALARM / NUM_TESTS / 2) + norm.isf(1 - POWER))
        return z * sqrt(sum(self.drift.variances)) / len(self.drift.values)

    @property
    def drift_measured(self) -> float:
        """The bias in that direction as it was measured: a lower bound of the mean total variation distance, up to noise."""
        return abs(sum(self.drift.values)) / len(self.drift.values) if self.drift.values else 0.0


def holm(found: Sequence[tuple[str, float, float]]) -> list[Tested]:
    """Holm's step-down procedure: the k-th smallest p-value is held against alpha / (n - k + 1), until one is above.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    ordered, results, open_ = sorted(found, key=lambda one: one[2]), [], True
    for rank, (name, statistic, p_value) in enumerate(ordered):
        threshold = FALSE_ALARM / (len(ordered) - rank) if open_ else 0.0
        results.append(Tested(name, statistic, p_value, threshold))
        open_ = open_ and p_value < threshold
    return results
