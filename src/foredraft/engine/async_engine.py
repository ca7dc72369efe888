"""Serves requests of event loops: one thread runs the steps of an engine, and each consumer has a mailbox of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from functools import partial
from heapq import nsmallest
from typing import Any

from foredraft.core.errors import UserError, UserTypeError, shown
from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams
from foredraft.core.prompts import Prompt
from foredraft.engine.engine import Engine
from foredraft.engine.mailbox import Mailbox, Newcomer, call_soon

_SHUT_DOWN = "the engine has been shut down"

MOST_NEW = 256
"""New requests that the thread takes between two steps. It takes some milliseconds for them, in which the others wait."""


class AsyncEngine:
    """Runs requests of any number of event loops on one engine, in a thread of its own.

    A consumer that reads slowly delays nobody, and its mailbox holds at most one output; see `generate`. The thread sleeps
    while there are no requests. It ends at `shutdown`, when the object is deleted, or when the program ends.

    Args:
        engine: runs the requests. Nobody else may add requests to it or call its `step`.
        most_new: maximum number of new requests that the thread takes between two steps. The consumers of further ones wait
            their turn, without blocking their event loops.

    Raises:
        ValueError: `most_new` is not positive.
    """

    def __init__(self, engine: Engine, *, most_new: int = MOST_NEW):
        if most_new < 1:
            raise UserError(f"most_new must be at least 1, got {most_new}")
        self.engine = engine
        self._worker = _Worker(engine, most_new)
        weakref.finalize(self, self._worker.stop)

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str | None = None, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates for one prompt. The last output has ``finished=True``.

        The request starts when the first output is awaited, and enters the engine in its turn, between two steps. If the
        generator is closed or its task is cancelled, the request ends before the next step, and its blocks are released.

        The engine never waits for the consumer. Steps that the consumer has missed are given as one output: with
        `RequestOutputKind.DELTA` everything since the previous output, otherwise the newest output.

        Args:
            request_id: name of the request in its outputs; it must differ from those of unfinished requests. None is a
                running number.
            priority: a request of smaller priority is served first.

        Returns:
            Outputs in the form of ``sampling_params.output_kind``. A request that fails alone ends with the finish reason
            ``error``, which is not raised.

        Raises:
            ValueError: the prompt or its parameters are invalid. The generator raises it if the name is in use, or if the
                memory could never hold the request.
            TypeError: an argument has a wrong type.
            QueueFullError: the generator raises it if `max_waiting` outputs wait already.
            RuntimeError: the generator raises it after `shutdown`.
            Exception: the generator raises what a step raised. The requests of this step have ended, and new ones can run.
        """
        if request_id is not None:
            _check_type("request_id", request_id, str)
        _check_type("priority", priority, int)
        given = self.engine.checked(prompt, sampling_params)
        return self._outputs(given, sampling_params, request_id, priority)

    async def _outputs(
        self, given: dict[str, Any], params: SamplingParams, request_id: str | None, priority: int
    ) -> AsyncGenerator[RequestOutput, None]:
        mailbox, worker = Mailbox(params.output_kind), self._worker
        about = {"priority": priority, "arrived_s": time.monotonic()}
        add = partial(worker.add, mailbox, request_id, given, params, **about)
        worker.enter(mailbox, Newcomer(request_id, priority, add))
        try:
            finished = False
            while not finished:
                output = await mailbox.take()
                finished = output.finished
                yield output
        finally:
            worker.go(mailbox)

    async def abort(self, request_id: str) -> None:
        """Ends a request. Its consumer gets a last output with the finish reason ``abort``.

        Returns when the blocks of the request, and those of all generators closed before, are released. Does nothing if no
        unfinished request has this name.
        """
        _check_type("request_id", request_id, str)
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        self._worker.post(partial(self._worker.abort, request_id))
        if self._worker.post(partial(call_soon, loop, done.set)):
            await done.wait()

    def shutdown(self) -> None:
        """Aborts all requests and ends the thread. Waits for the step that runs. May be called again."""
        self._worker.stop()


