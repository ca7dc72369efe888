"""Times steps of the engine on this machine, and says on what these times depend."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean
from time import perf_counter
from typing import Any

import torch

import foredraft
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Target, Work
from foredraft.core.metrics import StepRecord
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
_LEAST_STEPS, _MOST_STEPS, _ENOUGH_S = 8, 48, 0.2
"""The least and the largest number of timed steps of a workload, and the seconds that suffice."""

_TURN_STEPS, _TURN_S = 12, 0.05
"""A turn ends after this many steps or seconds. The first third of its steps is left out, because it finds the caches of the
processor filled by others."""

_LEAST_LONG_STEPS, _LONG_S = 3, 0.5
"""The least number of timed steps of a workload if they take more than `_LONG_S` seconds. The times of long steps vary less."""

LIMIT_S, COSTS_S = 10.0, 10.0
"""After `LIMIT_S` seconds, no further candidate is timed for the same kind of requests. Then its costs are measured. With 350M
parameters on two cores, this takes some `COSTS_S` at most."""


def facts_of(target: Target, weights: Sequence[str | None]) -> dict[str, Any]:
    """Returns everything on which the times of steps depend.

    Args:
        weights: fingerprints of the target and the drafter.
    """
    config = getattr(target.config, "to_dict", dict)()
    return {
        "target": [config.get(key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")],
        "dtype": str(getattr(target, "dtype", None)),
        "activations": getattr(target, "activations", None),
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
        "timing drafters on this machine; this takes at most some %.0f s, and the result is kept",
        len(KINDS) * (LIMIT_S + COSTS_S),
    )


def slowdown_of(timed: Timed, plain: Timed) -> float:
    """Returns the time of a step divided by the time of a plain decoding step. The two take turns, see `seconds_in_turns`."""
    drafting, decoding = seconds_in_turns([timed.steps(), plain.steps()])
    return typical(drafting) / typical(decoding) if drafting and decoding else inf


def seconds_in_turns(workloads: Sequence[Generator[Any, None, None]]) -> list[list[float]]:
    """Times the steps of several workloads, which take turns because the speed of the machine drifts.

    The first turn of each is a warm-up, in which drafters also run the prompt. At least `_LEAST_STEPS` steps of each are timed,
    or `_LEAST_LONG_STEPS` if they are long. Fast models run up to `_MOST_STEPS` steps.

    Returns:
        The seconds of the steps of each workload. There are fewer of a workload that ends early, and none if it ends soon.
    """
    seconds: list[list[float]] = [[] for _ in workloads]
    live, taken, is_warm = [*zip(workloads, seconds, strict=True)], 0.0, False
    try:
        while live and min(len(times) for _, times in live) < _wanted(taken / len(live)):
            for workload in [*live]:
                turn = _turn(workload[0])
                workload[1].extend(turn if is_warm else [])
                if not turn:
                    live.remove(workload)
            taken, is_warm = sum(sum(times) for _, times in live), True
        return seconds
    finally:
        for steps in workloads:
            steps.close()


def _turn(steps: Iterator[Any]) -> list[float]:
    """Runs the steps of a turn, and returns the seconds of all but its first third. There are none if the workload ends."""
    turn: list[float] = []
    while len(turn) < _TURN_STEPS and sum(turn) < _TURN_S:
        began = perf_counter()
        if next(steps, None) is None:
            return []
        turn.append(perf_counter() - began)
    return turn[len(turn) // 3 :]


def _wanted(taken_s: float) -> int:
    """Returns how many steps of a workload are timed if its steps have taken some seconds so far."""
    return _LEAST_LONG_STEPS if taken_s > _LONG_S else _LEAST_STEPS if taken_s > _ENOUGH_S else _MOST_STEPS


def typical(seconds: Sequence[float]) -> float:
    """Returns the mean without the slowest quarter, which other work may have interrupted."""
    return fmean(sorted(seconds)[: max(1, len(seconds) * 3 // 4)])


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

    def steps(self) -> Generator[list[StepRecord], None, None]:
        """Runs one step per iteration, until the generator is closed. Gives the records of those that decode."""
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
                engine.step()
                yield [sequence.records[-1] for sequence in engine.scheduler.running if sequence.records]
        finally:
            engine.abort_request([str(number) for number in range(self.num_seqs)])
