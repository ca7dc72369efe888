"""From token ids to text as it grows, and where a stop string cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PROMPT_TAIL = 8
"""Prompt tokens decoded along with the first output tokens: how a token is spelled may depend on what stands before it (a
tokenizer with a metaspace drops the space of the very first word), and 8 hold at least one whole character of any script."""

_HALF = "\ufffd"
"""How a tokenizer shows bytes that are no character yet."""


class TextStream:
    """The text of one output, extended token by token; without a tokenizer it stays empty.

    Each token is decoded together with the few before it, so that the cost does not grow with the text.

    Args:
        tokenizer: a Transformers tokenizer or None.
        stop_strings: strings that end the text.
        prompt_ids: what the output follows; its own text is not part of `text`.
        include_stop: whether the text keeps the stop string.
        skip_special_tokens: whether special tokens are left out.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: Sequence[str] = (),
        *,
        prompt_ids: Sequence[int] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self.text = ""
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None) or tokenizer  # the fast one spares checks per call
        self._stop_strings = stop_strings
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._ids = list(prompt_ids[-_PROMPT_TAIL:]) if tokenizer is not None else []
        self._shown = self._decode() if self._ids else ""  # the part of the text of `_ids` that is given out already
        if self._shown.endswith(_HALF):  # a prompt that ends within a character: its bytes stay apart from the output's
            self._ids, self._shown = [], ""
        self._num_shown = len(self._ids)

    @property
    def settled(self) -> str:
        """`text` without an end that may turn out to begin a stop string and be cut off: it never shrinks as tokens come."""
        if not self._include_stop:
            longest = max(map(len, self._stop_strings), default=0)
            for size in range(min(longest - 1, len(self.text)), 0, -1):
                if any(stop.startswith(self.text[-size:]) for stop in self._stop_strings):
                    return self.text[:-size]
        return self.text

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Appends a token. Returns the stop string that the text now holds, cut there; None if it holds none.

        The earliest stop string in the text wins; of several at one place the first in the list.
        """
        if self._tokenizer is None:
            return None
        self._ids.append(token_id)
        before, window = len(self.text), self._decode()
        if window.endswith(_HALF) or len(window) <= len(self._shown):
            return None
        self.text += window[len(self._shown) :]
        del self._ids[: self._num_shown]
        self._shown, self._num_shown = self._decode(), len(self._ids)
        return self._cut(before) if may_stop else None

    def flush(self) -> None:
        """Adds what was held back because it might have been half a character."""
        if self._ids:
            self.text += self._decode()[len(self._shown) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)

    def _cut(self, before: int) -> str | None:
        found = []
        for order, stop in enumerate(self._stop_strings):
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at, order, stop))
        if not found:
            return None
        at, _, stop = min(found)
        self.text = self.text[: at + len(stop) * self._include_stop]
        return stop


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    """Every word as token ids, at the start of a text and after a space, as vLLM spells them."""
    spelled: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        spelled.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            spelled.append(spaced)
    return [ids for ids in spelled if ids]
