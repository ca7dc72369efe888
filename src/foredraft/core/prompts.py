"""Accepted forms of a prompt, their conversion to token ids, and the sampling parameters that go with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from foredraft.core.errors import UserError, UserTypeError, check_text, shown
from foredraft.core.params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, a list of token ids, or ``{"prompt_token_ids": [...]}`` or ``{"prompt": "..."}``."""

Params = SamplingParams | Sequence[SamplingParams] | None
"""Sampling parameters of a call: one for all prompts, or one per prompt. None takes the defaults of the model."""

_KEYS, _SALT = ("prompt", "prompt_token_ids"), "cache_salt"
"""Keys of a prompt that is a dictionary. ``cache_salt`` is optional: requests share prefixes only within one salt."""


def encode(prompt: Prompt, tokenizer: Any) -> tuple[str | None, list[int]]:
    """Returns the text of a prompt (None if it has none) and its token ids.

    Raises:
        ValueError: the prompt is empty or not valid text, or it is text and there is no tokenizer.
        TypeError: the prompt has none of the accepted forms.
    """
    text, ids = None, prompt
    if isinstance(prompt, Mapping):
        text, ids = _of_mapping(prompt)
    if isinstance(ids, str):
        if not ids:
            raise UserError("the prompt is empty", "give at least one character")
        check_text("the prompt", ids)
        if tokenizer is None:
            raise UserError(
                "this model has no tokenizer",
                "copy its files (tokenizer.json, tokenizer_config.json) into the model's directory, or give token ids in "
                "Python, as in generate([1, 2, 3])",
            )
        token_ids = tokenizer(ids, verbose=False)["input_ids"]  # not verbose, since the engine checks the length itself
        return ids, [int(token_id) for token_id in token_ids]
    if not _is_ids(ids):
        raise not_a_prompt(prompt)
    return text, [int(token_id) for token_id in ids]


def _of_mapping(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """Returns text and ids of a prompt that is a dictionary. If it has both, the ids are used."""
    for key, value in prompt.items() if set(_KEYS) & set(prompt) else ():
        if key not in (*_KEYS, _SALT) and value is not None:
            is_media = str(key).startswith(("multi_modal", "mm_"))
            why = "only text is supported, no images, audio or video" if is_media else "unknown key"
            raise UserTypeError(f"a prompt cannot have {shown(key)} ({why})", f"Allowed keys: {', '.join((*_KEYS, _SALT))}")
    text, ids = (prompt.get(key) for key in _KEYS)
    if ids is None:
        return (text if isinstance(text, str) else None), text if text is not None else prompt
    if not _is_ids(ids):
        raise UserTypeError(
            f"prompt_token_ids must be a list of token ids (whole numbers), got {shown(ids)}",
            "Convert an array or a tensor with .tolist()" if hasattr(ids, "tolist") else "Give text as 'prompt'",
        )
    if not isinstance(text, str | None):
        raise UserTypeError(f"'prompt' must be a str if prompt_token_ids is given, got {shown(text)}", "Leave one of them out")
    return text, ids


def salt_of(prompt: Prompt) -> str | None:
    """Returns the cache salt of a prompt, or None.

    Raises:
        TypeError: it is not a text.
    """
    salt = prompt.get(_SALT) if isinstance(prompt, Mapping) else None
    if not isinstance(salt, str | None):
        raise UserTypeError(f"{_SALT} must be a str, got {shown(salt)}")
    return salt


def _is_ids(value: Any) -> bool:
    return is_list(value) and all(issubclass(kind, Integral) and kind is not bool for kind in set(map(type, value)))


def is_list(value: Any) -> bool:
    """Whether a value is a sequence other than text or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Returns a list of prompts. One prompt becomes a list of one.

    Raises:
        TypeError: it is neither a prompt nor a list of prompts.
    """
    is_one = isinstance(prompts, str | Mapping) or (is_list(prompts) and len(prompts) > 0 and isinstance(prompts[0], Integral))
    if not is_one and not is_list(prompts):
        raise not_a_prompt(prompts)
    return [prompts] if is_one else list(prompts)  # type: ignore[list-item, return-value]


def with_params(
    prompts: Sequence[Prompt], given: Params, default: Callable[[Prompt], SamplingParams]
) -> list[tuple[Prompt, SamplingParams]]:
    """Returns every prompt with its sampling parameters.

    Args:
        given: one `SamplingParams` for all prompts, or one per prompt. None takes `default` of each prompt.

    Raises:
        ValueError: the numbers of prompts and of parameters differ.
        TypeError: something other than sampling parameters is given.
    """
    if given is None:
        given = [default(prompt) for prompt in prompts]
    if isinstance(given, SamplingParams):
        given = [given] * len(prompts)
    if not is_list(given) or not all(isinstance(params, SamplingParams) for params in given):
        raise UserTypeError(f"sampling_params must be a SamplingParams or a list of them, got {shown(given)}")
    if len(given) != len(prompts):
        raise UserError(
            f"got {len(prompts)} prompts but {len(given)} sampling_params", "give one for all prompts, or one per prompt"
        )
    return list(zip(prompts, given, strict=True))


def not_a_prompt(given: Any) -> UserTypeError:
    """Returns the error for a prompt of a wrong type."""
    advice = (
        "Convert an array or a tensor with .tolist()" if hasattr(given, "tolist") else "Give one of these, or a list of them"
    )
    if isinstance(given, Mapping):
        advice = f"Allowed keys: {', '.join(_KEYS)}"
    return UserTypeError(
        f"a prompt is a str, a list of token ids (whole numbers) or {{'prompt_token_ids': [...]}}, got {shown(given)}", advice
    )
