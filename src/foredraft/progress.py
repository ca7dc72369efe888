"""What a terminal shows of long work: a bar, after two seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_DELAY_S = 2.0


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that adds to the number of finished items, out of `total`.

    The bar appears on standard error, and only if that is a terminal.
    """
    columns = TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True)
    task, began, running = bar.add_task(label, total=total), monotonic(), False

    def advance(count: int) -> None:
        nonlocal running
        bar.advance(task, count)
        if shown and not running and console.is_terminal and monotonic() - began > _DELAY_S:
            running = True
            bar.start()

    try:
        yield advance
    finally:
        if running:
            bar.stop()
