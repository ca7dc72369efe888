"""What steps cost on this machine, and what drafting gains; measured once, stored, and passed to the engine as a value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

Point = tuple[float, ...]
"""A place of a curve, and the values there."""

_ROUNDED = 32
"""Rows of prompts beside the trees are rounded up to a multiple of this number."""


class Size(NamedTuple):
    """A tree of some nodes: the expected number of accepted tokens, and the time of its step relative to a plain one."""

    nodes: int
    gain: float
    cost: float


@dataclass(frozen=True)
class Costs:
    """Seconds of steps, and tokens per step, for one way of drafting.

    A step of B requests with trees of n nodes and c rows of prompts takes ``forward(B (1 + n) + c) + outside(B, n)`` seconds.

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
    _seconds: dict[tuple[int, int, int], float] = field(init=False, default_factory=dict, compare=False, repr=False)
    _sizes: dict[tuple[int, int], list[Size]] = field(init=False, default_factory=dict, compare=False, repr=False)
    _pays: dict[tuple[int, int], bool] = field(init=False, default_factory=dict, compare=False, repr=False)

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

    def step_s(self, requests: int, nodes: int, besides: int = 0) -> float:
        """Returns the seconds of a step.

        Args:
            requests: number of requests that decode.
            nodes: number of nodes of each tree.
            besides: rows of prompts in the same step, which are rounded up to a multiple of 32.
        """
        key = requests, nodes, _rounded(besides)
        if key not in self._seconds:
            first, further = interpolated(self.outside, nodes)
            rows = interpolated(self.forward, requests * (1 + nodes) + key[2])[0]
            self._seconds[key] = rows + first + further * (requests - 1)
        return self._seconds[key]

    def gain(self, nodes: int) -> float:
        """Returns the expected number of accepted tokens per step of a typical request."""
        return interpolated(self.tokens, nodes)[0] - 1 if nodes else 0.0

    def best(self, requests: int, besides: int, share: float, *, is_behind: bool = False) -> int:
        """Returns the number of nodes with the most tokens per second, if all requests have trees of this size; 0 if none pays.

        Args:
            requests, besides: as in `step_s`.
            share: accepted tokens of this request, divided by those of a typical request.
            is_behind: whether the drafter must catch up first. That has to pay within as many tokens as the drafter missed, so
                each token costs `catch_up_s` more.
        """
        load = requests, _rounded(besides)
        if share <= 1 and not self.pays(*load):
            return 0
        best, fastest = 0, 1.0
        for nodes, gain, cost in self._sizes.get(load) or self._sizes_of(*load):
            speed = (1 + share * gain) / cost
            if speed > fastest:
                best, fastest = nodes, speed
        if best and is_behind and 1 / fastest + self.catch_up_s / self.step_s(requests, 0, besides) >= 1:
            return 0
        return best

    def pays(self, requests: int, besides: int) -> bool:
        """Returns whether a tree of any size pays for a typical request. It is kept, as every step asks for every request."""
        load = requests, _rounded(besides)
        if load not in self._pays:
            self._pays[load] = any(1 + size.gain > size.cost for size in self._sizes.get(load) or self._sizes_of(*load))
        return self._pays[load]

    def _sizes_of(self, requests: int, besides: int) -> list[Size]:
        """Returns the sizes of trees and what they gain and cost at this load. They are kept, as every step asks for them."""
        plain = self.step_s(requests, 0, besides)
        sizes = [int(size) for size, *_ in self.tokens]
        found = [Size(nodes, self.gain(nodes), self.step_s(requests, nodes, besides) / plain) for nodes in sizes]
        self._sizes[requests, besides] = found
        return found


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
