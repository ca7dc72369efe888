"""What a prompt may be, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, a list of token ids, or ``{"prompt_token_ids": [...]}`` or ``{"prompt": "..."}``."""


def encode(prompt: Prompt, tokenizer: Any) -> tuple[str | None, list[int]]:
    """The text of a prompt, if it has one, and its token ids.

    Raises:
        ValueError: it is empty, or a text where there is no tokenizer.
        TypeError: it is something else.
    """
    text, ids = None, prompt
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(ids, str):
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        if tokenizer is None:
            raise ValueError("this model has no tokenizer: give token ids, as a list or {'prompt_token_ids': [...]}")
        return ids, [int(one) for one in tokenizer(ids, verbose=False)["input_ids"]]  # we say if it is too long
    if not is_list(ids) or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise not_a_prompt(prompt)
    return text, [int(one) for one in ids]


def is_list(value: Any) -> bool:
    """Whether it is a list of something, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def not_a_prompt(given: Any) -> TypeError:
    """The error for a prompt of a wrong type."""
    return TypeError(
        f"a prompt is a str, a list of token ids (whole numbers) or {{'prompt_token_ids': [...]}}, got {given!r}. "
        "Use .tolist() on an array or a tensor"
    )
