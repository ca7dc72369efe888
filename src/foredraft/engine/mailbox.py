"""What stands between the thread of an engine and the event loops of its consumers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import RequestOutput, joined
from foredraft.engine.request import Request


class Mailbox:
    """Holds what the consumer of a request has not taken yet, at most one output or exception.

    It is created in the event loop of the consumer.

    Attributes:
        request: the request; None before the engine has added it.
    """

    def __init__(self, kind: RequestOutputKind):
        self.request: Request | None = None
        self._kind = kind
        self._content: RequestOutput | BaseException | None = None
        self._lock = threading.Lock()
        self._loop, self._filled = asyncio.get_running_loop(), asyncio.Event()

    def put(self, content: RequestOutput | BaseException) -> bool:
        """Adds an output or an exception, from any thread. Returns whether somebody can still take it."""
        with self._lock:
            old = self._content
            if self._kind is RequestOutputKind.DELTA and isinstance(old, RequestOutput) and isinstance(content, RequestOutput):
                content = joined(old, content)
            self._content = content
        if old is None:  # the loop of a blocked consumer holds at most one call
            call_soon(self._loop, self._filled.set)
        return not self._loop.is_closed()

    async def take(self) -> RequestOutput:
        """Waits for the next output. Raises an exception that was put in its place."""
        await self._filled.wait()
        self._filled.clear()
        with self._lock:
            content, self._content = self._content, None
        if isinstance(content, BaseException):
            raise content
        assert content is not None
        return content


class Place:
    """A consumer that waits until the queue of new requests has a place. It is created in the event loop of the consumer.

    Attributes:
        is_aborted: whether its request was aborted meanwhile.
    """

    def __init__(self) -> None:
        self.is_aborted, self._loop, self._called = False, asyncio.get_running_loop(), asyncio.Event()

    @property
    def is_gone(self) -> bool:
        """Whether its event loop is closed."""
        return self._loop.is_closed()

    def call(self) -> None:
        """Lets the consumer try again, from any thread."""
        call_soon(self._loop, self._called.set)

    async def wait(self) -> None:
        """Waits for `call`."""
        await self._called.wait()


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Lets an event loop call a function. Does nothing if the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
