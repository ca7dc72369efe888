"""Queues of sequences in the order in which they are served: by priority, then by arrival, then by output.

Every sequence has its own place in this order. So it is found by bisection, however many others wait.
"""

from __future__ import annotations

from bisect import bisect_left

from foredraft.engine.request import Sequence


def put(queue: list[Sequence], sequence: Sequence) -> None:
    """Puts a sequence into a queue, unless it is there already."""
    at = _place(queue, sequence)
    if at == len(queue) or queue[at] is not sequence:
        queue.insert(at, sequence)


def take_out(queue: list[Sequence], sequence: Sequence) -> None:
    """Takes a sequence out of a queue, if it is there."""
    at = _place(queue, sequence)
    if at < len(queue) and queue[at] is sequence:
        del queue[at]


def _place(queue: list[Sequence], sequence: Sequence) -> int:
    return bisect_left(queue, _order(sequence), key=_order)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return *sequence.request.order, sequence.index
