"""Chooses tree, size and depth from measurements: tokens per step, and seconds per step on this machine.

Tokens per step come from ``calibration.json`` in the drafter's directory, or from the user's cache. `foredraft calibrate`
measures them on training text. Without a calibration, they are those of a typical drafter of its kind.

Seconds per step are measured once on this machine by running real steps, and are stored in the user's cache.

The choice is made once per engine, separately for greedy and for sampled requests. It never depends on the running requests,
so an output does not depend on other requests of its batch.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache as memoize
from math import inf, prod
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import torch

import foredraft
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Target, Work
from foredraft.core.draws import Draws
from foredraft.core.folders import cache_folder
from foredraft.core.params import SamplingParams
from foredraft.core.text import TextStream
from foredraft.core.tree import TreeBatch
from foredraft.drafters import DRAFTERS
from foredraft.engine.continuation import Continuation
from foredraft.engine.decode import autoregressive, paced, speculative
from foredraft.kernels import cpu_flags, library
from foredraft.plan.config import AUTO, MAX_DEPTH, Speculation, Way
from foredraft.plan.store import recalled
from foredraft.trees.budget import best_paths
from foredraft.trees.static import TYPICAL_ACCEPTANCE

SIZES = (2, 4, 6, 8, 12, 16, 32, 64)
"""Numbers of nodes to try. Each costs noticeably more time than the one before."""

SAMPLE_TEXT = (
    "Once upon a time there was a baker in a small town by the sea. Every morning he got up at four, lit the oven and made "
    "forty loaves of bread. One day a stranger came into the shop and asked for something that the baker had never heard of."
)
"""Steps are timed on the continuation of this text."""

KINDS = ("greedy", "sampled")
"""Kinds of requests: temperature 0 (greedy) and above 0 (sampled). Each kind has its own choice."""

_log = logging.getLogger("foredraft")
CHOICES = "foredraft.choices"
"""Name of the logger of choices. The command line prints them itself."""

_WARM_STEPS, _LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 2, 8, 48, 0.4
"""Warm-up steps, then the least and the largest number of timed steps, and the seconds that suffice. Warm-up is needed because
the first step runs the prompt through the drafter."""

_LEAST_LONG_STEPS, _LONG_S = 3, 1.0
"""The least number of timed steps if they take more than `_LONG_S` seconds. The times of long steps vary less."""

LIMIT_S = 10.0
"""After this many seconds, no further candidate is timed for the same kind of requests."""

TRIED_TREES, TYPICAL_SIZE = 2, 8
"""Only `TRIED_TREES` trees are timed: those with the most tokens per step at `TYPICAL_SIZE` nodes."""

_MARGIN = 1.1
"""A drafter must beat plain decoding by this factor, and a draft model or head must also beat lookup by it. Gains vary by text,
and a draft model or head costs more."""

_TYPICAL_LOOKUP = 0.2, 0.5
"""Acceptance of the first token of a lookup, and of each further one if the tokens before were accepted. With many nodes, this
gives 1.4 tokens per step, which lookups reached on answers of SmolLM2-135M-Instruct."""

_WORSE = 0.92
"""No larger size is tried once the predicted speed has fallen to this share of the best speed."""


class Candidate(NamedTuple):
    """A way to draft with its largest number of nodes."""

    way: Way
    nodes: int


class Choice(NamedTuple):
    """The result of an automatic choice, with its reasons.

    Attributes:
        way: drafter and tree of the best candidate.
        nodes: number of nodes of its tree; 0 if plain decoding is expected to be faster.
        tokens_per_step: expected tokens per step of the best candidate.
        slowdown: time of its step divided by the time of a plain decoding step, measured on this machine.
        speedup: expected speed-up over plain decoding: `tokens_per_step` divided by `slowdown`.
        timed_on: date of the measurement; None if nothing was timed.
        calibrated: whether `tokens_per_step` was measured. If not, it is that of a typical drafter.
    """

    way: Way
    nodes: int
    tokens_per_step: float
    slowdown: float
    speedup: float
    timed_on: str | None = None
    calibrated: bool = True

    @property
    def reason(self) -> str:
        """Describes the choice in one line."""
        name = ", ".join(part for part in self.way if part)
        if self.timed_on is None:
            return f"drafting: {f'{name} {self.nodes} nodes' if self.nodes else 'off'} (nothing was timed)"
        when = f"timed here on {self.timed_on}" + (
            "" if self.calibrated else "; not calibrated, so a typical drafter is assumed"
        )
        if self.nodes:
            speedup = f"{self.speedup:.{1 if self.speedup > 1.1 else 2}f}x"
            return f"drafting: {name} {self.nodes} nodes (expected {speedup}; {when})"
        if self.speedup > 1:
            return f"drafting: off (best {name} {self.speedup:.2f}x, but a drafter must reach {_MARGIN}x; {when})"
        return f"drafting: off (no method expected above plain: best {name} {self.speedup:.2f}x; {when})"


@dataclass(frozen=True)
class Chooser:
    """Makes the choice for one engine; see the docstring of this module.

    Attributes:
        has_model: whether there is a draft model or a head.
        build: builds the drafter of a way.
        measured: a calibration. ``tokens_per_step`` maps kind of request -> `curve_name` -> number of nodes -> tokens per
            step. ``drafted_share`` has the same keys; its values are the share of steps that used the fallback drafter.
        num_seqs: number of requests per step.
        prompt: the prompt whose continuation is timed.
        weights: fingerprints of the target and the drafter.
    """

    target: Target
    speculation: Speculation
    has_model: bool
    build: Callable[[Way], Drafter]
    measured: Mapping[str, Any]
    num_seqs: int
    prompt: Sequence[int]
    weights: Sequence[str | None] = ()

    def choose(self) -> dict[str, Choice]:
        """Returns the choice for ``greedy`` and for ``sampled`` requests, stored or from new measurements.

        A stored choice is valid only for the same machine, threads, weights and versions. If nothing can be stored and the
        config leaves the budget open, nothing is timed and decoding is plain.
        """
        settled = replace(self.speculation, retime=False)
        facts = [self._facts(), self.measured, settled, self.num_seqs]
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
        announce()
        return {kind: self._choose(kind)._replace(timed_on=today, calibrated=bool(self._curves(kind))) for kind in KINDS}

    def _facts(self) -> dict[str, Any]:
        """The facts that determine the times."""
        config = getattr(self.target.config, "to_dict", dict)()
        device = getattr(self.target, "device", "cpu")
        return {
            "target": [config.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")],
            "dtype": str(getattr(self.target, "dtype", None)),
            "device": str(device),
            "weights": self.weights,
            "machine": [platform.node(), platform.machine(), os.cpu_count(), sorted(cpu_flags())],
            "threads": torch.get_num_threads(),
            "compiled": library() is not None,
            "versions": [torch.__version__, foredraft.__version__],
        }

    def _choose(self, kind: str) -> Choice:
        sampling = SamplingParams(temperature=0.0 if kind == "greedy" else 1.0)
        plain = Timed(self.target, None, None, 0, self.prompt, sampling, self.num_seqs)
        ways, deadline = self._worth_timing(kind), perf_counter() + LIMIT_S
        drafters: dict[Way, Drafter] = {}

        @memoize
        def slower(way: Way, nodes: int) -> float:
            if has_weights(way) and way not in drafters:
                drafters[way] = self.build(way)
            drafter = drafters[way] if has_weights(way) else Full()
            rule = self.speculation.rule_for(way.tree)
            return slowdown_of(Timed(self.target, drafter, rule, nodes, self.prompt, sampling, self.num_seqs), plain)

        def slowdown(candidate: Candidate) -> float:
            """For a ``-lookup`` drafter, averages lookup steps and fallback steps with the shares from the calibration."""
            way, nodes = candidate
            fallback = DRAFTERS[way.drafter].asks
            if fallback is None:
                return slower(way if has_weights(way) else LOOKUP, nodes)
            share = self._drafted_share(kind, candidate)
            return share * slower(Way(fallback, way.tree), nodes) + (1 - share) * slower(LOOKUP, nodes)

        return choose(
            ways,
            [self.speculation.budget.nodes] if self.speculation.budget else SIZES,
            lambda candidate: tokens_per_step(self._curves(kind), candidate),
            slowdown,
            fallback=self.speculation.budget is None,
            in_time=lambda: perf_counter() < deadline,
        )

    def _worth_timing(self, kind: str) -> list[Way]:
        """Returns the ways worth timing.

        These are the measured ways with the most tokens per step, and all measured drafters without weights. Without
        measurements, it is a tree policy that needs none.
        """
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
    """Whether the drafter is a model or a head, which costs time in every step."""
    return DRAFTERS[way.drafter].weights is not None


def curve_name(way: Way) -> str:
    """Name under which the tokens per step of a way are stored."""
    return f"{way.drafter}:{way.tree}" if way.tree else way.drafter


LOOKUP = Way("ngram", None)
"""The way whose time stands for every step that was drafted by lookup, and for every drafter without weights."""


class Full:
    """Drafts the longest allowed chain of an arbitrary token.

    Its steps cost as much time as those of a drafter without weights that has found a match.
    """

    feature_layers: Sequence[int] = ()

    def start(self, tokens: Sequence[int], features: Any) -> list[int]:
        """Returns the state, which is the last token."""
        return [tokens[-1]]

    def propose(self, work: Work) -> TreeBatch:
        """Returns chains that repeat the last token."""
        return TreeBatch.chains([state * (1 + min(budget)) for state, budget in zip(work.states, work.budgets, strict=True)])

    def observe(self, state: list[int], tokens: Sequence[int], features: Any, path: Sequence[int]) -> None:
        """Stores the last token."""
        state[0] = tokens[-1]

    def finish(self, state: list[int]) -> None:
        """Does nothing, because no resources are held."""


def announce() -> None:
    """Logs that drafters are timed, which takes seconds. It is a warning, so that it appears where logging is not set up."""
    _log.warning(
        "timing drafters on this machine; this takes at most some %.0f s, and the result is kept", len(KINDS) * LIMIT_S
    )


def slowdown_of(timed: Timed, plain: Timed) -> float:
    """Returns the time of a step divided by the time of a plain decoding step.

    Both take turns, because the speed of the machine drifts. The slowest quarter of the steps of each is left out, because
    other work may have interrupted them. At least `_LEAST_STEPS` steps of each are timed, or `_LEAST_LONG_STEPS` if they are
    long. Fast models run more steps, up to `_MOST_STEPS`, until `_ENOUGH_S` seconds have passed.
    """
    pair = [candidate.steps() for candidate in (timed, plain)]
    seconds: list[list[float]] = [[], []]
    try:
        for number in range(_WARM_STEPS + _MOST_STEPS):
            for steps, times in zip(pair, seconds, strict=True):
                began = perf_counter()
                if next(steps, None) is None:
                    return inf if not times else _ratio(seconds)
                if number >= _WARM_STEPS:
                    times.append(perf_counter() - began)
            taken = sum(map(sum, seconds))
            if number >= _WARM_STEPS + (_LEAST_LONG_STEPS if taken > _LONG_S else _LEAST_STEPS) - 1 and taken > _ENOUGH_S:
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
    """A workload to time: `num_seqs` requests with the same prompt. Without a drafter, decoding is plain."""

    target: Target
    drafter: Drafter | None
    rule: AcceptanceRule | None
    nodes: int
    prompt: Sequence[int]
    sampling: SamplingParams
    num_seqs: int

    def steps(self) -> Generator[Any, None, None]:
        """Runs one step per iteration, until the generator is closed."""
        most = len(self.prompt) + (_WARM_STEPS + _MOST_STEPS + 1) * (1 + self.nodes)
        length = min(self.target.max_len, most)
        pool = self.target.new_pool(self.num_seqs, length)
        run = [
            Continuation(list(self.prompt), len(self.prompt), length, self.sampling, Draws(b), TextStream(None))
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
            for continuation in run:
                if self.drafter is not None and continuation.draft_state is not None:
                    self.drafter.finish(continuation.draft_state)


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
        fallback: choose plain decoding (0 nodes) if no candidate is faster by `_MARGIN`.
        in_time: returns whether another candidate may be timed. At least one is timed.
    """
    ways = list(ways)
    best = Choice(ways[0], 0, 1.0, 1.0, 1.0)
    top_score, nearest = 0.0, best._replace(speedup=0.0)
    for way in ways:
        top = 0.0
        for nodes in sizes:
            candidate = Candidate(way, nodes)
            tokens = tokens_per_step(candidate)
            if tokens is None:
                continue
            if nearest.speedup and not in_time():
                break
            cost = slowdown(candidate)
            speedup = tokens / cost
            score = speedup / (_MARGIN if has_weights(way) else 1.0)
            if score > top_score and (speedup > _MARGIN or not fallback):
                best, top_score = Choice(way, nodes, tokens, cost, speedup), score
            if speedup > nearest.speedup:
                nearest = Choice(way, 0, tokens, cost, speedup)
            if speedup < _WORSE * top:
                break
            top = max(top, speedup)
    return best if best.nodes or not nearest.speedup else nearest


def tokens_per_step(measured: Mapping[str, Mapping[str, float]] | None, candidate: Candidate) -> float | None:
    """Returns the tokens per step of a candidate. Sizes between measured ones are interpolated linearly.

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
    points = sorted((int(nodes), tokens) for nodes, tokens in curve.items())
    below = max((point for point in points if point[0] <= candidate.nodes), default=points[0])
    above = min((point for point in points if point[0] >= candidate.nodes), default=points[-1])
    if above[0] == below[0]:
        return below[1]
    share = (candidate.nodes - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])
