"""Prints a run on a terminal: text coloured by kind of token, trees and summaries.

Text and trees go to standard output. Legends, notes and progress go to standard error.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from foredraft.core.errors import UserError, speaks_unicode
from foredraft.core.outputs import CompletionOutput
from foredraft.core.params import SamplingParams
from foredraft.core.text import TextStream
from foredraft.core.tree import DraftTree

STYLES = {"accepted": "green", "recovered": "yellow", "bonus": "cyan", "plain": "none"}
"""Colour by kind of token."""

_LEGEND = {"accepted": "accepted drafts", "recovered": "recovered after a rejection", "bonus": "bonus after a whole path"}

_INVISIBLE = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
"""Control characters. The output of a model must not send them to a terminal."""


class Pieces:
    """Splits a growing text into pieces by kind of token. The pieces joined together are the text.

    A character that consists of several tokens belongs to the last of them. The text of a running output lacks an end that may
    begin a stop string, see `foredraft.core.text.TextStream.settled`.

    Args:
        tokenizer: tokenizer of the model; None produces no text.
        sampling: sampling parameters of the request.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams):
        self._stream = TextStream(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self._ends: list[int] = []  # length of the text after each token
        self._done = 0

    def take(self, completion: CompletionOutput) -> list[tuple[str, str]]:
        """Returns the new pieces as (kind, text)."""
        for token in completion.token_ids[len(self._ends) :]:
            self._stream.push(token)
            self._ends.append(len(self._stream.text))
        text = completion.text
        if not completion.kinds:  # an error ended the output before its first token
            return []
        pieces, until = [], len(text)
        for kind, end in zip(completion.kinds, [*self._ends[:-1], until], strict=True):
            end = min(end, until)
            if end > self._done:
                pieces.append((kind, text[self._done : end]))
                self._done = end
        return pieces


class Screen:
    """Prints one output while it grows. On a terminal with colours, the colour shows the kind of token.

    Args:
        legend: whether to print the meaning of the colours first, if the terminal has colours.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams, *, legend: bool):
        self._out = Console(highlight=False)
        self._pieces = Pieces(tokenizer, sampling)
        if legend and self._out.is_terminal and self._out.color_system and not self._out.no_color:
            _err().print(Text("  ").join(Text(meaning, STYLES[kind]) for kind, meaning in _LEGEND.items()))

    def update(self, completion: CompletionOutput) -> None:
        """Prints the new part of the text."""
        with _uninterrupted():
            for kind, piece in self._pieces.take(completion):
                shown = piece.translate(_INVISIBLE) if self._out.is_terminal else piece
                self._out.print(Segments([Segment(shown, Style.parse(STYLES[kind]))]), end="", crop=False)

    def finish(self, completion: CompletionOutput | None) -> None:
        """Prints the rest of the text and ends the line."""
        if completion is not None:
            self.update(completion)
        self._out.print(Segments([Segment("\n")]), end="")


def summary(completion: CompletionOutput) -> str:
    """One line: tokens, tokens per step, and milliseconds per token by part. The pass over the prompt is not counted."""
    metrics, count = completion.metrics, max(1, len(completion.token_ids))
    parts = {name: getattr(metrics, f"{name}_s") * 1000 / count for name in ("draft", "verify", "rule", "cache")}
    split = ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())
    return (
        f"{len(completion.token_ids)} tokens, {metrics.acceptance_length:.2f} tokens per step (acceptance_length), "
        f"{sum(parts.values()):.2f} ms per token ({split})"
    )


def print_tree(tokenizer: Any, completion: CompletionOutput | None) -> None:
    """Draws the tree of a completion's latest step and its accepted path. `completion` is None if no step had a tree."""
    if completion is None:
        note("nothing was drafted, so there is no tree")
    else:
        Console(highlight=False).print(draw_tree(tokenizer, completion))


def draw_tree(tokenizer: Any, completion: CompletionOutput) -> Tree:
    """The tree of the latest step: text of every node, its draft probability if it was sampled, and the accepted path."""
    tree = completion.last_tree
    assert tree is not None
    path = completion.last_path
    branches = [Tree(Text.assemble((_spell(tokenizer, tree, 0), "bold"), " (root)"), guide_style="dim")]
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[node])
        label = Text(_spell(tokenizer, tree, node))
        law = tree.law(parent)
        if law is not None:
            label.append(f" {float(law[int(tree.tokens[node])]):.3f}", "dim")
        if node in path:
            mark = "✓ " if speaks_unicode(sys.stdout) else "* "
            label = Text.assemble(mark, label, " accepted", style=STYLES["accepted"])
        branches.append(branches[parent].add(label))
    if completion.kinds and completion.kinds[-1] in ("recovered", "bonus"):
        kind = completion.kinds[-1]
        token = _spell_id(tokenizer, completion.token_ids[-1])
        arrow = "→" if speaks_unicode(sys.stdout) else "->"
        branches[path[-1] if path else 0].add(Text(f"{arrow} {token} {kind}", STYLES[kind]))
    return branches[0]


def _spell(tokenizer: Any, tree: DraftTree, node: int) -> str:
    return _spell_id(tokenizer, int(tree.tokens[node]))


def _spell_id(tokenizer: Any, token_id: int) -> str:
    return str(token_id) if tokenizer is None else repr(tokenizer.decode([token_id]))


def tree_as_dict(completion: CompletionOutput | None) -> dict[str, Any] | None:
    """The tree of the latest step as JSON-compatible data; None if nothing was drafted."""
    tree = completion.last_tree if completion is not None else None
    if completion is None or tree is None:
        return None
    return {"token_ids": tree.tokens.tolist(), "parents": tree.parents.tolist(), "accepted_path": completion.last_path}


def note(message: str) -> None:
    """Prints a line on standard error, apart from the text."""
    _err().print(Text(message, "dim"), soft_wrap=True)


def greet() -> None:
    """Prints the commands of a chat if standard input is a terminal."""
    if sys.stdin is not None and sys.stdin.isatty():
        note("/reset starts a new conversation, /exit ends the chat, Ctrl-C stops an answer")


def lines() -> Iterator[str]:
    """Yields the lines that the user types, until the input ends. A prompt sign appears on terminals only."""
    with suppress(ImportError):
        import readline  # noqa: F401 (this import adds line editing and history to input())
    if sys.stdin is None:  # it was closed
        return
    typed = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(typed).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not text in {error.encoding} ({error.reason})", "Set a UTF-8 locale") from None


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, so that text is neither lost nor printed twice."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Shows a spinner on standard error if it is a terminal. Yields a function that stops the spinner early."""
    status = _err().status(f"{what} ...", spinner="dots" if speaks_unicode(sys.stderr) else "line")
    status.start()
    try:
        yield status.stop
    finally:
        status.stop()


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def say(line: str, *, stderr: bool = False) -> None:
    """Prints a line as it is, without wrapping it."""
    Console(stderr=stderr, highlight=False, soft_wrap=True).print(line, markup=False)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table with its title."""
    table = Table(*columns, title=title, box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True).print(table)
