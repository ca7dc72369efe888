"""The choice of tree, size and depth from what was measured: tokens a step, and seconds a step on this machine.

Tokens a step come from ``calibration.json`` in the drafter's directory (or from the user's cache), measured on training text
by `foredraft calibrate`; without one, from a typical acceptance by sibling rank. Seconds a step are measured once on the
machine at hand, by running real steps, and kept in the user's cache. The choice is made once an engine, separately for greedy
and for sampled requests, and never looks at the requests in flight, so that an output does not depend on its neighbours.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from math import inf, prod
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import torch

import foredraft
from foredraft.calibration import recalled
from foredraft.decode import Continuation, autoregressive, paced, speculative
from foredraft.drafters import DRAFTERS
from foredraft.draws import Draws
from foredraft.grow.budget import best_paths
from foredraft.grow.static import TYPICAL_ACCEPTANCE
from foredraft.params import SamplingParams
from foredraft.protocols import AcceptanceRule, Budget, Drafter, Target
from foredraft.speculation import MAX_DEPTH, Speculation, Way
from foredraft.text import TextStream
from foredraft.tree import TreeBatch

SIZES = (2, 4, 6, 8, 12, 16, 32, 64)
"""Numbers of nodes worth trying: each costs noticeably more than the one before."""

SAMPLE_TEXT = (
    "Once upon a time there was a baker in a small town by the sea. Every morning he got up at four, lit the oven and made "
    "forty loaves of bread. One day a stranger came into the shop and asked for something that the baker had never heard of."
)
"""Steps are timed on the continuation of this text."""

_log = logging.getLogger("foredraft")

_WARM_STEPS, _LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 2, 8, 48, 0.4
"""The first step runs the prompt through the drafter."""

TRIED_TREES, TYPICAL_SIZE = 2, 8
"""Only so many trees are timed, those of most tokens a step at a typical size."""

_MODEL_MARGIN = 1.1
"""A draft model or head has to promise so much more than plain decoding or lookup: it costs more, and varies with the text."""

_WORSE = 0.92
"""Growing a tree further is given up once the predicted speed fell to this share of the best."""


class Candidate(NamedTuple):
    """A way to draft and its largest number of nodes."""

    way: Way
    nodes: int


class Choice(NamedTuple):
    """What was chosen, and why.

    Attributes:
        way, nodes: nodes are 0 where plain decoding is faster than every candidate.
        tokens_per_step: of the candidate.
        slowdown: a step's time in steps of plain decoding, measured on this machine.
        speedup: the quotient of the two: what is predicted against plain decoding.
    """

    way: Way
    nodes: int
    tokens_per_step: float
    slowdown: float
    speedup: float


@dataclass(frozen=True)
class Chooser:
    """Chooses for one engine; see the module's text.

    Attributes:
        has_model: whether there is a draft model or a head.
        build: gives the drafter of a way.
        measured: a calibration: under ``tokens_per_step`` kind of request -> `curve_name` -> number of nodes -> tokens a step;
            under ``drafted_share`` the same -> share of the steps in which the drafter it asks was asked.
        num_seqs: requests in a step.
        prompt: whose continuation is timed.
    """

    target: Target
    speculation: Speculation
    has_model: bool
    build: Callable[[Way], Drafter]
    measured: Mapping[str, Any]
    num_seqs: int
    prompt: Sequence[int]

    def choose(self) -> dict[str, Choice]:
        """The choice for ``greedy`` and for ``sampled`` requests."""
        facts = [self._facts(), self.measured, self.speculation, self.num_seqs]
        found = recalled("choice", facts, lambda: {kind: self._choose(kind) for kind in ("greedy", "sampled")})
        choices = {kind: Choice(Way(*one[0]), *one[1:]) for kind, one in found.items()}
        if not any(one.nodes for one in choices.values()):
            _log.warning("drafting does not pay with method %r on this machine: decoding is plain", self.speculation.drafter)
        return choices

    def _facts(self) -> dict[str, Any]:
        """What the times hang on."""
        config = getattr(self.target.config, "to_dict", dict)()
        device = getattr(self.target, "device", "cpu")
        return {
            "target": [config.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")],
            "dtype": str(getattr(self.target, "dtype", None)),
            "device": str(device),
            "machine": [platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
            "versions": [torch.__version__, foredraft.__version__],
        }

    def _choose(self, kind: str) -> Choice:
        sampling = SamplingParams(temperature=0.0 if kind == "greedy" else 1.0)
        plain = Timed(self.target, None, None, 0, self.prompt, sampling, self.num_seqs)
        ways = self._worth_timing(kind)
        drafters: dict[Way, Drafter] = {}

        @memoize
        def slower(way: Way, nodes: int) -> float:
            if has_weights(way) and way not in drafters:
                drafters[way] = self.build(way)
            drafter = drafters[way] if has_weights(way) else Full()
            rule = self.speculation.rule_for(way.tree)
            return slowdown_of(Timed(self.target, drafter, rule, nodes, self.prompt, sampling, self.num_seqs), plain)

        def slowdown(candidate: Candidate) -> float:
            """Where a drafter asks another, steps with a lookup and steps of that other, as often as calibration saw them."""
            way, nodes = candidate
            asked = DRAFTERS[way.drafter].asks
            if asked is None:
                return slower(way, nodes)
            share = self._drafted_share(kind, candidate)
            return share * slower(Way(asked, way.tree), nodes) + (1 - share) * slower(LOOKUP, nodes)

        return choose(
            ways,
            [self.speculation.budget.nodes] if self.speculation.budget else SIZES,
            lambda candidate: tokens_per_step(self._curves(kind), candidate),
            slowdown,
            fallback=self.speculation.budget is None,
        )

    def _worth_timing(self, kind: str) -> list[Way]:
        """Of the ways that were measured those of most tokens a step, and every drafter that costs nothing; if none was
        measured, a tree that needs no measurement."""
        ways = self.speculation.ways(has_model=self.has_model)
        curves = self._curves(kind)
        if not curves:
            tree = "opt" if kind == "greedy" else "chain"
            usual = [way for way in ways if way.tree == tree or (has_weights(way) and way.tree is None)]
            return usual[-1:] or ways[:1]
        known = [way for way in ways if curve_name(way) in curves]
        weighty = sorted((way for way in known if has_weights(way)), key=lambda way: -(self._tokens(curves, way)))
        return weighty[:TRIED_TREES] + [way for way in known if not has_weights(way)] or ways[:1]

    def _curves(self, kind: str) -> Mapping[str, Any]:
        return self.measured.get("tokens_per_step", {}).get(kind) or {}

    def _drafted_share(self, kind: str, candidate: Candidate) -> float:
        shares = self.measured.get("drafted_share", {}).get(kind) or {}
        return tokens_per_step(shares, candidate) or 1.0 if shares else 1.0

    def _tokens(self, curves: Mapping[str, Any], way: Way) -> float:
        return tokens_per_step(curves, Candidate(way, TYPICAL_SIZE)) or 0.0


def has_weights(way: Way) -> bool:
    """Whether its drafter is a model or a head, which costs time in every step."""
    return DRAFTERS[way.drafter].weights is not None


def curve_name(way: Way) -> str:
    """Under which name a way's tokens a step are kept."""
    return f"{way.drafter}:{way.tree}" if way.tree else way.drafter


