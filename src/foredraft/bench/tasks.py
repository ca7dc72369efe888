"""Reads the prompts of a benchmark from a file, and encodes them as token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foredraft.core.errors import UserError, check_text, shown, told
from foredraft.core.messages import check
from foredraft.llm import LLM

_KEYS = ("messages", "turns", "question", "prompt", "text")
"""Keys of a JSON line that may hold the prompt, in order of preference. Of `turns`, only the first is used."""

WARM_UP = (
    "Write a short story about a lighthouse keeper who finds a bottle with a letter.",
    "A baker sells 14 loaves in the morning and twice as many in the afternoon, at 3 euros each. How much does he earn?",
    "Write a Python function that counts how often each word occurs in a text.",
)
"""Prompts for the warm-up and for choosing the settings of other engines. They are never reported."""


def read_prompts(path: Path, limit: int | None = None) -> list[Any]:
    """Reads the prompts of a file: texts, lists of messages, or ``{"messages": [...], "tools": [...]}``.

    Args:
        path: a ``.jsonl`` file whose lines have one of the keys messages (and tools), turns, question, prompt or text; or a
            ``.txt`` file with a prompt per line.
        limit: largest number of prompts. They are taken at equal distances over the file, to cover all of its categories.

    Raises:
        ValueError: the file cannot be read or has another format, a line has no prompt, or messages are incomplete.
    """
    lines = [(number, line) for number, line in enumerate(_text_of(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"no prompts: {str(path)!r} is empty", _LOOKS)
    if limit is not None and limit < len(lines):
        lines = [lines[i * len(lines) // limit] for i in range(limit)]
    read = _prompt_of if path.suffix.lower() == ".jsonl" else _text_line
    return [read(line, f"{path}, line {number}") for number, line in lines]


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no prompts: {str(path)!r} is not a file", _LOOKS)
    if path.suffix.lower() not in _ENDINGS:
        raise UserError(f"no prompts: {str(path)!r} is neither a .jsonl nor a .txt file", _LOOKS)
    try:
        text = path.read_text(encoding="utf-8-sig")  # drops the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise UserError(f"no prompts: {str(path)!r} is not text in UTF-8 ({error.reason})", _LOOKS) from None
    except OSError as error:
        raise UserError(f"no prompts: {str(path)!r} cannot be read ({error.strerror})", _LOOKS) from None
    if "\0" in text:
        raise UserError(f"no prompts: {str(path)!r} is not text, since it contains null bytes", _LOOKS)
    return text


_ENDINGS = (".jsonl", ".txt")

_LOOKS = (
    'Give a .jsonl file with one object a line, such as {"prompt": "..."} or {"messages": [...]}, or a .txt file with one '
    "prompt a line"
)
"""Advice in error messages: the format of a file of prompts."""


def _text_line(line: str, where: str) -> str:
    return line.rstrip("\r")


def _prompt_of(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})", "Each line of a .jsonl file is one JSON object") from None
    for key in _KEYS:
        if isinstance(row, dict) and row.get(key):
            return _checked(row[key], key, row.get("tools"), where)
    raise UserError(f"{where}: no prompt", f"Each line needs one of the keys {', '.join(_KEYS)}")


def _checked(value: Any, key: str, tools: Any, where: str) -> Any:
    """Checks and returns the prompt in a value of a JSON line: a text, or messages."""
    if key == "messages":
        try:
            check(value)
        except (ValueError, TypeError) as error:
            message, hint = told(error)
            raise UserError(f"{where}: {message}", hint) from None
        return {"messages": value, "tools": tools} if tools else value
    text = value[0] if key == "turns" and isinstance(value, list) else value
    if not isinstance(text, str) or not text.strip() or (key == "turns" and not isinstance(value, list)):
        kind = "a list of texts" if key == "turns" else "a text"
        raise UserError(f"{where}: {key} must be {kind}, got {shown(value)}")
    check_text(f"{where}: {key}", text)
    return text


def encode(llm: LLM, prompts: Sequence[Any], *, raw: bool) -> list[list[int]]:
    """Encodes prompts as token ids. Texts go through the chat template if there is one, unless `raw`.

    Raises:
        ValueError: the model has no tokenizer, or a prompt is a conversation and the model has no chat template.
    """
    if llm.tokenizer is None:
        raise UserError(
            "this model has no tokenizer, which is needed to encode prompts", "Copy its files into the model's directory"
        )
    has_template = bool(getattr(llm.tokenizer, "chat_template", None))
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str) and (raw or not has_template):
            encoded.append(list(llm.tokenizer(prompt)["input_ids"]))
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            given: Any = messages if isinstance(messages, dict) else {"messages": messages}
            encoded.append(list(llm.chat_prompt(**given)["prompt_token_ids"]))
    return encoded


def encode_fitting(llm: LLM, prompts: Sequence[Any], max_tokens: int, *, raw: bool) -> list[list[int]]:
    """Encodes prompts, without those that do not fit in the model's context together with `max_tokens` new tokens.

    Raises:
        ValueError: no prompt fits, or as `encode`.
    """
    context = llm.max_model_len
    fitting = [ids for ids in encode(llm, prompts, raw=raw) if len(ids) + max_tokens <= context]
    if not fitting:
        raise UserError(
            f"all prompts are too long: a prompt and its {max_tokens} new tokens must fit in the context of {context} tokens",
            "Take shorter prompts or fewer tokens (--max-tokens)",
        )
    return fitting


def is_looping(token_ids: Sequence[int], size: int = 8) -> bool:
    """Returns whether an output repeats itself: fewer than 90 % of its 8-grams are distinct.

    Every method drafts such outputs well, so they are reported separately.
    """
    grams = [tuple(token_ids[i : i + size]) for i in range(len(token_ids) - size + 1)]
    return bool(grams) and len(set(grams)) < 0.9 * len(grams)
