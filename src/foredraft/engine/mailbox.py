"""What stands between the thread of an engine and the event loops of its consumers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

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

    @property
    def is_gone(self) -> bool:
        """Whether the event loop of the consumer is closed."""
        return self._loop.is_closed()

    def put(self, content: RequestOutput | BaseException) -> bool:
        """Adds an output or an exception, from any thread. Returns whether somebody can still take it."""
        with self._lock:
            old = self._content
            if self._kind is RequestOutputKind.DELTA and isinstance(old, RequestOutput) and isinstance(content, RequestOutput):
                content = joined(old, content)
            self._content = content
        if old is None:  # the loop of a blocked consumer holds at most one call
            call_soon(self._loop, self._filled.set)
        return not self.is_gone

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


class Newcomer(NamedTuple):
    """A request that its consumer has sent, and the engine has not taken yet.

    Attributes:
        name: name of the request; None is a running number.
        priority: those of smaller priority are taken first.
        add: adds it to the engine.
    """

    name: str | None
    priority: int
    add: Callable[[], object]


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Lets an event loop call a function. Does nothing if the loop is closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
