"""Lets several threads wait for the outputs of one engine. One of those that wait runs the steps for all of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.engine.engine import Engine


class _Caller:
    """A thread that waits for some requests.

    Attributes:
        unfinished: names of these requests.
        outputs: their outputs that it has not taken yet.
        awake: set when there is an output, or when nobody runs the steps.
    """

    def __init__(self, unfinished: set[str]):
        self.unfinished, self.outputs = unfinished, deque[RequestOutput]()
        self.awake = threading.Event()


class Callers:
    """The callers of one engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._turn = threading.Lock()
        self._callers: dict[str, _Caller] = {}

    def run(self, prompts: Sequence[tuple[Any, SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
        """Runs prompts with their parameters. Yields outputs, each with the index of its prompt, until all have ended.

        Closing the iterator early aborts the others.

        Raises:
            ValueError: a prompt or its parameters are invalid. Nothing has run in this case.
            Exception: a step failed; the exception is that of the step.
        """
        with self.engine.lock:  # no step may give outputs before the caller is known
            requests = self.engine.add_requests(prompts)
            places = {request.request_id: index for index, request in enumerate(requests)}
            caller = _Caller(set(places))
            self._callers |= dict.fromkeys(places, caller)
        try:
            while caller.unfinished or caller.outputs:
                if caller.outputs:
                    output = caller.outputs.popleft()
                    yield places[output.request_id], output
                elif self._turn.acquire(blocking=False):
                    try:
                        self._deliver(self.engine.step())
                    finally:
                        self._turn.release()
                        self._wake_one(caller)
                else:
                    caller.awake.wait()
                    caller.awake.clear()
        finally:
            for name in places:
                self._callers.pop(name, None)
            self.engine.abort_request(places)
            self._wake_one(caller)
        for request in requests:
            for sequence in request.sequences:
                if sequence.cause is not None:
                    raise sequence.cause

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            caller = self._callers.get(output.request_id)
            if caller is not None:
                if output.finished:
                    caller.unfinished.discard(output.request_id)
                caller.outputs.append(output)
                caller.awake.set()

    def _wake_one(self, other: _Caller) -> None:
        """Wakes a waiting caller, who runs the next step if nobody else does."""
        if len(self._callers) <= len(other.unfinished):
            return
        for caller in list(self._callers.values()):
            if caller is not other and caller.unfinished:
                caller.awake.set()
                return
