"""Reads the training text: conversations from JSON Lines files, in the target's chat format."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT_ONE_IN = 100
MAX_PER_QUESTION = 4
"""Largest number of documents with the same question. The reports hold up to 29 answers to one question."""

LONGEST_ANSWER = 2000
"""Largest number of characters of an answer. A window of 512 tokens holds hardly more."""

Turns = list[str]
"""Texts of the user and the assistant in turn. The last text is the assistant's."""


def joined(*parts: str) -> str:
    """Joins the parts with empty lines. Blank parts are dropped."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def instruction(record: dict) -> list[Turns]:
    """Reads one question and answer, in the format of dolly and GPTeacher."""
    return [[joined(record["instruction"], record.get("context") or record.get("input") or ""), record["response"]]]


def seed_task(record: dict) -> list[Turns]:
    """Reads the first instance of a self-instruct seed task."""
    first = record["instances"][0]
    return [[joined(record["instruction"], first["input"]), first["output"]]]


def report(record: dict) -> list[Turns]:
    """Reads one answer of each sampling configuration of an OpenAssistant report, at most three answers."""
    outputs = [result["outputs"][0] for result in record["results"] if result["outputs"]]
    return [[record["prompt"], output] for output in outputs[:3]]


def tree(record: dict) -> list[Turns]:
    """Reads every path of a conversation tree that ends in an assistant's message."""
    paths, stack = [], [(record["prompt"], [])]
    while stack:
        node, before = stack.pop()
        path = [*before, node["text"]]
        if len(path) % 2 == 0:
            paths.append(path)
        stack.extend((reply, path) for reply in node.get("replies", []))
    return paths


def arena_bench(record: dict) -> list[Turns]:
    """Reads a real user's prompt and one model's answer."""
    return [[record["turns"][0], record["choices"][0]["turns"][0]]]


def arena_hard(record: dict) -> list[Turns]:
    """Reads a real user's prompt and Sky-T1's answer."""
    user, assistant = record["messages"][:2]
    return [[user["content"], assistant["content"]["answer"]]]


def dialogue(record: dict) -> list[Turns]:
    """Reads one dialogue in eight, up to an assistant turn. Its identifier decides both."""
    pick = hashed(record["dialogue_id"])
    turns = [turn["utterance"] for turn in record["turns"]]
    pairs = len(turns) // 2
    return [turns[: 2 * (1 + pick // 8 % pairs)]] if pairs and pick % 8 == 0 else []


class Source(NamedTuple):
    """The function that reads conversations from a record of a file, and the file's licence."""

    read: Callable[[dict], list[Turns]]
    licence: str


SOURCES = {
    "dolly_15k.jsonl.gz": Source(instruction, "CC BY-SA 3.0"),
    "gpteacher_codegen.jsonl.gz": Source(instruction, "MIT (GPT-4-written)"),
    "gpteacher_roleplay.jsonl.gz": Source(instruction, "MIT (GPT-4-written)"),
    "gsm8k_train.jsonl.gz": Source(lambda record: [[record["question"], record["answer"]]], "MIT"),
    "self_instruct_seed_tasks.jsonl.gz": Source(seed_task, "MIT"),
    "oasst_pythia12b_1k_prompts.jsonl.gz": Source(report, "Apache-2.0"),
    "oasst_lottery250_open_models.jsonl.gz": Source(report, "Apache-2.0 (answers by DeepSeek-V3-0324: MIT)"),
    "oasst_en_100_trees.jsonl.gz": Source(tree, "Apache-2.0"),
    "arena_bench_v1_open_models.jsonl.gz": Source(
        lambda record: [[record["turns"][0], record["choices"][0]["turns"][0]]], "Apache-2.0"
    ),
    "arena_hard_v2_sky_t1_32b.jsonl.gz": Source(arena_hard, "Apache-2.0"),
    "sgd_dialogues.jsonl.gz": Source(dialogue, "CC BY-SA 4.0"),
}


def hashed(text: str) -> int:
    """Returns a number that depends only on the text."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yields the records of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def read_documents(data: Path, seed: int) -> list[Turns]:
    """Reads every file of `SOURCES`. The order of the documents depends only on the seed.

    Raises:
        ValueError: a file is missing.
    """
    if missing := [name for name in SOURCES if not (data / name).is_file()]:
        raise ValueError(f"{data} lacks {', '.join(missing)}: give the folder of the training text as --data")
    documents = [
        turns
        for name, source in SOURCES.items()
        for record in read_jsonl(data / name)
        for turns in source.read(record)
        if all(turn.strip() for turn in turns)
    ]
    random.Random(seed).shuffle(documents)
    return capped(documents)


def capped(documents: list[Turns]) -> list[Turns]:
    """Keeps the first `MAX_PER_QUESTION` documents of each opening question."""
    seen: Counter[str] = Counter()
    kept = []
    for turns in documents:
        seen[turns[0]] += 1
        if seen[turns[0]] <= MAX_PER_QUESTION:
            kept.append(turns)
    return kept


class Example(NamedTuple):
    """A tokenised document.

    Attributes:
        prompt_ids: tokens of the prompt, up to the assistant's header.
        answer_ids: tokens of the answer in the data.
        held_out: whether it is kept for evaluation. Documents with the same first question have the same value.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    held_out: bool


def encode(turns: Turns, tokenizer: Any) -> Example:
    """Encodes a document with the target's chat template."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(messages[-1]["content"][:LONGEST_ANSWER], add_special_tokens=False)
    return Example(prompt_ids, answer_ids, hashed(turns[0]) % HELD_OUT_ONE_IN == 0)
