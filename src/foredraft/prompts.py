"""What a prompt may be, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from foredraft.errors import check_text, shown

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, a list of token ids, or ``{"prompt_token_ids": [...]}`` or ``{"prompt": "..."}``."""

_KEYS = ("prompt", "prompt_token_ids")


def encode(prompt: Prompt, tokenizer: Any) -> tuple[str | None, list[int]]:
    """The text of a prompt, if it has one, and its token ids.

    Raises:
        ValueError: it is empty, not valid text, or a text where there is no tokenizer.
        TypeError: it is something else.
    """
    text, ids = None, prompt
    if isinstance(prompt, Mapping):
        text, ids = _of_mapping(prompt)
    if isinstance(ids, str):
        if not ids:
            raise ValueError("the prompt is empty: give at least one character")
        check_text("the prompt", ids)
        if tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: copy its files (tokenizer.json, tokenizer_config.json) into the model's "
                "directory, or give token ids in Python, as generate([1, 2, 3])"
            )
        return ids, [int(one) for one in tokenizer(ids, verbose=False)["input_ids"]]  # we say if it is too long
    if not _is_ids(ids):
        raise not_a_prompt(prompt)
    return text, [int(one) for one in ids]


def _of_mapping(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Text and ids of a prompt that is a dictionary; the ids count where both are there."""
    for key, value in prompt.items() if set(_KEYS) & set(prompt) else ():
        if key not in _KEYS and value is not None:
            is_media = str(key).startswith(("multi_modal", "mm_"))
            why = "only text goes in, no images, audio or video" if is_media else "unknown key"
            raise TypeError(f"a prompt cannot have {shown(key)} ({why}). Allowed keys: {', '.join(_KEYS)}")
    text, ids = (prompt.get(key) for key in _KEYS)
    if ids is None:
        return (text if isinstance(text, str) else None), text if text is not None else prompt
    if not _is_ids(ids):
        raise TypeError(f"prompt_token_ids must be a list of token ids (whole numbers), got {shown(ids)}. 'prompt' takes text")
    if not isinstance(text, str | None):
        raise TypeError(f"'prompt' must be a str beside prompt_token_ids, got {shown(text)}. Leave one of them out")
    return text, ids


def _is_ids(value: Any) -> bool:
    return is_list(value) and all(isinstance(one, Integral) and not isinstance(one, bool) for one in value)


def is_list(value: Any) -> bool:
    """Whether it is a list of something, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def is_one_prompt(value: Any) -> bool:
    """Whether it is one prompt, and no list of them."""
    return isinstance(value, str | Mapping) or (is_list(value) and bool(value) and isinstance(value[0], Integral))


def not_a_prompt(given: Any) -> TypeError:
    """The error for a prompt of a wrong type."""
    advice = "Use .tolist() on an array or a tensor" if hasattr(given, "tolist") else "Give one of these, or a list of them"
    if isinstance(given, Mapping):
        advice = f"Allowed keys: {', '.join(_KEYS)}"
    return TypeError(
        f"a prompt is a str, a list of token ids (whole numbers) or {{'prompt_token_ids': [...]}}, got {shown(given)}. {advice}"
    )
