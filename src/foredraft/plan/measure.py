"""Times steps of the engine on this machine, and says on what these times depend."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

import foredraft
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Target, Work
from foredraft.core.params import SamplingParams
from foredraft.core.shape import MAX_DEPTH
from foredraft.core.tree import TreeBatch
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.kernels import cpu_flags, instruction_set
from foredraft.plan.speculation import KINDS

SAMPLE_TEXT = (
    "Once upon a time there was a baker in a small town by the sea. Every morning he got up at four, lit the oven and made "
    "forty loaves of bread. One day a stranger came into the shop and asked for something that the baker had never heard of."
)
"""Steps are timed on the continuation of this text."""

_log = logging.getLogger("foredraft")
_LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 8, 48, 0.4
"""The least and the largest number of timed steps, and the seconds that suffice."""

_TURN_STEPS, _TURN_S = 8, 0.05
"""A turn ends after this many steps or seconds. In turns of a single step, each side would find the caches of the processor
filled by the other. Beside a model of 14M that hid a fifth of what drafting costs."""

_LEAST_LONG_STEPS, _LONG_S = 3, 1.0
"""The least number of timed steps if they take more than `_LONG_S` seconds. The times of long steps vary less."""

LIMIT_S = 10.0
"""After this many seconds, no further candidate is timed for the same kind of requests."""


def facts_of(target: Target, weights: Sequence[str | None]) -> dict[str, Any]:
    """Returns everything on which the times of steps depend.

    Args:
        weights: fingerprints of the target and the drafter.
    """
    config = getattr(target.config, "to_dict", dict)()
    return {
        "target": [config.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")],
        "dtype": str(getattr(target, "dtype", None)),
        "device": str(getattr(target, "device", "cpu")),
        "weights": weights,
        "machine": [platform.node(), platform.machine(), os.cpu_count(), sorted(cpu_flags())],
        "threads": torch.get_num_threads(),
        "kernels": instruction_set(),
        "versions": [torch.__version__, foredraft.__version__],
    }


def sample_prompt(tokenizer: Any, vocab_size: int, max_model_len: int) -> list[int]:
    """Returns the prompt after which steps are timed: the sample text, or any tokens if there is no tokenizer.

    It fills at most half of the context of `max_model_len` tokens.
    """
    ids = [1 + i % (vocab_size - 1) for i in range(16)] if tokenizer is None else tokenizer(SAMPLE_TEXT)["input_ids"]
    return list(ids)[: max(1, max_model_len // 2)]


class Full:
    """Drafts the longest allowed chain of an arbitrary token.

    Its steps cost as much time as those of a drafter without weights that has found a match.
    """

    feature_layers: Sequence[int] = ()
    ahead = bytes_per_token = 0

    def start(self, tokens: Sequence[int], features: Any, cache: Any = None, first: int = 0) -> list[int]:
        """Returns the state, which is the last token."""
        return [tokens[-1]]

    def propose(self, work: Work) -> TreeBatch:
        """Returns chains that repeat the last token."""
        return TreeBatch.chains([state * (1 + min(budget)) for state, budget in zip(work.states, work.budgets, strict=True)])

    def observe(self, state: list[int], tokens: Sequence[int], features: Any, path: Sequence[int]) -> None:
        """Stores the last token."""
        state[0] = tokens[-1]

    def written(self, state: list[int]) -> None:
        """Returns None, because there are no keys and values."""

    def finish(self, state: list[int]) -> None:
        """Does nothing, because no resources are held."""


def announce() -> None:
    """Logs that drafters are timed, which takes seconds. It is a warning, so that it appears where logging is not set up."""
    _log.warning(
        "timing drafters on this machine; this takes at most some %.0f s, and the result is kept", len(KINDS) * LIMIT_S
    )


def slowdown_of(timed: Timed, plain: Timed) -> float:
    """Returns the time of a step divided by the time of a plain decoding step.

    Both take turns, because the speed of the machine drifts. The first turn of each is a warm-up, in which the drafter also
    runs the prompt. The slowest quarter of the steps of each is left out, because other work may have interrupted them. At
    least `_LEAST_STEPS` steps of each are timed, or `_LEAST_LONG_STEPS` if they are long. Fast models run more steps, up to
    `_MOST_STEPS`, until `_ENOUGH_S` seconds have passed.
    """
    pair = [candidate.steps() for candidate in (timed, plain)]
    seconds: list[list[float]] = [[], []]
    try:
        taken, is_warm = 0.0, False
        while len(seconds[0]) < (_LEAST_LONG_STEPS if taken > _LONG_S else _LEAST_STEPS if taken > _ENOUGH_S else _MOST_STEPS):
            for steps, times in zip(pair, seconds, strict=True):
                turn: list[float] = []
                while len(turn) < _TURN_STEPS and sum(turn) < _TURN_S:
                    began = perf_counter()
                    if next(steps, None) is None:
                        return inf if not times else _ratio(seconds)
                    turn.append(perf_counter() - began)
                times += turn if is_warm else []
            taken, is_warm = sum(map(sum, seconds)), True
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
        most = len(self.prompt) + (_MOST_STEPS + 2 * _TURN_STEPS) * (1 + self.nodes)
        length = min(self.target.max_len, most)
        if len(self.prompt) >= length:
            return
        engine = Engine(
            self.target,
            drafter=self.drafter,
            rule=self.rule,
            budget=Budget(self.nodes, min(self.nodes, MAX_DEPTH)),
            max_model_len=length,
            options=EngineOptions(max_num_seqs=self.num_seqs),
        )
        for _ in range(self.num_seqs):
            engine.add_request(None, self.prompt, self.sampling)
        try:
            while engine.has_unfinished_requests():
                yield engine.step()
        finally:
            engine.abort_request([str(number) for number in range(self.num_seqs)])