LOOKUP = Way("ngram", None)
"""What a step costs in which a lookup drafted."""


class Full:
    """Drafts a chain of any token, as long as it may be: what a step of a drafter without weights costs that found a match."""

    feature_layers: Sequence[int] = ()

    def start(self, tokens: Sequence[int], features: Any) -> list[int]:
        """The state is the last token."""
        return [tokens[-1]]

    def propose(self, states: Sequence[list[int]], budgets: Sequence[Budget], sampling: Any, draws: Any) -> TreeBatch:
        """Chains of the last token."""
        return TreeBatch.chains([state * (1 + min(budget)) for state, budget in zip(states, budgets, strict=True)])

    def observe(self, state: list[int], tokens: Sequence[int], features: Any, path: Sequence[int]) -> None:
        """Follows the last token."""
        state[0] = tokens[-1]

    def finish(self, state: list[int]) -> None:
        """Nothing is held."""


def slowdown_of(timed: Timed, plain: Timed) -> float:
    """A step's seconds in steps of plain decoding. Both take turns, since the machine's speed drifts; the slowest quarter of
    each is left out, where other work came in between.

    At least `_LEAST_STEPS` of each are timed, and more for fast models, up to `_MOST_STEPS` in `_ENOUGH_S` seconds.
    """
    pair = [one.steps() for one in (timed, plain)]
    seconds: list[list[float]] = [[], []]
    try:
        for number in range(_WARM_STEPS + _MOST_STEPS):
            for steps, times in zip(pair, seconds, strict=True):
                began = perf_counter()
                if next(steps, None) is None:
                    return inf if not times else _ratio(seconds)
                if number >= _WARM_STEPS:
                    times.append(perf_counter() - began)
            if number >= _WARM_STEPS + _LEAST_STEPS and sum(map(sum, seconds)) > _ENOUGH_S:
                break
        return _ratio(seconds)
    finally:
        for steps in pair:
            steps.close()


