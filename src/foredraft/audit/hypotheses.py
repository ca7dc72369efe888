"""Tests of emitted tokens against the target's law at their own prefixes.

Every statistic is a sum with one term per token. If the token has the target's law, the expectation of its term given the
prefix is 0. So each sum is a martingale. It is normal in the limit, with a variance that the laws determine.
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
"""Probability that an audit of a lossless run reports a deviation."""

POWER = 0.95
"""Probability of finding the detectable bias."""

NUM_TESTS = 4
"""Largest number of tests of one audit."""


class Tested(NamedTuple):
    """Result of one test.

    Attributes:
        name: name of the test.
        statistic: the z-score, or the Kolmogorov-Smirnov distance.
        p_value: two-sided p-value.
        threshold: p-value below which the test deviates, by Holm's procedure. 0 if the procedure stopped before this test.
    """

    name: str
    statistic: float
    p_value: float
    threshold: float

    @property
    def deviates(self) -> bool:
        """Whether the test rejects the target's law."""
        return self.p_value < self.threshold


@dataclass
class Terms:
    """Centred terms of one statistic, and their variances."""

    values: list[float] = field(default_factory=list)
    variances: list[float] = field(default_factory=list)

    def add(self, value: float, expected: float, variance: float) -> None:
        """Adds the term of one token: its value, and the expectation and variance of that value."""
        self.values.append(value - expected)
        self.variances.append(variance)

    @property
    def z(self) -> float:
        """The sum in standard deviations; 0 if nothing was random."""
        spread = sqrt(sum(self.variances))
        total = sum(self.values)
        return total / spread if spread > 0 else (0.0 if abs(total) < 1e-9 else inf)


@dataclass
class Evidence:
    """Statistics of the emitted tokens.

    Attributes:
        drift: whether the draft probability of the token exceeds its target probability. A rule that accepts too much or too
            little drifts in this direction.
        surprise: surprisal of the token minus entropy of the target's law.
        top: whether the token is the target's most likely one.
        levels: randomised probability-integral transforms over tokens ordered by the target's probability.
        impossible: number of tokens with target probability 0.
    """

    drift: Terms = field(default_factory=Terms)
    surprise: Terms = field(default_factory=Terms)
    top: Terms = field(default_factory=Terms)
    levels: list[float] = field(default_factory=list)
    impossible: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of emitted tokens."""
        return len(self.levels) + self.impossible

    def see(self, token: int, law: Float[np.ndarray, " v"], draft: Float[np.ndarray, " v"] | None, uniform: float) -> None:
        """Adds one emitted token.

        Args:
            token: the token.
            law: the target's law at its prefix.
            draft: the draft law there, with 1 for every candidate that was not sampled. None if nothing was drafted.
            uniform: a new random number in [0, 1).
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
        equal = float(law[law == law[token]].sum())  # tokens of equal probability share an interval
        self.levels.append(min(1.0, above + equal * uniform))

    def tests(self) -> list[Tested]:
        """Returns all tests, most significant first. Holm's thresholds limit their joint false-alarm rate to `FALSE_ALARM`."""
        results = [(name, terms.z, 2 * float(norm.sf(abs(terms.z)))) for name, terms in self._terms()]
        if self.levels:
            ks = kstest(self.levels, "uniform")
            results.append(("uniform levels (KS)", float(ks.statistic), float(ks.pvalue)))
        return holm(results)

    def _terms(self) -> list[tuple[str, Terms]]:
        names = ("drafted more than wanted (z)", "surprisal minus entropy (z)", "likeliest token (z)")
        return [pair for pair in zip(names, (self.drift, self.surprise, self.top), strict=True) if pair[1].values]

    @property
    def deviates(self) -> bool:
        """Whether any test rejects the target's law, or the law excludes an emitted token."""
        return self.impossible > 0 or any(test.deviates for test in self.tests())

    @property
    def detectable(self) -> float:
        """Smallest bias that the audit finds with probability `POWER`: a total variation distance towards the drafter."""
        if not self.drift.values:
            return inf
        z = float(norm.isf(FALSE_ALARM / NUM_TESTS / 2) + norm.isf(1 - POWER))
        return z * sqrt(sum(self.drift.variances)) / len(self.drift.values)

    @property
    def drift_measured(self) -> float:
        """Measured bias towards the drafter. Up to noise, a lower bound of the mean total variation distance."""
        return abs(sum(self.drift.values)) / len(self.drift.values) if self.drift.values else 0.0


def holm(found: Sequence[tuple[str, float, float]]) -> list[Tested]:
    """Sets the thresholds of several tests by Holm's step-down procedure.

    The k-th smallest p-value is compared with alpha / (n - k + 1). It stops at the first p-value that is not smaller.

    Args:
        found: (name, statistic, p-value) of each test.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    ordered, results, open_ = sorted(found, key=lambda test: test[2]), [], True
    for rank, (name, statistic, p_value) in enumerate(ordered):
        threshold = FALSE_ALARM / (len(ordered) - rank) if open_ else 0.0
        results.append(Tested(name, statistic, p_value, threshold))
        open_ = open_ and p_value < threshold
    return results
