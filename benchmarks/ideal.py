"""Computes how long a scheduler without overhead takes for some requests, from measured costs of forwards.

The scheduler serves requests in their order. It always keeps `num_seqs` requests running while any wait, and fills the rest of
each step with chunks of prompts. It takes no time itself, and neither does anything else outside the forwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DECODING, CHUNKS = (0, 1, 2, 4, 8, 12, 16), (0, 16, 64, 256, 512)
"""Numbers of requests that decode, and of rows of a prompt's chunk, whose steps are measured. Others are interpolated."""

CONTEXT, FAR = 16, 528
"""Numbers of tokens in the caches of requests that decode. A chunk is measured after no token, and after `FAR` - `CONTEXT`."""


@dataclass(frozen=True)
class Costs:
    """Seconds of forwards.

    Attributes:
        alone: of steps without a chunk, by number of requests that decode.
        beside_none, beside_all: of steps with a chunk, by its rows, while no request decodes and while the most do.
        decoding: further seconds per token in the cache of a request that decodes, beyond `CONTEXT` tokens.
        chunk: further seconds per row of a chunk and token that it attends to, beyond those of a single chunk at the
            beginning of its prompt.
    """

    alone: Sequence[float]
    beside_none: Sequence[float]
    beside_all: Sequence[float]
    decoding: float
    chunk: float

    def seconds(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> float:
        """Returns the seconds of a step.

        Args:
            contexts: number of tokens in the cache of each request that decodes.
            chunks: for each chunk of a prompt, the number of tokens before it and of its rows.
        """
        rows = sum(count for _, count in chunks)
        seen = sum(before * count + count**2 / 2 for before, count in chunks) - rows**2 / 2
        far = self.decoding * sum(context - CONTEXT for context in contexts)
        return self._rows(len(contexts), rows) + far + self.chunk * seen

    def _rows(self, decoding: int, rows: int) -> float:
        """Returns the seconds of a step while all caches are short."""
        share, few, some = decoding / DECODING[-1], min(rows / CHUNKS[1], 1.0), max(rows, CHUNKS[1])
        beside = (1 - share) * _between(CHUNKS, self.beside_none, some) + share * _between(CHUNKS, self.beside_all, some)
        return beside if few == 1.0 else (1 - few) * _between(DECODING, self.alone, decoding) + few * beside


def _between(places: Sequence[int], values: Sequence[float], at: int) -> float:
    """Interpolates linearly."""
    left = min(bisect_right(places, at) - 1, len(places) - 2)
    share = (at - places[left]) / (places[left + 1] - places[left])
    return (1 - share) * values[left] + share * values[left + 1]


def measured_costs(ask: Callable[[int, int, int], float]) -> Costs:
    """Measures the costs. `ask` times a step of some requests that decode, a chunk, and so many tokens before each of them."""
    most, rows, far = DECODING[-1], CHUNKS[3], FAR - CONTEXT
    alone = [0.0, *(ask(decoding, 0, 0) for decoding in DECODING[1:])]
    none = [0.0, *(ask(0, count, 0) for count in CHUNKS[1:])]
    every = [alone[-1], *(ask(most, count, 0) for count in CHUNKS[1:])]
    decoding = (ask(most, 0, far) - alone[-1]) / (most * far)
    return Costs(alone, none, every, max(0.0, decoding), max(0.0, (ask(0, rows, far) - none[3]) / (rows * far)))


@dataclass
class _Running:
    missing: int
    context: int
    left: int


def ideal_seconds(lengths: Sequence[tuple[int, int]], costs: Costs, num_seqs: int, max_rows: int) -> float:
    """Returns the seconds of the ideal scheduler.

    Args:
        lengths: number of prompt tokens and of output tokens of each request, in the order in which they are served.
        max_rows: maximum number of rows of a step.
    """
    waiting, running, seconds = [_Running(prompt - 1, 0, answer) for prompt, answer in lengths], list[_Running](), 0.0
    while waiting or running:
        decoding, rows, chunks = [one for one in running if not one.missing], max_rows, list[tuple[int, int]]()
        rows -= len(decoding)
        late = [one for one in running if one.missing]
        while rows > 0 and (late or (waiting and len(running) < num_seqs)):
            if not late:
                late.append(waiting.pop(0))
                running.append(late[0])
            one = late.pop(0)
            count = min(rows, one.missing)
            chunks += [(one.context, count)] if count else []
            one.missing, one.context, rows = one.missing - count, one.context + count, rows - count
        seconds += costs.seconds([one.context for one in decoding], chunks)
        for one in decoding:
            one.left, one.context = one.left - 1, one.context + 1
        running = [one for one in running if one.left]
    return seconds
