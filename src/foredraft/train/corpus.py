"""Training text from JSON Lines files. The target's chat template renders every conversation.

A conversation that cannot be used is counted under the reason, and the counts are reported.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foredraft.core.errors import UserError
from foredraft.train.records import EXAMPLE, CannotUse, Conversation, conversations_of, text_of
from foredraft.train.rendering import Renderer

HELD_OUT_ONE_IN = 50
"""One in so many opening questions is held out for evaluation."""

MAX_PER_QUESTION = 4
"""Largest number of conversations with the same opening question. Files of sampled answers hold dozens of them."""

ANSWERS = ("own", "given")
"""The answers to learn from: answers that the target generates, or the answers in the files."""

ROOM = 32
"""Smallest number of tokens that is left for the target's own answer."""


class Prompt(NamedTuple):
    """A prompt for the target to answer or, with a mask, a whole text.

    Attributes:
        ids: token ids.
        held_out: whether the text is kept for evaluation. Texts with the same opening question have the same value.
        mask: whether the head learns from each token of a whole text; None for a prompt.
    """

    ids: list[int]
    held_out: bool
    mask: list[bool] | None = None


@dataclass
class Usage:
    """Counts of the conversations that were not used.

    Attributes:
        conversations: number of conversations in the files.
        left_out: number of conversations that are not used, by reason.
        in_part: number of conversations of which a part is not used, by reason.
    """

    conversations: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    in_part: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Returns one line for `left_out` and one for `in_part`, with the reasons. Empty counts give no line."""
        named = (("left out", self.left_out), ("used in part", self.in_part))
        return [
            f"{name}: {reasons.total():,} of {self.conversations:,} conversations: "
            + "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            for name, reasons in named
            if reasons
        ]


class Corpus(NamedTuple):
    """The prompts of the files, and the counts of the conversations that were not used."""

    prompts: list[Prompt]
    usage: Usage


def read_corpus(files: Sequence[Path], tokenizer: Any, seed: int, *, answers: str = "own", max_len: int) -> Corpus:
    """Reads the conversations of all files and renders them in the target's chat format. Their order depends on the seed.

    Args:
        answers: ``own``: prompts up to the last turn that is not the assistant's, for the target to answer. ``given``: whole
            conversations up to their last answer, with the template's mask of every assistant turn.
        max_len: largest number of tokens of prompt and answer together. Longer conversations are left out.

    Raises:
        ValueError: a file is missing or is not JSON Lines, a record has an unknown shape, or no conversation can be used.
    """
    every = [conversation for file in files for conversation in read_conversations(file, answers)]
    random.Random(seed).shuffle(every)
    usage, renderer, seen, kept = Usage(len(every)), Renderer(tokenizer), Counter(), []
    for conversation in every:
        try:
            if isinstance(conversation, CannotUse):
                raise conversation
            _check(conversation)
            if seen[conversation.question] == MAX_PER_QUESTION:
                raise CannotUse(f"beyond the first {MAX_PER_QUESTION} with the same opening question")
            ids, mask = renderer.given(conversation) if answers == "given" else (renderer.prompt(conversation), None)
            if len(ids) > (longest := max_len if mask else max_len - ROOM):
                raise CannotUse(f"longer than {longest} tokens" + ("" if mask else f" ({max_len} with the answer)"))
        except CannotUse as reason:
            usage.left_out[str(reason)] += 1
            continue
        seen[conversation.question] += 1
        usage.in_part.update(reason for reason in (conversation.unused, renderer.unused(conversation)) if reason)
        kept.append((conversation.question, ids, mask))
    if not kept:
        reasons = " ".join(usage.lines()) or "they hold no conversation"
        raise UserError(f"no training text in {', '.join(map(str, files))} ({reasons})", EXAMPLE)
    held_out = _held_out({question for question, _, _ in kept})
    return Corpus([Prompt(ids, question in held_out, mask) for question, ids, mask in kept], usage)


def _held_out(questions: set[str]) -> set[str]:
    """Chooses the held-out questions by a hash of their text: one in `HELD_OUT_ONE_IN`, and at least one."""
    hashes = {question: int(hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest(), 16) for question in questions}
    chosen = {question for question, value in hashes.items() if value % HELD_OUT_ONE_IN == 0}
    return chosen or {min(hashes, key=hashes.__getitem__)}


def _check(conversation: Conversation) -> None:
    """Checks a conversation for errors that no template reports.

    Raises:
        CannotUse: it has no user turn, or a turn is empty.
    """
    if conversation.question is None:
        raise CannotUse("with no user turn")
    for message in conversation.messages:
        empty = not text_of(message).strip() and "tool_calls" not in message
        if empty and message["role"] in ("user", "assistant"):
            raise CannotUse(f"with an empty {message['role']} turn")


def read_conversations(file: Path, answers: str = "own") -> Iterator[Conversation | CannotUse]:
    """Yields the conversations of a file, cut for `answers` (see `read_corpus`).

    For a record that cannot be used, it yields the reason as a `CannotUse`.

    Raises:
        ValueError: the file is missing or is not JSON Lines, or a record has an unknown shape.
    """
    for number, record in _records(file):
        try:
            conversations = conversations_of(record)
        except CannotUse as reason:
            yield reason
            continue
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = str(error) if isinstance(error, ValueError) else f"a record has an unknown shape ({error!r})"
            raise UserError(f"{file}, line {number}: {problem}", EXAMPLE) from None
        yield from _cut(conversations, answers)


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields the objects of a file with their line numbers. Blank lines are skipped."""
    if not file.is_file():
        raise UserError(f"no data file {str(file)!r}", "give JSON Lines files (.jsonl or .jsonl.gz)")
    open_it, number = gzip.open if file.suffix == ".gz" else open, 0
    try:
        with open_it(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"the line holds a {type(record).__name__}")
                yield number, record
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a JSON Lines file (line {max(number, 1)}: {error}): each line must be a JSON object", EXAMPLE
        ) from None


def _cut(conversations: Sequence[Conversation], answers: str) -> list[Conversation | CannotUse]:
    """Cuts the conversations of one record and drops duplicates.

    Each ends before the answer that the target generates, or after the last given answer.
    """
    given, cut = answers == "given", []
    for conversation in conversations:
        messages = conversation.messages
        others = [i for i, message in enumerate(messages) if (message["role"] == "assistant") == given]
        cut.append(conversation._replace(messages=messages[: others[-1] + 1] if others else []))
    if given:  # a path of a tree is used once, with all its answers
        cut = [short for i, short in enumerate(cut) if not any(_is_prefix(short, other) for other in cut[:i] + cut[i + 1 :])]
    empty = CannotUse("with no answer to learn from" if given else "with no user turn")
    return [
        conversation if conversation.messages else empty
        for i, conversation in enumerate(cut)
        if not conversation.messages or conversation not in cut[:i]
    ]


def _is_prefix(short: Conversation, other: Conversation) -> bool:
    """Whether `other` starts with the messages of `short` and has more of them."""
    length = len(short.messages)
    return len(other.messages) > length and other.messages[:length] == short.messages
