"""From token ids to text as it grows, and where a stop string cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one output, extended token by token; without a tokenizer it stays empty.

    Args:
        tokenizer: a Transformers tokenizer or None.
        stop_strings: strings that end the text.
        include_stop: whether the text keeps the stop string.
        skip_special_tokens: whether special tokens are left out.
    """

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), *, include_stop: bool = False, skip_special_tokens: bool = True
    ):
        self.text = ""
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._ids: list[int] = []
        fast = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
        self._fast = fast
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens) if fast is not None else None

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Appends a token. Returns the stop string that the text now holds, cut there; None if it holds none.

        The earliest stop string in the text wins; of several at one place the first in the list.
        """
        if self._tokenizer is None:
            return None
        self._ids.append(token_id)
        before = len(self.text)
        self.text += self._decode(token_id)
        return self._cut(before) if may_stop and len(self.text) > before else None

    def flush(self) -> None:
        """Adds what was held back because it might have been half a character."""
        if self._tokenizer is not None:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
            if whole.startswith(self.text):
                self.text = whole

    def _decode(self, token_id: int) -> str:
        if self._stream is not None:
            return self._stream.step(self._fast, token_id) or ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
        return "" if whole.endswith("\ufffd") else whole[len(self.text) :]

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