class _Worker:
    """The thread that runs an engine. Other threads give it actions, which it runs in order between two steps.

    It holds no reference to the `AsyncEngine`, which can therefore be deleted while the thread sleeps.
    """

    def __init__(self, engine: Engine, most_new: int):
        self._engine = engine
        self._most_new, self._has_taken = most_new, False  # since the last step
        self._new: dict[Mailbox, Newcomer] = {}  # not taken yet, in the order in which they came
        self._named: dict[str, Mailbox] = {}  # those of them that have a name
        self._mailboxes: dict[str, Mailbox] = {}  # of unfinished requests; only the thread uses them
        self._actions = deque[Callable[[], object]]()
        self._changed, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="foredraft-engine", daemon=True)
        self._thread.start()

    def post(self, action: Callable[[], object]) -> bool:
        """Lets the thread run an action before its next step. Returns False, and does nothing, after `stop`."""
        with self._changed:
            if self._stopping:
                return False
            self._actions.append(action)
            self._changed.notify()
        return True

    def enter(self, mailbox: Mailbox, newcomer: Newcomer) -> None:
        """Lets the thread add a request, in its turn.

        Raises:
            ValueError: another request of this name waits already.
            RuntimeError: the thread has ended.
        """
        with self._changed:
            if self._stopping:
                raise RuntimeError(_SHUT_DOWN)
            if newcomer.name is not None:
                other = self._named.get(newcomer.name)
                if other is not None and not other.is_gone:
                    raise UserError(f"request {newcomer.name!r} is still running", "give every request a name of its own")
                if other is not None:
                    self._take(other)
                self._named[newcomer.name] = mailbox
            self._new[mailbox] = newcomer
            self._changed.notify()

    def go(self, mailbox: Mailbox) -> None:
        """Ends the request of a consumer that goes away, before the next step."""
        with self._changed:
            if mailbox in self._new:
                self._take(mailbox)
            elif not self._stopping:
                self._actions.append(partial(self.leave, mailbox))
                self._changed.notify()

    def _take(self, mailbox: Mailbox) -> Newcomer:
        """Takes a newcomer out of those that wait. The caller holds the lock."""
        newcomer = self._new.pop(mailbox)
        if newcomer.name is not None:
            del self._named[newcomer.name]
        return newcomer

    def _take_some(self) -> None:
        """Lets the thread add the first ones of those that wait, by priority. The caller holds the lock."""
        self._has_taken = True
        for mailbox in [mailbox for mailbox in self._new if mailbox.is_gone]:
            self._take(mailbox)
        first = nsmallest(self._most_new, self._new.items(), key=lambda pair: pair[1].priority)
        self._actions += [self._take(mailbox).add for mailbox, _ in first]

    def stop(self) -> None:
        """Aborts all requests, ends the thread and waits for it."""
        with self._changed:
            if not self._stopping:
                self._stopping = True
                for mailbox in [*self._new]:
                    self._take(mailbox)
                    mailbox.put(RuntimeError(_SHUT_DOWN))
                self._actions.append(self._abort_all)
                self._changed.notify()
        if threading.current_thread() is not self._thread:  # the garbage collector may call this in the thread
            self._thread.join()

    # What follows runs in the thread.

    def add(
        self, mailbox: Mailbox, request_id: str | None, given: Any, params: SamplingParams, *, priority: int, arrived_s: float
    ) -> None:
        """Adds a request, or gives its consumer the reason why that is not possible."""
        about = {"priority": priority, "arrival_time": time.time() - (time.monotonic() - arrived_s)}
        try:
            mailbox.request = self._engine.add_request(request_id, given, params, **about)
        except Exception as error:
            mailbox.put(error)
        else:
            self._mailboxes[mailbox.request.request_id] = mailbox

    def abort(self, request_id: str) -> None:
        """Ends a request, and gives its consumer a last output. So does one of this name that waits."""
        self._end(request_id)
        with self._changed:
            waits = self._named.get(request_id)
            newcomer = None if waits is None else self._take(waits)
        if newcomer is not None:
            newcomer.add()
            self._end(request_id)

    def _end(self, request_id: str) -> None:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            assert mailbox.request is not None
            self._engine.abort_request(request_id)
            del self._mailboxes[request_id]
            mailbox.put(mailbox.request.output())

    def leave(self, mailbox: Mailbox) -> None:
        """Ends the request of a consumer that has gone, unless it has ended already."""
        request = mailbox.request
        if request is not None and self._mailboxes.get(request.request_id) is mailbox:
            self._end(request.request_id)

    def _abort_all(self) -> None:
        for request_id in list(self._mailboxes):
            self._end(request_id)

    def _run(self) -> None:
        while (action := self._next()) is not None:
            try:
                action()
            except BaseException as error:  # if the thread ended here, all consumers would wait forever
                self._fail(error)

    def _next(self) -> Callable[[], object] | None:
        """Waits for something to do. Returns an action or a step; None when the thread has to end."""
        with self._changed:
            while True:
                if self._actions:
                    return self._actions.popleft()
                if self._new and not self._has_taken:
                    self._take_some()
                    continue
                self._has_taken = False
                if self._mailboxes:
                    return self._step
                if self._new:
                    continue
                if self._stopping:
                    return None
                self._changed.wait()

    def _step(self) -> None:
        for output in self._engine.step():
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is None:
                continue
            if output.finished:
                del self._mailboxes[output.request_id]
            if not mailbox.put(output):
                self.leave(mailbox)

    def _fail(self, error: BaseException) -> None:
        """Gives an exception to all consumers, and ends their requests."""
        mailboxes, self._mailboxes = self._mailboxes, {}
        for request_id, mailbox in mailboxes.items():
            mailbox.put(error)
            with suppress(Exception):  # the cause may be that something cannot be released
                self._engine.abort_request(request_id)


def _check_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise UserTypeError(f"{name} must be of type {wanted.__name__}, got {shown(value)}")
