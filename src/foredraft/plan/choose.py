"""Chooses tree, size and depth from measurements: tokens per step, and seconds per step on this machine.

Tokens per step come from ``calibration.json`` in the drafter's directory, or from the user's cache. `foredraft calibrate`
measures them on training text. Without a calibration, they are those of a typical drafter of its kind.

Seconds per step are measured once on this machine by running real steps, and are stored in the user's cache.

The choice is made once per engine for one running request, and separately for greedy and for sampled requests. With more
running requests, the engine lowers the number of nodes by the costs that are measured here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache as memoize
from functools import cached_property
from math import prod
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from foredraft.core.contracts import Budget, Drafter, Target
from foredraft.core.costs import Costs, Point, pays
from foredraft.core.folders import cache_folder
from foredraft.core.params import RequestOutputKind, SamplingParams
from foredraft.drafters import DRAFTERS
from foredraft.plan.choice import Choice
from foredraft.plan.costs import NODES, costs_of, forward_costs
from foredraft.plan.measure import LIMIT_S, Full, Timed, announce, facts_of, slowdown_of
from foredraft.plan.speculation import AUTO, KINDS, Speculation, Way
from foredraft.plan.store import recalled
from foredraft.trees.budget import best_paths
from foredraft.trees.static import TYPICAL_ACCEPTANCE

SIZES = (2, 4, 6, 8, 12, 16, 32, 64)
"""Numbers of nodes to try. Each costs noticeably more time than the one before."""

CHOICES = "foredraft.choices"
"""Name of the logger of choices. The command line prints them itself."""

TRIED_TREES, TYPICAL_SIZE = 2, 8
"""Of each drafter, chains and the `TRIED_TREES` trees with the most tokens per step at `TYPICAL_SIZE` nodes are timed."""

_TYPICAL_LOOKUP = 0.2, 0.5
"""Acceptance of the first token of a lookup, and of each further one if the tokens before were accepted. With many nodes, this
gives 1.4 tokens per step, which lookups reached on answers of SmolLM2-135M-Instruct."""

_WORSE = 0.92
"""No larger size is tried once the predicted speed has fallen to this share of the best speed."""


class Candidate(NamedTuple):
    """A way to draft with its largest number of nodes."""

    way: Way
    nodes: int


@dataclass(frozen=True)
class Chooser:
    """Makes the choice for one engine; see the docstring of this module.

    Attributes:
        has_model: whether there is a draft model or a head.
        build: builds the drafter of a way.
        measured: a calibration. ``tokens_per_step`` maps kind of request -> `curve_name` -> number of nodes -> tokens per
            step. ``drafted_share`` has the same keys; its values are the share of steps that used the fallback drafter.
        prompt: the prompt whose continuation is timed.
        weights: fingerprints of the target and the drafter.
    """

    target: Target
    speculation: Speculation
    has_model: bool
    build: Callable[[Way], Drafter]
    measured: Mapping[str, Any]
    prompt: Sequence[int]
    weights: Sequence[str | None] = ()

    def choose(self) -> dict[str, Choice]:
        """Returns the choice for ``greedy`` and for ``sampled`` requests, stored or from new measurements.

        A stored choice is valid only for the same machine, threads, weights and versions. If nothing can be stored and the
        config leaves the budget open, nothing is timed and decoding is plain.
        """
        settled = replace(self.speculation, retime=False)
        facts = [facts_of(self.target, self.weights), self.measured, settled, NODES, sorted(Costs.__dataclass_fields__)]
        if cache_folder() is None and self.speculation.budget is None:
            way = settled.ways(has_model=self.has_model)[0]
            return dict.fromkeys(KINDS, Choice(way, 0, 1.0, 1.0, 1.0))
        found = recalled("choice", facts, self._measure, anew=self.speculation.retime)
        choices = {kind: Choice(Way(*found[kind][0]), *found[kind][1:]) for kind in KINDS}
        for kind, choice in choices.items():
            is_surprise = choice.nodes == 0 and self.speculation.drafter != AUTO
            level = logging.WARNING if is_surprise else logging.INFO
            advice = "; num_speculative_tokens drafts all the same" if is_surprise else ""
            logging.getLogger(CHOICES).log(level, "%s requests: %s%s", kind, choice.reason, advice)
        return choices

    def _measure(self) -> dict[str, Choice]:
        today = date.today().isoformat()
        build = memoize(self.build)
        for way in self._worth_timing("greedy")[:1]:
            build(way)  # a draft model that cannot be used is refused before the timing
        announce()
        found = {kind: self._choose(kind, build) for kind in KINDS}
        return {kind: choice._replace(timed_on=today, calibrated=bool(self._curves(kind))) for kind, choice in found.items()}

    @cached_property
    def _forward(self) -> tuple[Point, ...]:
        """Costs of forwards, which all kinds of requests share."""
        return forward_costs(self.target, self.prompt)

    def _choose(self, kind: str, build: Callable[[Way], Drafter]) -> Choice:
        plain, deadline = self._timed(kind, None, 0, 1), perf_counter() + LIMIT_S

        @memoize
        def slower(way: Way, nodes: int) -> float:
            return slowdown_of(self._timed(kind, way, nodes, 1, build), plain)

        found = choose(
            self._worth_timing(kind),
            [self.speculation.budget.nodes] if self.speculation.budget else SIZES,
            lambda candidate: tokens_per_step(self._curves(kind), candidate),
            lambda candidate: sum(share * slower(way, candidate.nodes) for share, way in self._parts(kind, candidate)),
            fallback=self.speculation.budget is None,
            in_time=lambda: perf_counter() < deadline,
        )
        if not found.nodes or self.speculation.budget is not None:
            return found
        return self._follow(found, lambda forward: self._costs(kind, found, build, forward))

    def _follow(self, found: Choice, measure: Callable[[tuple[Point, ...]], Costs]) -> Choice:
        """Adds the costs that steps will follow. If nothing would be drafted by them, the choice is plain decoding.

        Candidates take turns with plain decoding, but costs are measured one after the other. If the two do not agree, other
        work has disturbed them, and costs are measured once more.
        """
        costs = measure(self._forward)
        if not costs.for_all(1):
            costs = costs.least_of(measure(forward_costs(self.target, self.prompt)))
        if costs.for_all(1):
            return found._replace(costs=costs.written())
        slowdown = costs.slowdown(found.nodes)
        return found._replace(nodes=0, slowdown=slowdown, speedup=found.tokens_per_step / slowdown)

    def _costs(self, kind: str, choice: Choice, build: Callable[[Way], Drafter], forward: tuple[Point, ...]) -> Costs:
        way = self._parts(kind, Candidate(choice.way, choice.nodes))[0][1]

        def timed(requests: int, nodes: int) -> Timed:
            return self._timed(kind, way if nodes else None, nodes, requests, build)

        def tokens(nodes: int) -> float:
            return tokens_per_step(self._curves(kind), Candidate(choice.way, nodes)) or 1.0

        return costs_of(forward, choice.nodes, timed, tokens)

    def _timed(
        self, kind: str, way: Way | None, nodes: int, requests: int, build: Callable[[Way], Drafter] | None = None
    ) -> Timed:
        """Returns a workload; without a way, it is plain decoding."""
        about = self.prompt, SamplingParams(temperature=KINDS[kind]).giving(RequestOutputKind.FINAL_ONLY), requests
        if way is None:
            return Timed(self.target, None, None, 0, *about)
        drafter = build(way) if build is not None and has_weights(way) else Full()
        return Timed(self.target, drafter, self.speculation.rule_for(way.tree), nodes, *about)

    def _parts(self, kind: str, candidate: Candidate) -> list[tuple[float, Way]]:
        """Returns the ways that draft the steps of a candidate, with their shares from the calibration.

        Steps of a ``-lookup`` drafter are those of lookup and of the fallback drafter.
        """
        way = candidate.way
        fallback = DRAFTERS[way.drafter].asks
        if fallback is None:
            return [(1.0, way if has_weights(way) else LOOKUP)]
        share = self._drafted_share(kind, candidate)
        return [(share, Way(fallback, way.tree)), (1 - share, LOOKUP)]

    def _worth_timing(self, kind: str) -> list[Way]:
        """Returns the ways worth timing.

        These are the measured ways with the most tokens per step, chains, which cost the least time, and all measured drafters
        without weights. Without measurements, it is a tree policy that needs none.
        """
        ways = self.speculation.ways(has_model=self.has_model)
        curves = self._curves(kind)
        if not curves:
            tree = "opt" if kind == "greedy" else "chain"
            usual = [way for way in ways if way.tree == tree or (has_weights(way) and way.tree is None)]
            return usual[-1:] or ways[:1]
        known = [way for way in ways if curve_name(way) in curves]
        tokens = {way: tokens_per_step(curves, Candidate(way, TYPICAL_SIZE)) or 0.0 for way in known if has_weights(way)}
        best, free = best_ways(tokens), [way for way in known if not has_weights(way)]
        return best[:1] + free + best[1:] or ways[:1]  # a single timing serves all drafters without weights

    def _curves(self, kind: str) -> Mapping[str, Any]:
        return self.measured.get("tokens_per_step", {}).get(kind) or {}

    def _drafted_share(self, kind: str, candidate: Candidate) -> float:
        shares = self.measured.get("drafted_share", {}).get(kind) or {}
        return tokens_per_step(shares, candidate) or 1.0 if shares else 1.0


def best_ways(tokens: Mapping[Way, float]) -> list[Way]:
    """Returns for each drafter chains, which cost the least time, and the `TRIED_TREES` trees with the most tokens per step.

    Ways with more tokens per step come first.
    """
    ordered = sorted(tokens, key=lambda way: -tokens[way])
    ranks = {way: [other for other in ordered if other.drafter == way.drafter].index(way) for way in ordered}
    return [way for way in ordered if ranks[way] < TRIED_TREES or way.tree == "chain"]


def has_weights(way: Way) -> bool:
    """Whether the drafter is a model or a head, which costs time in every step."""
    return DRAFTERS[way.drafter].weights is not None


def curve_name(way: Way) -> str:
    """Name under which the tokens per step of a way are stored."""
    return f"{way.drafter}:{way.tree}" if way.tree else way.drafter


LOOKUP = Way("ngram", None)
"""The way whose time stands for every step that was drafted by lookup, and for every drafter without weights."""


def choose(
    ways: Iterable[Way],
    sizes: Sequence[int],
    tokens_per_step: Callable[[Candidate], float | None],
    slowdown: Callable[[Candidate], float],
    *,
    fallback: bool,
    in_time: Callable[[], bool] = lambda: True,
) -> Choice:
    """Returns the candidate with the most tokens per second.

    Sizes are tried upwards and only while the speed grows, so that few steps must be timed.

    Args:
        tokens_per_step: returns the tokens per step of a candidate; None if they are not known.
        slowdown: returns the time of a candidate's step divided by that of a plain decoding step.
        fallback: choose only among the candidates that pay, see `pays`. If there are none, choose plain decoding (0 nodes).
        in_time: returns whether another candidate may be timed. At least one is timed.
    """
    ways = list(ways)
    best = plain = Choice(ways[0], 0, 1.0, 1.0, 0.0)
    allowed = False  # whether the best may be chosen
    for way in ways:
        top = 0.0
        for nodes in sizes:
            candidate = Candidate(way, nodes)
            tokens = tokens_per_step(candidate)
            if tokens is None:
                continue
            if best.speedup and not in_time():
                break
            cost = slowdown(candidate)
            speedup = tokens / cost
            may = not fallback or pays(tokens, cost)
            if (may, speedup) > (allowed, best.speedup):
                best, allowed = Choice(way, nodes, tokens, cost, speedup), may
            if speedup < _WORSE * top:
                break
            top = max(top, speedup)
    if not best.speedup:
        return plain._replace(speedup=1.0)
    return best if allowed else best._replace(nodes=0)


def tokens_per_step(measured: Mapping[str, Mapping[str, float]] | None, candidate: Candidate) -> float | None:
    """Returns the tokens per step of a candidate, interpolated linearly from measured sizes and from 1 token at 0 nodes.

    Args:
        measured: `curve_name` -> number of nodes (as a string, from JSON) -> tokens per step. Without measurements, the
            values of a typical drafter apply.

    Returns:
        None if other candidates were measured but not this one.
    """
    if not measured and not has_weights(candidate.way):
        first, further = _TYPICAL_LOOKUP
        return 1 + sum(first * further**depth for depth in range(candidate.nodes))
    if not measured:
        paths = best_paths(TYPICAL_ACCEPTANCE, Budget(candidate.nodes, candidate.nodes))
        return 1 + sum(prod(TYPICAL_ACCEPTANCE[rank] for rank in path) for path in paths)
    curve = measured.get(curve_name(candidate.way))
    if not curve:
        return None
    sizes = sorted(map(int, curve))
    return float(np.interp(candidate.nodes, [0, *sizes], [1.0, *(curve[str(nodes)] for nodes in sizes)]))
