"""Lets several threads wait for the outputs of one engine. One of those that wait runs the steps for all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.engine.engine import Engine
from foredraft.engine.request import Request


class _Caller:
    """A thread that waits for some requests.

    Attributes:
        requests: the unfinished requests that it waits for, by name.
        inbox: outputs that it has not taken yet. A None among them wakes it, because perhaps nobody runs the steps.
    """

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.inbox = SimpleQueue[RequestOutput | None]()  # may be filled by what the garbage collector closes


class Callers:
    """The callers of one engine.

    While callers wait and nobody runs the steps, one of them has been woken to do so. A caller that stops looking wakes another
    one first. So does every caller that yields an output, because its consumer may never resume it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._turn = threading.Lock()
        self._callers: dict[str, _Caller] = {}
        self._idle: dict[_Caller, None] = {}

    def run(self, prompts: Sequence[tuple[Any, SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
        """Runs prompts with their parameters. Yields outputs, each with the index of its prompt, until all have ended.

        Closing the iterator early aborts the others.

        Raises:
            ValueError: a prompt or its parameters are invalid. Nothing has run in this case.
            Exception: a step failed; the exception is that of the step.
        """
        caller, places = _Caller(), dict[str, int]()
        try:
            with self.engine.lock:  # no step may give outputs before the caller is known
                requests = self.engine.add_requests(prompts)
                places |= {request.request_id: index for index, request in enumerate(requests)}
                self._callers |= dict.fromkeys(places, caller)
                caller.requests |= {request.request_id: request for request in requests}
            while caller.requests:
                output = self._next(caller)
                if output.finished:
                    del caller.requests[output.request_id]
                yield places[output.request_id], output
        finally:
            for name in places:
                self._callers.pop(name, None)
            self._idle.pop(caller, None)
            try:
                self.engine.abort_request(places)
            finally:
                self._wake_one()
        for request in requests:
            for sequence in request.sequences:
                if sequence.cause is not None:
                    raise sequence.cause

    def _next(self, caller: _Caller) -> RequestOutput:
        """Returns the next output of a caller. Runs steps as long as nobody else does."""
        output = None
        while output is None and (output := _aborted(caller)) is None:
            self._idle[caller] = None  # before it looks, so that a later release of the turn wakes it
            if caller.inbox.empty() and self._turn.acquire(blocking=False):
                try:
                    self._idle.pop(caller, None)
                    self._deliver(self.engine.step())
                finally:
                    self._turn.release()
                    self._wake_one()
            else:
                output = caller.inbox.get()
        self._idle.pop(caller, None)
        if not self._turn.locked():
            self._wake_one()  # it may never come back
        return output

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            caller = self._callers.get(output.request_id)
            if caller is not None:
                caller.inbox.put(output)

    def _wake_one(self) -> None:
        """Wakes a caller that waits. It runs the next step if nobody else does."""
        for caller in list(self._idle):
            self._idle.pop(caller, None)
            caller.inbox.put(None)
            return


def _aborted(caller: _Caller) -> RequestOutput | None:
    """Returns the output of a request that somebody else aborted: no step reports it."""
    for request in caller.requests.values():
        if any(sequence.finish_reason == "abort" for sequence in request.sequences):
            return request.output()
    return None
