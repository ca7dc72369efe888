"""Prompts of a benchmark: from a file to token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foredraft.chat import check
from foredraft.llm import LLM

_KEYS = ("messages", "turns", "question", "prompt", "text")
"""Where a JSON line has its prompt, in order of preference; of `turns` the first counts."""

WARM_UP = (
    "Write a short story about a lighthouse keeper who finds a bottle with a letter.",
    "A baker sells 14 loaves in the morning and twice as many in the afternoon, at 3 euros each. How much does he earn?",
    "Write a Python function that counts how often each word occurs in a text.",
)
"""Prompts to warm up on and to choose the settings of other engines on; they are never reported."""


def read_prompts(path: Path, limit: int | None = None) -> list[Any]:
    """Prompts of a file: texts, lists of messages, or ``{"messages": [...], "tools": [...]}``.

    Args:
        path: ``.jsonl`` with one of messages (and tools), turns, question, prompt or text a line, or ``.txt`` with a prompt a
            line.
        limit: at most so many, taken at equal distances over the file, so that every category of it is there.

    Raises:
        ValueError: there is no such file, or a line has no prompt, or messages that are incomplete.
    """
    if not path.is_file():
        raise ValueError(f"no prompts: {str(path)!r} is not a file. Give a .jsonl or .txt file as --prompts")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"no prompts: {str(path)!r} is empty. Give a .jsonl or .txt file as --prompts")
    if limit is not None and limit < len(lines):
        lines = [lines[i * len(lines) // limit] for i in range(limit)]
    if path.suffix != ".jsonl":
        return lines
    return [_prompt_of(line, f"{path}, {number}") for number, line in enumerate(lines, start=1)]


def _prompt_of(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). Each line of a .jsonl file is one JSON object") from None
    for key in _KEYS:
        if isinstance(row, dict) and row.get(key):
            return _checked(row[key][0] if key == "turns" else row[key], row.get("tools"), where)
    raise ValueError(f"{where}: no prompt. Each line needs one of the keys {', '.join(_KEYS)}")


def _checked(prompt: Any, tools: Any, where: str) -> Any:
    if isinstance(prompt, str):
        return prompt
    try:
        check(prompt)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return {"messages": prompt, "tools": tools} if tools else prompt


def encode(llm: LLM, prompts: Sequence[Any], *, raw: bool) -> list[list[int]]:
    """Prompts as token ids, through the chat template where there is one (unless `raw`).

    Raises:
        ValueError: a conversation is given and the model has no chat template, or there is no tokenizer.
    """
    if llm.tokenizer is None:
        raise ValueError("this model has no tokenizer, which prompts in a file need. Copy the tokenizer's files beside it")
    has_template = bool(getattr(llm.tokenizer, "chat_template", None))
    found = []
    for prompt in prompts:
        if isinstance(prompt, str) and (raw or not has_template):
            found.append(list(llm.tokenizer(prompt)["input_ids"]))
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            given: Any = messages if isinstance(messages, dict) else {"messages": messages}
            found.append(list(llm.chat_prompt(**given)["prompt_token_ids"]))
    return found


def is_looping(token_ids: Sequence[int], size: int = 8) -> bool:
    """Whether fewer than 90 % of an output's 8-grams are distinct: it repeats itself, which any method drafts well."""
    grams = [tuple(token_ids[i : i + size]) for i in range(len(token_ids) - size + 1)]
    return bool(grams) and len(set(grams)) < 0.9 * len(grams)