def _ratio(seconds: Sequence[Sequence[float]]) -> float:
    kept = [sorted(times)[: max(1, len(times) * 3 // 4)] for times in seconds]
    return fmean(kept[0]) / fmean(kept[1])


@dataclass(frozen=True)
class Timed:
    """What is timed: `num_seqs` requests of one prompt; plain decoding without a drafter."""

    target: Target
    drafter: Drafter | None
    rule: AcceptanceRule | None
    nodes: int
    prompt: Sequence[int]
    sampling: SamplingParams
    num_seqs: int

    def steps(self) -> Generator[Any, None, None]:
        """Step after step, until closed."""
        pool = self.target.new_pool(self.num_seqs, self.target.max_len)
        run = [
            Continuation(list(self.prompt), len(self.prompt), self.target.max_len, self.sampling, Draws(b), TextStream(None))
            for b in range(self.num_seqs)
        ]
        if self.drafter is None:
            steps = autoregressive(self.target, pool, run)
        else:
            assert self.rule is not None
            budget = Budget(self.nodes, min(self.nodes, MAX_DEPTH))
            steps = speculative(self.target, pool, run, self.drafter, self.rule, budget)
        try:
            yield from paced(self.target, steps)
        finally:
            steps.close()
            for one in run:
                if self.drafter is not None and one.draft_state is not None:
                    self.drafter.finish(one.draft_state)


def choose(
    ways: Iterable[Way],
    sizes: Sequence[int],
    tokens_per_step: Callable[[Candidate], float | None],
    slowdown: Callable[[Candidate], float],
    *,
    fallback: bool,
) -> Choice:
    """The candidate of most tokens a second; plain decoding if none beats it and `fallback`.

    `slowdown` is a step's time in plain steps. Sizes are tried upwards until they no longer pay, so that few steps have to be
    timed.
    """
    ways = list(ways)
    best = Choice(ways[0], 0, 1.0, 1.0, 1.0 if fallback else 0.0)
    top_score = best.speedup
    for way in ways:
        top = 0.0
        for nodes in sizes:
            candidate = Candidate(way, nodes)
            tokens = tokens_per_step(candidate)
            if tokens is None:
                continue
            cost = slowdown(candidate)
            speedup = tokens / cost
            score = speedup / (_MODEL_MARGIN if has_weights(way) else 1.0)
            if score > top_score:
                best, top_score = Choice(way, nodes, tokens, cost, speedup), score
            if speedup < _WORSE * top:
                break
            top = max(top, speedup)
    return best


def tokens_per_step(measured: Mapping[str, Mapping[str, float]] | None, candidate: Candidate) -> float | None:
    """Tokens a step of a candidate: measured (interpolated between the sizes that were), or for a typical drafter.

    Args:
        measured: `curve_name` -> number of nodes (as a string, from JSON) -> tokens a step.

    Returns:
        None if others were measured but not this one.
    """
    if not measured:
        paths = best_paths(TYPICAL_ACCEPTANCE, Budget(candidate.nodes, candidate.nodes))
        return 1 + sum(prod(TYPICAL_ACCEPTANCE[rank] for rank in path) for path in paths)
    curve = measured.get(curve_name(candidate.way))
    if not curve:
        return None
    points = sorted((int(nodes), tokens) for nodes, tokens in curve.items())
    below = max((one for one in points if one[0] <= candidate.nodes), default=points[0])
    above = min((one for one in points if one[0] >= candidate.nodes), default=points[-1])
    if above[0] == below[0]:
        return below[1]
    share = (candidate.nodes - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])
