"""Converts token ids to text incrementally, and finds stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PROMPT_TAIL = 8
"""Number of prompt tokens decoded together with the first output tokens. The text of a token may depend on the tokens before
it: a tokenizer with a metaspace drops the space of the very first word. 8 tokens contain at least one whole character of any
script."""

_HALF = "\ufffd"
"""A tokenizer writes this character for bytes that do not form a character yet."""


class TextStream:
    """The text of one output, extended token by token. Without a tokenizer, the text stays empty.

    Each token is decoded together with a few tokens before it, so that the cost does not grow with the text.

    Args:
        tokenizer: a Transformers tokenizer or None.
        stop_strings: strings that end the text.
        prompt_ids: the prompt that the output continues. The text of the prompt is not part of `text`.
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
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None) or tokenizer  # faster: skips checks per call
        self._stop_strings = stop_strings
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._ids = list(prompt_ids[-_PROMPT_TAIL:]) if tokenizer is not None else []
        self._shown = self._decode() if self._ids else ""  # the part of the text of `_ids` that is in `text` already
        if self._shown.endswith(_HALF):  # the prompt ends within a character; its bytes are not joined with the output's
            self._ids, self._shown = [], ""
        self._num_shown = len(self._ids)

    @property
    def settled(self) -> str:
        """`text` without a suffix that may be the beginning of a stop string. It never shrinks while tokens are added."""
        if not self._include_stop:
            longest = max(map(len, self._stop_strings), default=0)
            for size in range(min(longest - 1, len(self.text)), 0, -1):
                if any(stop.startswith(self.text[-size:]) for stop in self._stop_strings):
                    return self.text[:-size]
        return self.text

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Appends a token. If the text now contains a stop string, cuts the text there and returns the string, else None.

        The earliest stop string in the text wins. Among several at the same place, the first in the list wins.
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

    def mark(self) -> tuple[str, list[int], str, int]:
        """Returns the state, for `go_back`."""
        return self.text, [*self._ids], self._shown, self._num_shown

    def go_back(self, mark: tuple[str, list[int], str, int]) -> None:
        """Forgets the tokens that were added since `mark` was taken, even if an addition was interrupted."""
        self.text, ids, self._shown, self._num_shown = mark
        self._ids = [*ids]

    def flush(self) -> None:
        """Adds the bytes that were held back because they might have been an incomplete character."""
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
    """Returns the token ids of every word, both at the start of a text and after a space, as vLLM does."""
    spelled: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        spelled.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            spelled.append(spaced)
    return [ids for ids in spelled if ids]
