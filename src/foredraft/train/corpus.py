"""Conversations from JSON Lines files of any of the usual shapes, as prompts in the target's chat format."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT_ONE_IN = 50
MAX_PER_QUESTION = 4
"""Records kept of one opening question: reports of sampled answers hold dozens of the same."""

_ASSISTANT = {"assistant", "gpt", "bot", "SYSTEM", "system", "model", "chatgpt"}
_USER = {"user", "human", "USER", "prompter"}

Turns = list[str]
"""User and assistant texts in turn, the user's first and last: what the target is to answer."""


class Prompt(NamedTuple):
    """What the target answers, as token ids.

    Attributes:
        held_out: kept for evaluation; equal opening questions always fall on the same side.
    """

    ids: list[int]
    held_out: bool


def read_prompts(files: Sequence[Path], tokenizer: Any, seed: int) -> list[Prompt]:
    """The prompts of all files in the target's chat format, in an order that depends on the seed alone.

    Raises:
        ValueError: a file is missing or is no JSON Lines, or a record of it has a shape that is not known.
    """
    every = [turns for file in files for turns in read_turns(file)]
    random.Random(seed).shuffle(every)
    if not every:
        raise ValueError(f"no prompt in {', '.join(map(str, files))}: give files with questions, see `foredraft train --help`")
    held_out = _held_out({turns[0] for turns in every})
    seen: Counter[str] = Counter()
    kept = []
    for turns in every:
        seen[turns[0]] += 1
        if seen[turns[0]] <= MAX_PER_QUESTION:
            kept.append(Prompt(encode(turns, tokenizer), turns[0] in held_out))
    return kept


def _held_out(questions: set[str]) -> set[str]:
    """One question in fifty, by a hash of it alone; at least one."""
    hashes = {question: int(hashlib.sha256(question.encode()).hexdigest(), 16) for question in questions}
    return {one for one, value in hashes.items() if value % HELD_OUT_ONE_IN == 0} or {min(hashes, key=hashes.__getitem__)}


def read_turns(file: Path) -> Iterator[Turns]:
    """The conversations of a file, up to a user's last words.

    Raises:
        ValueError: see `read_prompts`.
    """
    if not file.is_file():
        raise ValueError(f"no data file {str(file)!r}: give JSON Lines files (.jsonl or .jsonl.gz)")
    open_it = gzip.open if file.suffix == ".gz" else open
    try:
        with open_it(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                for turns in turns_of(record) if isinstance(record, dict) else ():
                    if turns and all(turn.strip() for turn in turns):
                        yield turns
    except KeyError as error:
        raise ValueError(f"{file}: {error.args[0]}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no JSON Lines file ({error}): one JSON object a line is asked for") from None


def turns_of(record: Mapping[str, Any]) -> list[Turns]:
    """The conversations of one record.

    Raises:
        KeyError: it has no keys that are known; the message says which are.
    """
    for key in ("messages", "conversations", "turns"):
        if isinstance(record.get(key), list):
            return [_alternating(record[key])]
    if "instruction" in record:
        return [[_joined(record["instruction"], record.get("context") or record.get("input") or "")]]
    for key in ("question", "prompt"):
        if isinstance(record.get(key), str):
            return [[record[key]]]
    if isinstance(record.get("prompt"), dict) and "text" in record["prompt"]:
        return _tree(record["prompt"])
    known = "messages, conversations, turns, instruction, question or prompt"
    raise KeyError(f"a record has the keys {', '.join(list(record)[:6])}, of which none is {known}")


def _alternating(messages: Sequence[Any]) -> Turns:
    """Texts of a list of messages, up to the last of the user; a list of plain strings is the user's alone, and the first
    counts."""
    if messages and isinstance(messages[0], str):
        return [messages[0]]
    turns: Turns = []
    for message in messages:
        role = message.get("role") or message.get("from") or message.get("speaker") or ""
        text = message.get("content") or message.get("value") or message.get("utterance") or ""
        text = text if isinstance(text, str) else str(text.get("answer", "")) if isinstance(text, dict) else ""
        if role in (_USER if len(turns) % 2 == 0 else _ASSISTANT):
            turns.append(text)
    return turns[: len(turns) - (len(turns) % 2 == 0)]


def _tree(root: Mapping[str, Any]) -> list[Turns]:
    """Every path of a conversation tree down to a user's message that was answered."""
    paths, stack = [], [(root, [])]
    while stack:
        node, before = stack.pop()
        path = [*before, node["text"]]
        if len(path) % 2 and node.get("replies"):
            paths.append(path)
        stack.extend((reply, path) for reply in node.get("replies", []))
    return paths


def _joined(*parts: str) -> str:
    return "\n\n".join(part.strip() for part in parts if part.strip())


def encode(turns: Turns, tokenizer: Any) -> list[int]:
    """The prompt in the target's chat format; without one, the last question as plain text."""
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.encode(turns[-1])
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)
