"""Shows how far long work has come: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_DELAY_S, _LINE_S = 2.0, 30.0
"""Seconds until the bar appears, and seconds between lines."""


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that adds to the number of finished items, out of `total`.

    A bar appears on standard error if that is a terminal. Otherwise a line appears every 30 seconds. Nothing
    appears without `shown`.
    """
    if not shown:
        yield lambda count: None
        return
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    task, began, lines, done = bar.add_task(label, total=total), monotonic(), 0, 0

    def advance(count: int) -> None:
        nonlocal lines, done
        done += count
        bar.advance(task, count)
        passed = monotonic() - began
        if console.is_terminal:
            if not bar.live.is_started and passed > _DELAY_S:
                bar.start()
        elif passed > _LINE_S * (lines + 1):
            lines = int(passed / _LINE_S)
            print(f"{label}: {done} of {total} after {passed:.0f} s", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def note(line: str) -> None:
    """Prints a line about long work on standard error."""
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
