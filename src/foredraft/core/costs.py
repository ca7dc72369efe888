"""What steps cost on this machine, and what drafting gains; measured once, stored, and passed to the engine as a value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

Point = tuple[float, ...]
"""A place of a curve, and the values there."""

_ROUNDED = 32
"""Rows of prompts beside the trees are rounded up to a multiple of this number."""


MARGIN = 1.15
"""A drafter is chosen only if it should beat plain decoding by this factor on one typical request. Gains vary by text."""

_CAUTION = 1.4
"""In a step, drafting must give this many times the tokens that plain decoding would give in the time that drafting adds. Costs
vary with the speed of a shared memory, and gains by text. Drafts that take no time always pay."""

_MOST_LOADS = 256
"""Number of loads that are kept, and of answers at these. A load has as many rows as it has requests."""


def pays(tokens_per_step: float, slowdown: float) -> bool:
    """Whether drafting pays for one typical request, with `MARGIN` and by the rule of the steps, see `_CAUTION`."""
    return tokens_per_step > MARGIN * slowdown and tokens_per_step - 1 > _CAUTION * (slowdown - 1)


class Load(NamedTuple):
    """What drafting costs at a load. Prompts are not counted, see `Costs.decoding_s`.

    Attributes:
        plain_s: seconds of a step without drafting.
        least: see `Costs.least`.
        seconds: of a step, by the number of requests that draft, from 1 on, and by the size of their trees.
    """

    plain_s: float
    least: float
    seconds: Float[np.ndarray, "k s"]


@dataclass(frozen=True)
class Costs:
    """Seconds of steps, and tokens per step, for one way of drafting.

    A step of B requests with c rows of prompts, in which k of the requests have trees of n nodes, takes
    ``forward(B + k n + c) + outside(B, 0) + outside(k, n) - outside(k, 0)`` seconds.

    Attributes:
        forward: number of rows, and the seconds of a forward.
        outside: number of nodes, and the seconds outside the forward (drafting, rule, bookkeeping): of one request, and what
            each further request adds.
        tokens: number of nodes, and the tokens per step that are expected of a typical request. The last entry is the largest
            tree.
        catch_up_s: seconds in which a drafter runs one token that was committed while it paused.
    """

    forward: tuple[Point, ...]
    outside: tuple[Point, ...]
    tokens: tuple[Point, ...]
    catch_up_s: float = 0.0
    _loads: dict[tuple[int, int], Load] = field(init=False, default_factory=dict, compare=False, repr=False)
    _answers: dict[Any, tuple[int, int]] = field(init=False, default_factory=dict, compare=False, repr=False)

    @staticmethod
    def read(found: Mapping[str, Any]) -> Costs:
        """Returns the costs that `written` stored."""
        curves = (tuple(tuple(point) for point in found[name]) for name in ("forward", "outside", "tokens"))
        return Costs(*curves, catch_up_s=found["catch_up_s"])

    def written(self) -> dict[str, Any]:
        """Returns the costs as data for JSON."""
        found = asdict(self)
        return {name: value for name, value in found.items() if not name.startswith("_")}

    def least_of(self, other: Costs) -> Costs:
        """Returns the least seconds of two measurements at the same places. Other work on the machine only adds to them."""

        def least(curve: tuple[Point, ...], again: tuple[Point, ...]) -> tuple[Point, ...]:
            return tuple(tuple(map(min, pair, copy)) for pair, copy in zip(curve, again, strict=True))

        forward, outside = least(self.forward, other.forward), least(self.outside, other.outside)
        return Costs(forward, outside, self.tokens, min(self.catch_up_s, other.catch_up_s))

    def slowdown(self, nodes: int) -> float:
        """Returns the seconds of a step of one request with a tree, divided by those of a step without."""
        return self.step_s(1, nodes) / max(self.step_s(1, 0), 1e-12)

    @property
    def most(self) -> int:
        """Number of nodes of the largest tree."""
        return int(self.tokens[-1][0])

    def gain(self, nodes: int) -> float:
        """Returns the expected number of accepted tokens per step of a typical request."""
        return interpolated(self.tokens, nodes)[0] - 1 if nodes else 0.0

    def step_s(self, requests: int, nodes: int, besides: int = 0, drafting: int | None = None) -> float:
        """Returns the seconds of a step.

        Args:
            requests: number of requests that decode.
            nodes: number of nodes of each tree.
            besides: rows of prompts in the same step, which are rounded up to a multiple of 32.
            drafting: number of requests that have a tree; None is all of them.
        """
        drafting = requests if drafting is None else drafting
        (first, further), (own, others) = interpolated(self.outside, 0), interpolated(self.outside, nodes)
        rows = interpolated(self.forward, requests + drafting * nodes + -(-besides // _ROUNDED) * _ROUNDED)[0]
        drafts = own - first + (others - further) * (drafting - 1) if nodes and drafting else 0.0
        return rows + first + further * (requests - 1) + drafts

    def decoding_s(self, requests: int, nodes: int, besides: int, drafting: int) -> float:
        """Returns the seconds of a step without its prompts, plus what drafting adds beside them.

        Prompts are computed in any case, now or in later steps. Counted in full, they would make every draft beside them seem
        cheap. The arguments are those of `step_s`.
        """
        added = self.step_s(requests, nodes, besides, drafting) - self.step_s(requests, 0, besides)
        return self.step_s(requests, 0) + added

    def best(
        self, shares: Sequence[float], requests: int, besides: int, *, behind: Sequence[bool] | None = None
    ) -> tuple[int, int]:
        """Returns how many requests draft in a step, and how many nodes each of them, so that it gives most tokens per second.

        The seconds are those of `decoding_s`. Both are 0 if no choice pays, see `_CAUTION`.

        Args:
            shares: of each request that may draft, its accepted tokens divided by those of a typical request. The first ones
                draft, so the largest come first.
            requests, besides: as in `step_s`.
            behind: whether the drafter of each of them must catch up first. That has to pay within as many tokens as it missed,
                so each token costs `catch_up_s` more.
        """
        late = () if behind is None or not any(behind) else tuple(behind)
        key = tuple(shares), requests, -(-besides // _ROUNDED) * _ROUNDED, late
        if key not in self._answers:  # shares stay as they are while nobody drafts
            if len(self._answers) >= _MOST_LOADS:
                self._answers.clear()
            self._answers[key] = self._best(*key)
        return self._answers[key]

    def _best(self, shares: Sequence[float], requests: int, besides: int, behind: Sequence[bool]) -> tuple[int, int]:
        load, gains = self._load(requests, besides), self._gains
        drafted, seconds = np.add.accumulate(shares)[:, None] * gains, load.seconds[: len(shares)]
        if behind:
            late = np.array(behind, dtype=float)
            missed = np.add.accumulate(late)[:, None] + np.add.accumulate(late * shares)[:, None] * gains
            seconds = seconds + self.catch_up_s * missed
        speeds = (requests + drafted) / seconds
        speeds[drafted * load.plain_s <= _CAUTION * requests * (seconds - load.plain_s)] = 0
        count, size = divmod(int(speeds.argmax()), speeds.shape[1])
        return (count + 1, int(self.tokens[size][0])) if speeds[count, size] > 0 else (0, 0)

    def for_all(self, requests: int) -> int:
        """Returns the number of nodes at which trees for all of some typical requests pay most; 0 if they do not pay."""
        load, gains = self._load(requests, 0), self._gains
        seconds = load.seconds[-1]
        pays = gains * load.plain_s > _CAUTION * (seconds - load.plain_s)
        return int(self.tokens[((1 + gains) / seconds * pays).argmax()][0]) if pays.any() else 0

    def least(self, requests: int, besides: int) -> float:
        """Returns the least share with which drafting pays at a load, if all requests that draft have it.

        Drafting pays for typical requests if this is at most 1.
        """
        return self._load(requests, besides).least

    def _load(self, requests: int, besides: int) -> Load:
        """Returns what holds at a load. It is kept, as every step asks for it."""
        key = requests, -(-besides // _ROUNDED) * _ROUNDED
        if key not in self._loads:
            if len(self._loads) >= _MOST_LOADS:
                self._loads.clear()
            plain_s = max(self.step_s(requests, 0), 1e-12)
            seconds = plain_s + self._seconds(*key) - self.step_s(requests, 0, besides)
            gains = np.arange(1, requests + 1)[:, None] * self._gains
            least = (_CAUTION * requests * (seconds / plain_s - 1) / gains).min()
            self._loads[key] = Load(plain_s, max(0.0, float(least)), np.maximum(seconds, 1e-12))
        return self._loads[key]

    @cached_property
    def _gains(self) -> Float[np.ndarray, " s"]:
        """The accepted tokens expected of each size of tree. A tree that gains nothing never pays."""
        return np.maximum([self.gain(int(size)) for size, *_ in self.tokens], 1e-9)

    @cached_property
    def _forward(self) -> tuple[list[float], list[float]]:
        """The curve of forwards for `numpy.interp`, which is constant behind its last point."""
        far = 1e9
        return [*(rows for rows, _ in self.forward), far], [*(s for _, s in self.forward), interpolated(self.forward, far)[0]]

    def _seconds(self, requests: int, besides: int) -> Float[np.ndarray, "k s"]:
        """Returns the seconds of steps in which 1 to all of the requests have trees of each size."""
        sizes = [int(size) for size, *_ in self.tokens]
        first, further = interpolated(self.outside, 0)
        drafts = np.array([interpolated(self.outside, nodes) for nodes in sizes]) - (first, further)
        drafting = np.arange(1, requests + 1)[:, None]
        rows = np.interp(requests + besides + drafting * np.array(sizes), *self._forward)
        return rows + first + further * (requests - 1) + drafts[:, 0] + drafts[:, 1] * (drafting - 1)


def interpolated(curve: Sequence[Point], at: float | int) -> Point:
    """Returns the values of a curve at a place: linear between its points and behind the last, constant before the first."""
    places = [point[0] for point in curve]
    right = min(max(bisect_left(places, at), 1), len(curve) - 1)
    if len(curve) == 1 or at <= places[0]:
        return curve[0][1:]
    (x0, *low), (x1, *high) = curve[right - 1], curve[right]
    part = (at - x0) / (x1 - x0)
    return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))
