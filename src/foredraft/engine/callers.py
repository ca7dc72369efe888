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
        outputs: what it has not taken yet, at most one output for each of them.
        inbox: something in it wakes the caller. There is an output, or perhaps nobody runs the steps.
        looked: number of aborts and interrupts when it last looked for ends that no step reports.
    """

    def __init__(self) -> None:
        self.looked = 0
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.inbox = SimpleQueue[None]()  # may be filled by what the garbage collector closes

    def put(self, output: RequestOutput) -> None:
        """Adds an output of a request. It replaces one that was not taken, so it must hold everything so far."""
        self.outputs[output.request_id] = output
        self.wake()

    def take(self) -> RequestOutput | None:
        """Returns the output that has been there longest, or None."""
        for name in list(self.outputs):
            output = self.outputs.pop(name, None)
            if output is not None:
                return output
        return None

    def wake(self) -> None:
        """Lets the caller look for outputs. It looks once more after it has emptied its inbox, so one call is enough."""
        if self.inbox.empty():
            self.inbox.put(None)


class Callers:
    """The callers of one engine.

    While callers wait and nobody runs the steps, one of them has been woken to do so. A caller that stops looking wakes another
    one first. So does every caller that yields an output, because its consumer may never resume it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._guard = threading.Lock()
        self._runner: _Caller | None = None  # who runs the steps
        self._callers: dict[str, _Caller] = {}
        self._idle: dict[_Caller, None] = {}
        self._num_interrupts = 0

    def run(self, prompts: Sequence[tuple[Any, SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
        """Runs prompts with their parameters. Yields outputs, each with the index of its prompt, until all have ended.

        Closing the iterator early aborts the others.

        Raises:
            ValueError: a prompt or its parameters are invalid. Nothing has run in this case.
            Exception: no request was answered; the exception is that of a step or of a request. If only some requests fail,
                their outputs hold the reason.
        """
        caller, requests, places = _Caller(), list[Request](), dict[str, int]()
        try:
            with self.engine.lock:  # no step may give outputs before the caller is known
                self.engine.add_requests(prompts, requests)
                places |= {request.request_id: index for index, request in enumerate(requests)}
                self._callers |= dict.fromkeys(places, caller)
                caller.requests |= {request.request_id: request for request in requests}
            while caller.requests:
                output = self._next(caller)
                if output.request_id not in caller.requests:
                    continue  # its end was seen before it was delivered
                if output.finished:
                    del caller.requests[output.request_id]
                yield places[output.request_id], output
        finally:
            for name in places:
                self._callers.pop(name, None)
            self._idle.pop(caller, None)
            if self._runner is caller:
                self._runner = None
            try:
                self.engine.abort_request([request.request_id for request in requests])
            finally:
                self._wake_one()
        causes = [sequence.cause for request in requests for sequence in request.sequences]
        if causes and causes[0] is not None and all(causes):
            raise causes[0]

    def _next(self, caller: _Caller) -> RequestOutput:
        """Returns the next output of a caller. Runs steps as long as nobody else does."""
        while (output := self._ended(caller) or caller.take()) is None:
            self._idle[caller] = None  # before it looks, so that whoever stops running steps wakes it
            try:
                if caller.inbox.empty() and self._takes_turn(caller):
                    self._idle.pop(caller, None)
                    self._deliver(self.engine.step())
                    continue
            except BaseException:
                self._num_interrupts += 1
                for other in {*self._callers.values()}:
                    other.wake()  # perhaps an end was not delivered
                raise
            finally:
                if self._runner is caller:
                    self._runner = None
                    self._wake_one()
            caller.inbox.get()
        self._idle.pop(caller, None)
        if self._runner is None:
            self._wake_one()  # it may never come back
        return output

    def _takes_turn(self, caller: _Caller) -> bool:
        """Lets a caller run the next step, unless somebody else does. It is noted by name, so an interrupt loses no turn."""
        with self._guard:
            if self._runner is None:
                self._runner = caller
        return self._runner is caller

    def _ended(self, caller: _Caller) -> RequestOutput | None:
        """Returns the output of a request whose end no step reports: somebody else aborted it, or interrupted the delivery."""
        events = self.engine.num_aborted + self._num_interrupts
        if events == caller.looked:
            return None
        with self.engine.lock:  # a step in another thread may be about to end one of them
            for request in caller.requests.values():
                if request.is_finished:
                    return request.output()
        caller.looked = events
        return None

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            caller = self._callers.get(output.request_id)
            if caller is not None:
                caller.put(output)

    def _wake_one(self) -> None:
        """Wakes a caller that waits. It runs the next step if nobody else does."""
        for caller in list(self._idle):
            self._idle.pop(caller, None)
            caller.wake()
            return
