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
"""Drafting must beat plain decoding by this factor. Gains vary by text, and costs by the speed of a shared memory."""


class Sizes(NamedTuple):
    """For each size of tree: its nodes, the accepted tokens expected of it, and the seconds of drafting.

    The first request that drafts takes `first_s`, and each further one `further_s`.
    """

    nodes: Float[np.ndarray, " s"]
    gains: Float[np.ndarray, " s"]
    first_s: Float[np.ndarray, " s"]
    further_s: Float[np.ndarray, " s"]


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
    _least: dict[tuple[int, int], float] = field(init=False, default_factory=dict, compare=False, repr=False)

    @staticmethod
    def read(found: Mapping[str, Any]) -> Costs:
        """Returns the costs that `written` stored."""
        curves = (tuple(tuple(point) for point in found[name]) for name in ("forward", "outside", "tokens"))
        return Costs(*curves, catch_up_s=found["catch_up_s"])

    def written(self) -> dict[str, Any]:
        """Returns the costs as data for JSON."""
        found = asdict(self)
        return {name: value for name, value in found.items() if not name.startswith("_")}

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
        rows = interpolated(self.forward, requests + drafting * nodes + _rounded(besides))[0]
        drafts = own - first + (others - further) * (drafting - 1) if nodes and drafting else 0.0
        return rows + first + further * (requests - 1) + drafts

    def best(
        self, shares: Sequence[float], requests: int, besides: int, *, behind: Sequence[bool] | None = None
    ) -> tuple[int, int]:
        """Returns how many requests draft in a step, and how many nodes each of them, so that it gives most tokens per second.

        Both are 0 if no choice beats plain decoding by `MARGIN`.

        Args:
            shares: of each request that may draft, its accepted tokens divided by those of a typical request. The first ones
                draft, so the largest come first.
            requests, besides: as in `step_s`.
            behind: whether the drafter of each of them must catch up first. That has to pay within as many tokens as it missed,
                so each token costs `catch_up_s` more.
        """
        drafted = np.cumsum(shares)[:, None] * self._sizes.gains
        seconds = self._seconds(len(shares), requests, besides)
        if behind is not None and any(behind):
            late = np.array(behind, dtype=float)
            seconds = seconds + self.catch_up_s * (
                np.cumsum(late)[:, None] + np.cumsum(late * shares)[:, None] * self._sizes.gains
            )
        speeds = (requests + drafted) / seconds
        count, size = divmod(int(speeds.argmax()), speeds.shape[1])
        if speeds[count, size] * self.step_s(requests, 0, besides) < MARGIN * requests:
            return 0, 0
        return count + 1, int(self._sizes.nodes[size])

    def for_all(self, requests: int) -> int:
        """Returns the number of nodes at which trees for all of some typical requests pay most; 0 if they do not pay."""
        speeds = (1 + self._sizes.gains) * requests / self._seconds(requests, requests, 0)[-1]
        pays = speeds.max() * self.step_s(requests, 0) >= MARGIN * requests
        return int(self._sizes.nodes[speeds.argmax()]) if pays else 0

    def least(self, requests: int, besides: int) -> float:
        """Returns the least share with which drafting pays at a load, if all requests that draft have it.

        Drafting pays for typical requests if this is at most 1. It is kept, as every step asks for it.
        """
        load = requests, _rounded(besides)
        if load not in self._least:
            factor = MARGIN * requests / self.step_s(requests, 0, besides)
            needed = factor * self._seconds(requests, requests, besides) - requests
            self._least[load] = float((needed / (np.arange(1, requests + 1)[:, None] * self._sizes.gains)).min())
        return self._least[load]

    @cached_property
    def _sizes(self) -> Sizes:
        sizes = [int(size) for size, *_ in self.tokens]
        first, further = interpolated(self.outside, 0)
        drafts = np.array([interpolated(self.outside, size) for size in sizes]) - (first, further)
        gains = np.maximum([self.gain(size) for size in sizes], 1e-9)  # a tree that gains nothing never pays
        return Sizes(np.array(sizes, dtype=float), gains, drafts[:, 0], drafts[:, 1])

    @cached_property
    def _forward(self) -> tuple[list[float], list[float]]:
        """The curve of forwards for `numpy.interp`, which is constant behind its last point."""
        far = 1e9
        return [*(rows for rows, _ in self.forward), far], [*(s for _, s in self.forward), interpolated(self.forward, far)[0]]

    def _seconds(self, most: int, requests: int, besides: int) -> Float[np.ndarray, "k s"]:
        """Returns the seconds of steps in which 1 to `most` of the requests have trees of each size."""
        drafting = np.arange(1, most + 1)[:, None]
        rows = np.interp(requests + _rounded(besides) + drafting * self._sizes.nodes, *self._forward)
        first, further = interpolated(self.outside, 0)
        return rows + first + further * (requests - 1) + self._sizes.first_s + self._sizes.further_s * (drafting - 1)


def _rounded(besides: int) -> int:
    return -(-besides // _ROUNDED) * _ROUNDED


def interpolated(curve: Sequence[Point], at: float | int) -> Point:
    """Returns the values of a curve at a place: linear between its points and behind the last, constant before the first."""
    places = [point[0] for point in curve]
    right = min(max(bisect_left(places, at), 1), len(curve) - 1)
    if len(curve) == 1 or at <= places[0]:
        return curve[0][1:]
    (x0, *low), (x1, *high) = curve[right - 1], curve[right]
    part = (at - x0) / (x1 - x0)
    return tuple(a + part * (b - a) for a, b in zip(low, high, strict=True))
