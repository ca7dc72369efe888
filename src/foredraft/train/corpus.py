"""Training text from JSON Lines files: every conversation as the target's own chat template renders it.

A conversation that cannot be used is counted under its reason, never dropped in silence.
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

from foredraft.train.records import EXAMPLE, CannotUse, Conversation, conversations_of, text_of
from foredraft.train.rendering import Renderer

HELD_OUT_ONE_IN = 50
MAX_PER_QUESTION = 4
"""Conversations used of one opening question: reports of sampled answers hold dozens of the same."""

ANSWERS = ("own", "given")
"""Whose answers are learned from: the target's own, or those in the files."""

ROOM = 32
"""Tokens that the target's own answer gets at least."""


class Prompt(NamedTuple):
    """Token ids of a prompt that the target is to answer or, with a mask, of a whole text.

    Attributes:
        held_out: kept for evaluation; equal opening questions always fall on the same side.
        mask: which tokens of a whole text are learned from; None where the target is to answer.
    """

    ids: list[int]
    held_out: bool
    mask: list[bool] | None = None


@dataclass
class Usage:
    """How many conversations of the files were used.

    Attributes:
        conversations: in the files.
        left_out: conversations that are not used, by reason.
        in_part: conversations of which a part is not used, by reason.
    """

    conversations: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    in_part: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """What was not used, with its reasons; nothing where all was used."""
        named = (("left out", self.left_out), ("used in part", self.in_part))
        return [
            f"{name}: {reasons.total():,} of {self.conversations:,} conversations: "
            + "; ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            for name, reasons in named
            if reasons
        ]


class Corpus(NamedTuple):
    """The prompts of the files, and what of the files was not used."""

    prompts: list[Prompt]
    usage: Usage


def read_corpus(files: Sequence[Path], tokenizer: Any, seed: int, *, answers: str = "own", max_len: int) -> Corpus:
    """The conversations of all files in the target's chat format, in an order that depends on the seed alone.

    Args:
        answers: ``own``: prompts up to the last turn that is not the assistant's, for the target to answer; ``given``: whole
            conversations up to their last answer, with the template's mask of every assistant turn.
        max_len: tokens of prompt and answer together; longer conversations are left out.

    Raises:
        ValueError: a file is missing or is no JSON Lines, a record of it has an unknown shape, or no conversation can be used.
    """
    every = [found for file in files for found in read_conversations(file, answers)]
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
        usage.in_part.update(one for one in (conversation.unused, renderer.unused(conversation)) if one)
        kept.append((conversation.question, ids, mask))
    if not kept:
        said = " ".join(usage.lines()) or "they hold no conversation"
        raise ValueError(f"no training text in {', '.join(map(str, files))} ({said}). {EXAMPLE}")
    held_out = _held_out({question for question, _, _ in kept})
    return Corpus([Prompt(ids, question in held_out, mask) for question, ids, mask in kept], usage)


def _held_out(questions: set[str]) -> set[str]:
    """One question in fifty, by a hash of it alone; at least one."""
    hashes = {question: int(hashlib.sha256(question.encode(errors="surrogatepass")).hexdigest(), 16) for question in questions}
    return {one for one, value in hashes.items() if value % HELD_OUT_ONE_IN == 0} or {min(hashes, key=hashes.__getitem__)}


def _check(conversation: Conversation) -> None:
    """Looks at what no template says.

    Raises:
        CannotUse: nobody asks anything, or a turn is empty.
    """
    if conversation.question is None:
        raise CannotUse("with no user turn")
    for message in conversation.messages:
        empty = not text_of(message).strip() and "tool_calls" not in message
        if empty and message["role"] in ("user", "assistant"):
            raise CannotUse(f"with an empty {message['role']} turn")


def read_conversations(file: Path, answers: str = "own") -> Iterator[Conversation | CannotUse]:
    """The conversations of a file, cut for `answers`, see `read_corpus`; or why a record cannot be used.

    Raises:
        ValueError: see `read_corpus`.
    """
    for number, record in _records(file):
        try:
            found = conversations_of(record)
        except CannotUse as reason:
            yield reason
            continue
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            said = str(error) if isinstance(error, ValueError) else f"a record has an unknown shape ({error!r})"
            raise ValueError(f"{file}, line {number}: {said}. {EXAMPLE}") from None
        yield from _cut(found, answers)


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a file with their line numbers; blank lines are skipped."""
    if not file.is_file():
        raise ValueError(f"no data file {str(file)!r}: give JSON Lines files (.jsonl or .jsonl.gz)")
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
        raise ValueError(
            f"{file} is no JSON Lines file (line {max(number, 1)}: {error}): one JSON object a line is asked for. {EXAMPLE}"
        ) from None


def _cut(found: Sequence[Conversation], answers: str) -> list[Conversation | CannotUse]:
    """Conversations of one record, each ending where the target answers or behind the last given answer, each once."""
    given, cut = answers == "given", []
    for conversation in found:
        messages = conversation.messages
        others = [i for i, message in enumerate(messages) if (message["role"] == "assistant") == given]
        cut.append(conversation._replace(messages=messages[: others[-1] + 1] if others else []))
    if given:  # a path of a tree is learned from once, with all its answers
        cut = [one for i, one in enumerate(cut) if not any(_goes_on(one, other) for other in cut[:i] + cut[i + 1 :])]
    empty = CannotUse("with no answer to learn from" if given else "with no user turn")
    return [one if one.messages else empty for i, one in enumerate(cut) if not one.messages or one not in cut[:i]]


def _goes_on(one: Conversation, other: Conversation) -> bool:
    """Whether `other` begins as `one` and is longer."""
    length = len(one.messages)
    return len(other.messages) > length and other.messages[:length] == one.messages
