"""Distil a small draft language model from a Llama-family chat target.

The student learns the target's whole next-token law, at every position of texts that the target wrote itself (sampled at
temperatures 0 to 1) and of the training texts. Each text is run through the target once: its final features are kept, and
the law is rebuilt from them with the target's head whenever a batch needs it.

    documents -> prompts -> continuations + target features (shards) -> student -> held-out acceptance -> --out

Everything lands in --work first. A run that was cut off goes on from the last shard and the last checkpoint.

Example:
    python recipes/distill_draft_lm.py --target ../shared/models/chat-14m --data ../shared/data/train \
        --out src/foredraft/bundled/draft-lm --work build/distill --generate-minutes 25 --minutes 45
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

# How cohorts of texts are made, in turn: sampled at a temperature, or the training text itself, teacher-forced (None).
# Sampled ones mostly at 1, the rest so that the drafter also meets greedy text, which loops. Forcing a text costs a third
# of sampling one.
WAYS = (1.0, None, 0.7, 1.0, None, 1.0, 0.0, None)
HELD_OUT_WAYS = (1.0, 0.0, None)
HELD_OUT_ONE_IN = 100
LONGEST_ANSWER = 2000  # characters: a window of 512 tokens holds few more
MAX_PER_QUESTION = 4  # the reports hold up to 29 answers to one question
PROMPT_WEIGHT = 0.1  # a user's words are never drafted; their positions only help the student to read
LOGITS_CHUNK = 256  # rows of fp32 logits at once: 4 MB at a vocabulary of 4096, so that they stay in the cache
ROOM = 64  # tokens that an answer gets at least
PREFILL_TOKENS = 4096  # positions in one pass over prompts: wider passes leave the cache and run at a third of the speed
MIN_LIVE_ROWS = 16  # below that a decoding batch is cut off: a row costs nearly as much as ten

LICENCES = {
    "arena_bench_v1_open_models": "Apache-2.0",
    "arena_hard_v2_sky_t1_32b": "Apache-2.0",
    "dolly_15k": "CC BY-SA 3.0",
    "gpteacher_codegen": "MIT (GPT-4-written)",
    "gpteacher_roleplay": "MIT (GPT-4-written)",
    "gsm8k_train": "MIT",
    "oasst_en_100_trees": "Apache-2.0",
    "oasst_lottery250_open_models": "Apache-2.0 (answers by DeepSeek-V3-0324: MIT)",
    "oasst_pythia12b_1k_prompts": "Apache-2.0",
    "self_instruct_seed_tasks": "MIT",
    "sgd_dialogues": "CC BY-SA 4.0",
}


# ---------------------------------------------------------------------------------------------------------- documents


class Document(NamedTuple):
    """A conversation whose last turn is the assistant's: alternating user and assistant texts."""

    source: str
    turns: list[str]


def read_jsonl(path: Path) -> Iterator[dict]:
    """Yields the records of a gzipped JSON Lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def joined(*parts: str) -> str:
    """Joins the parts that are not blank with an empty line."""
    return "\n\n".join(part.strip() for part in parts if part and part.strip())


def instruction_turns(record: dict) -> list[list[str]]:
    """One question and answer, as dolly and GPTeacher store them."""
    return [[joined(record["instruction"], record.get("context") or record.get("input") or ""), record["response"]]]


def seed_task_turns(record: dict) -> list[list[str]]:
    """The first instance of a self-instruct seed task."""
    first = record["instances"][0]
    return [[joined(record["instruction"], first["input"]), first["output"]]]


def report_turns(record: dict) -> list[list[str]]:
    """One answer of each sampling configuration of an OpenAssistant report, at most three."""
    outputs = [result["outputs"][0] for result in record["results"] if result["outputs"]]
    return [[record["prompt"], output] for output in outputs[:3]]


def tree_turns(record: dict) -> list[list[str]]:
    """Every path of a conversation tree that ends in an assistant's message."""
    paths, stack = [], [(record["prompt"], [])]
    while stack:
        node, before = stack.pop()
        path = [*before, node["text"]]
        if len(path) % 2 == 0:
            paths.append(path)
        stack.extend((reply, path) for reply in node.get("replies", []))
    return paths


def arena_bench_turns(record: dict) -> list[list[str]]:
    """A real user's prompt and one model's answer."""
    return [[record["turns"][0], record["choices"][0]["turns"][0]]]


def arena_hard_turns(record: dict) -> list[list[str]]:
    """A real user's prompt and Sky-T1's answer."""
    user, assistant = record["messages"][:2]
    return [[user["content"], assistant["content"]["answer"]]]


def dialogue_turns(record: dict) -> list[list[str]]:
    """A dialogue up to an assistant turn that its identifier picks, for one dialogue in eight."""
    pick = int(hashlib.sha256(record["dialogue_id"].encode()).hexdigest(), 16)
    turns = [turn["utterance"] for turn in record["turns"]]
    pairs = len(turns) // 2
    return [turns[: 2 * (1 + pick // 8 % pairs)]] if pairs and pick % 8 == 0 else []


READERS: dict[str, Callable[[dict], list[list[str]]]] = {
    "dolly_15k": instruction_turns,
    "gpteacher_codegen": instruction_turns,
    "gpteacher_roleplay": instruction_turns,
    "gsm8k_train": lambda record: [[record["question"], record["answer"]]],
    "self_instruct_seed_tasks": seed_task_turns,
    "oasst_pythia12b_1k_prompts": report_turns,
    "oasst_lottery250_open_models": report_turns,
    "oasst_en_100_trees": tree_turns,
    "arena_bench_v1_open_models": arena_bench_turns,
    "arena_hard_v2_sky_t1_32b": arena_hard_turns,
    "sgd_dialogues": dialogue_turns,
}


def read_documents(data: Path, seed: int) -> list[Document]:
    """Reads every known file of the folder, in an order that depends on the seed only.

    Raises:
        ValueError: if the folder holds none of the known files.
    """
    found = [(name, data / f"{name}.jsonl.gz") for name in READERS]
    documents = [
        Document(name, turns)
        for name, path in found
        if path.exists()
        for record in read_jsonl(path)
        for turns in READERS[name](record)
        if all(turn.strip() for turn in turns)
    ]
    if not documents:
        raise ValueError(f"{data} holds none of {', '.join(READERS)} (.jsonl.gz); point --data at the train folder")
    random.Random(seed).shuffle(documents)
    return capped(documents)


def capped(documents: list[Document]) -> list[Document]:
    """Keeps the first few documents of each opening question."""
    seen: Counter[str] = Counter()
    kept = []
    for document in documents:
        seen[document.turns[0]] += 1
        if seen[document.turns[0]] <= MAX_PER_QUESTION:
            kept.append(document)
    return kept


def held_out(document: Document) -> bool:
    """Whether the document is kept for evaluation; equal first questions always fall on the same side."""
    return int(hashlib.sha256(document.turns[0].encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


class Example(NamedTuple):
    """A tokenised document: the prompt up to the assistant's header, and the answer that the data gives."""

    prompt_ids: list[int]
    answer_ids: list[int]
    held_out: bool


def encode(documents: list[Document], tokenizer, max_prompt: int) -> list[Example]:
    """Applies the target's chat template; drops the prompts above `max_prompt` tokens."""
    examples = []
    for document in documents:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(document.turns)]
        text = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        answer = tokenizer.encode(messages[-1]["content"][:LONGEST_ANSWER], add_special_tokens=False)
        if len(prompt) <= max_prompt:
            examples.append(Example(prompt, answer, held_out(document)))
    return examples


# ------------------------------------------------------------------------------------------------- the target, batched


def head_shape(config: LlamaConfig) -> tuple[int, int, int]:
    """Heads, key-value heads and their width; a config may leave the last two to be worked out."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim or config.hidden_size // heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to `x [B, H, n, d]`; `cos` and `sin` are `[B, 1, n, d]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class BatchedLlama:
    """The target's decoder for wide batches on one core: fused projections, keys stored transposed.

    With one new token a row, `q @ K` on transposed keys is 1.7 times as fast in bf16 as scaled_dot_product_attention.
    """

    def __init__(self, model: LlamaForCausalLM, max_len: int) -> None:
        config = model.config
        self.heads, self.kv_heads, self.head_dim = head_shape(config)
        self.embedding, self.head = model.model.embed_tokens.weight, model.lm_head.weight
        self.norm, self.eps = model.model.norm.weight, config.rms_norm_eps
        self.layers = [self._fused(layer) for layer in model.model.layers]
        angles = torch.outer(torch.arange(max_len), model.model.rotary_emb.inv_freq.float()).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(self.head.dtype), angles.sin().to(self.head.dtype)

    @staticmethod
    def _fused(layer) -> dict[str, Tensor]:
        attention, mlp = layer.self_attn, layer.mlp
        return {
            "norm": layer.input_layernorm.weight,
            "qkv": torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            "out": attention.o_proj.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight,
        }

    def new_cache(self, rows: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Empty keys `[rows, kv, d, length]` and values `[rows, kv, length, d]` of each layer."""
        shape = (rows, self.kv_heads, length, self.head_dim)
        zeros = lambda: torch.zeros(shape, dtype=self.head.dtype)  # noqa: E731
        return [(zeros().transpose(2, 3).contiguous(), zeros()) for _ in self.layers]

    def forward(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]], start: int, pad: Tensor) -> Tensor:
        """Runs `ids [B, n]` behind the `start` columns already in the cache and returns features `[B, n, D]`.

        `pad [B]` counts the columns of left padding of each row; they are never attended to by the others.
        """
        end = start + ids.shape[1]
        columns = torch.arange(start, end)
        positions = (columns - pad[:, None]).clamp(min=0)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        keys = torch.arange(end)
        mask = (keys <= columns[:, None]) & (keys >= pad[:, None, None]) | (keys == columns[:, None])
        bias = torch.zeros(mask.shape, dtype=self.head.dtype).masked_fill_(~mask, -math.inf)[:, None]
        x = self.embedding[ids]
        for layer, (past_keys, past_values) in zip(self.layers, cache, strict=True):
            q, k, v = self._project(x, layer)
            past_keys[..., start:end] = rotate(k, cos, sin).transpose(2, 3)
            past_values[:, :, start:end] = v
            mixed = self._attend(rotate(q, cos, sin), past_keys[..., :end], past_values[:, :, :end], bias)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), layer["out"])
            hidden = F.linear(self._normed(x, layer["mlp_norm"]), layer["gate_up"])
            gate, up = hidden.chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return self._normed(x, self.norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _project(self, x: Tensor, layer: dict[str, Tensor]) -> tuple[Tensor, ...]:
        qkv = F.linear(self._normed(x, layer["norm"]), layer["qkv"])
        heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        group = self.heads // self.kv_heads
        if q.shape[2] > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
            return F.scaled_dot_product_attention(q, keys.transpose(2, 3), values, attn_mask=bias)
        folded = q.view(q.shape[0], self.kv_heads, group, self.head_dim)  # the group's queries share keys: one product
        scores = torch.bmm(folded.flatten(0, 1), keys.flatten(0, 1)).view(*folded.shape[:3], -1)
        probs = (scores * self.head_dim**-0.5 + bias).softmax(-1)
        return torch.bmm(probs.flatten(0, 1), values.flatten(0, 1)).view_as(q)


def sample(logits: Tensor, temperature: float) -> Tensor:
    """Draws one token a row from `logits [B, V]`; temperature 0 takes the most likely one."""
    if temperature == 0:
        return logits.argmax(-1)
    mass = (logits.float() / temperature).softmax(-1).cumsum(-1)
    drawn = torch.rand(len(mass), 1) * mass[:, -1:]
    return torch.searchsorted(mass, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def padded_left(texts: list[list[int]], width: int) -> Tensor:
    """Stacks the texts, with zeros before them."""
    return torch.tensor([[0] * (width - len(text)) + text for text in texts])


def spans(length: int, step: int) -> list[slice]:
    """Cuts a range into slices of at most `step`."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class Continued(NamedTuple):
    """Rows of input tokens with the target's features; row r counts from `starts[r]` to `ends[r]`."""

    ids: Tensor
    features: Tensor
    starts: Tensor
    ends: Tensor


@torch.inference_mode()
def continue_prompts(target: BatchedLlama, prompts: list[list[int]], temperature: float, limit: int, stop: int) -> Continued:
    """Samples a continuation of each prompt, up to `stop` or `limit` columns, keeping every feature on the way.

    Finished rows leave the batch a quarter at a time; the last few rows are cut off where they stand.
    """
    width = max(map(len, prompts))
    pad = torch.tensor([width - len(prompt) for prompt in prompts])
    ids = torch.zeros(len(prompts), limit, dtype=torch.long)
    ids[:, :width] = padded_left(prompts, width)
    features = torch.zeros(len(prompts), limit, target.head.shape[1], dtype=target.head.dtype)
    ends = torch.full((len(prompts),), limit)
    cache = target.new_cache(len(prompts), limit)
    for span in spans(len(prompts), max(1, PREFILL_TOKENS // width)):
        features[span, :width] = target.forward(ids[span, :width], [(k[span], v[span]) for k, v in cache], 0, pad[span])
    rows, last = torch.arange(len(prompts)), features[:, width - 1]
    for column in range(width, limit):
        token = sample(F.linear(last, target.head), temperature)
        ids[rows, column] = token
        ends[rows[(token == stop) & (ends[rows] == limit)]] = column
        live = ends[rows] == limit
        if live.sum() < min(MIN_LIVE_ROWS, len(prompts)):
            ends[rows[live]] = column
            break
        if live.float().mean() < 0.75:
            rows, token, cache = rows[live], token[live], [(k[live], v[live]) for k, v in cache]
        last = target.forward(token[:, None], cache, column, pad[rows])[:, 0]
        features[rows, column] = last
    return Continued(ids, features, pad, ends)


@torch.inference_mode()
def force_texts(target: BatchedLlama, texts: list[list[int]]) -> Continued:
    """Runs whole texts through the target, those of like length together, and keeps their features."""
    width = max(map(len, texts))
    ids, pad = padded_left(texts, width), torch.tensor([width - len(text) for text in texts])
    features = torch.zeros(*ids.shape, target.head.shape[1], dtype=target.head.dtype)
    order = pad.argsort()
    while len(order):
        first = int(pad[order[0]])
        block, order = order.split([n := min(len(order), max(1, PREFILL_TOKENS // (width - first))), len(order) - n])
        cache = target.new_cache(n, width - first)
        features[block, first:] = target.forward(ids[block, first:], cache, 0, pad[block] - first)
    return Continued(ids, features, pad, torch.full((len(texts),), width))


# ------------------------------------------------------------------------------------------------------------- shards


class Cohort(NamedTuple):
    """Examples of like length that are run together: sampled at `temperature`, or teacher-forced if it is None."""

    examples: list[Example]
    temperature: float | None
    held_out: bool


def cohorts(examples: list[Example], rows: int, window: int, seed: int) -> list[Cohort]:
    """Groups examples of like prompt length: first the held-out ones, in each of their ways, then the others."""
    rng = random.Random(seed)
    sides = [[example for example in examples if example.held_out is side] for side in (True, False)]
    held = [Cohort(group, way, True) for group in grouped(sides[0], rows) for way in HELD_OUT_WAYS]
    groups = grouped(sides[1], rows)
    rng.shuffle(groups)
    plan = held + [Cohort(group, WAYS[i % len(WAYS)], False) for i, group in enumerate(groups)]
    return [cohort._replace(temperature=None) if too_long(cohort, window) else cohort for cohort in plan]


def too_long(cohort: Cohort, window: int) -> bool:
    """Whether prompts leave so little of the window that sampling would not pay; such texts are teacher-forced."""
    return max(len(example.prompt_ids) for example in cohort.examples) > window - ROOM


def grouped(examples: list[Example], rows: int) -> list[list[Example]]:
    """Sorts runs of 24 groups by prompt length and cuts them up."""
    pools = [examples[span] for span in spans(len(examples), 24 * rows)]
    return [group for pool in pools for group in sliced(sorted(pool, key=lambda e: len(e.prompt_ids)), rows)]


def sliced(examples: list[Example], rows: int) -> Iterator[list[Example]]:
    """Cuts a list into groups of `rows`, fewer where the prompts are long."""
    while examples:
        take = max(8, min(rows, rows * 256 // max(1, len(examples[min(rows, len(examples)) - 1].prompt_ids))))
        yield examples[:take]
        examples = examples[take:]


def run_cohort(target: BatchedLlama, cohort: Cohort, window: int, stop: int) -> Continued:
    """Runs one cohort. Sampled texts end at the window, forced ones behind a long prompt a little later."""
    if cohort.temperature is None:
        texts = [(e.prompt_ids + e.answer_ids)[: max(window, len(e.prompt_ids) + ROOM)] for e in cohort.examples]
        return force_texts(target, texts)
    prompts = [example.prompt_ids for example in cohort.examples]
    return continue_prompts(target, prompts, cohort.temperature, window, stop)


def save_shard(path: Path, cohort: Cohort, continued: Continued) -> int:
    """Writes tokens (uint16), features (bf16 bits as uint16) and rows `(length, prompt length)`; returns answer tokens."""
    cuts = [slice(int(a), int(b)) for a, b in zip(continued.starts, continued.ends, strict=True)]
    rows = [(c.stop - c.start, len(e.prompt_ids)) for c, e in zip(cuts, cohort.examples, strict=True)]
    ids = torch.cat([continued.ids[r, c] for r, c in enumerate(cuts)])
    features = torch.cat([continued.features[r, c] for r, c in enumerate(cuts)])
    np.save(path.with_suffix(".ids.npy"), ids.numpy().astype(np.uint16))
    np.save(path.with_suffix(".features.npy"), features.view(torch.uint16).numpy())
    answers = sum(max(0, length - prompt) for length, prompt in rows)
    about = {"rows": rows, "temperature": cohort.temperature, "held_out": cohort.held_out, "answer_tokens": answers}
    path.with_suffix(".json").write_text(json.dumps(about))  # last: a shard without it does not count
    return answers


def generate_shards(target: BatchedLlama, plan: list[Cohort], args: argparse.Namespace, stop: int) -> None:
    """Runs cohorts in order until the time or the wanted number of tokens is used up; done shards are skipped."""
    began, answers, found = time.time(), 0, 0
    folder = args.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "complete").exists():
        return
    with progress_bar() as bar:
        task = bar.add_task("generate", total=args.tokens)
        for number, cohort in enumerate(plan):
            path = folder / f"{number:05d}"
            if path.with_suffix(".json").exists():
                answers += json.loads(path.with_suffix(".json").read_text())["answer_tokens"]
                found = answers
                continue
            if answers >= args.tokens or time.time() - began > 60 * args.generate_minutes:
                break
            torch.manual_seed(args.seed * 1_000_003 + number)
            answers += save_shard(path, cohort, run_cohort(target, cohort, args.window, stop))
            rate = (answers - found) / (time.time() - began)
            bar.update(task, completed=answers, description=f"generate {rate:.0f} tok/s")
    (folder / "complete").touch()


class Row(NamedTuple):
    """One text of a shard: views into the mapped files."""

    ids: np.ndarray
    features: np.ndarray
    prompt_len: int
    kind: str


def load_rows(folder: Path, *, held_out: bool) -> list[Row]:
    """Maps every finished shard of one side into memory."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        if about["held_out"] is not held_out:
            continue
        ids = np.load(path.with_suffix(".ids.npy"))
        features = np.load(path.with_suffix(".features.npy"), mmap_mode="r")
        kind = "text" if about["temperature"] is None else f"temperature_{about['temperature']:g}"
        start = 0
        for length, prompt_len in about["rows"]:
            span = slice(start, start + length)
            rows.append(Row(ids[span], features[span], prompt_len, kind))
            start += length
    return rows


class Batch(NamedTuple):
    """Right-padded inputs `[B, T]`, the target's features and a loss weight at each position."""

    ids: Tensor
    features: Tensor
    weights: Tensor


def collate(rows: list[Row], prompt_weight: float) -> Batch:
    """Pads rows on the right; causal attention then needs no mask."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    features = torch.zeros(len(rows), width, rows[0].features.shape[1], dtype=torch.bfloat16)
    weights = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length] = torch.from_numpy(row.ids.astype(np.int64))
        features[i, :length] = torch.from_numpy(np.array(row.features)).view(torch.bfloat16)
        weights[i, : row.prompt_len - 1] = prompt_weight
        weights[i, row.prompt_len - 1 : length] = 1.0  # the header's last token already scores the answer's first
    return Batch(ids, features, weights)


def batches(rows: list[Row], tokens: int, seed: int) -> Iterator[list[Row]]:
    """Batches of about `tokens` positions, of rows of like length, in an order that the seed decides; one epoch."""
    rng = random.Random(seed)
    order = rng.sample(rows, len(rows))
    groups: list[list[Row]] = []
    for start in range(0, len(order), 2048):
        group: list[Row] = []
        for row in sorted(order[start : start + 2048], key=lambda row: len(row.ids)):
            if group and (len(group) + 1) * len(row.ids) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        groups.append(group)
    rng.shuffle(groups)
    yield from groups


# ------------------------------------------------------------------------------------------------------------ student


def multiply_adds(config: LlamaConfig) -> int:
    """Multiply-adds of all matrices for one token, the head included, attention over the context not."""
    heads, kv_heads, head_dim = head_shape(config)
    per_layer = 2 * (heads + kv_heads) * head_dim + 3 * config.intermediate_size
    return config.hidden_size * (config.num_hidden_layers * per_layer + config.vocab_size)


def new_student(target: LlamaForCausalLM, args: argparse.Namespace) -> LlamaForCausalLM:
    """Builds the student; its embedding starts as the target's, projected on its main directions.

    Raises:
        ValueError: if the student costs more than an eighth of the target.
    """
    shared = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id", "rms_norm_eps", "rope_parameters")
    config = LlamaConfig(
        hidden_size=args.hidden, num_hidden_layers=args.layers, intermediate_size=args.ffn, head_dim=args.head_dim,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=True, **{key: getattr(target.config, key) for key in shared},
    )  # fmt: skip
    if 8 * multiply_adds(config) > multiply_adds(target.config):
        raise ValueError(f"{multiply_adds(config)} multiply-adds a token are over an eighth of the target's; lower --ffn")
    student = LlamaForCausalLM(config)
    student.set_attn_implementation("eager")  # forward and backward take half the time of the fused one on a CPU
    if args.init == "pca":
        embedding = target.lm_head.weight.float()
        directions = torch.linalg.svd(embedding, full_matrices=False).Vh[: args.hidden]
        student.lm_head.weight.data.copy_(embedding @ directions.T)
    return student


def chunk_loss(student_logits: Tensor, target_logits: Tensor, tv_share: float) -> tuple[Tensor, Tensor]:
    """Loss gradient and figures of a block of positions.

    With p the student's law and q the target's: the loss is (1 - s) KL(q || p) + s TV(p, q), and the acceptance rate of
    speculative sampling at draft temperature 1 is sum_x min(p, q) = 1 - TV.

    Returns:
        The gradient of each row's loss with respect to its logits `[n, V]`, and `(kl, acceptance)` `[2, n]`.
    """
    p, q = student_logits.softmax(-1), target_logits.softmax(-1)
    cross = torch.linalg.vecdot(q, target_logits - student_logits)
    kl = cross - log_normaliser(target_logits, q) + log_normaliser(student_logits, p)
    acceptance = torch.minimum(p, q).sum(-1)
    gradient = p - q
    if tv_share:
        short = p * (p < q)  # raising these tokens raises the acceptance
        gradient = torch.lerp(gradient, p * short.sum(-1, keepdim=True) - short, tv_share)
    return gradient, torch.stack((kl, acceptance))


def log_normaliser(logits: Tensor, probs: Tensor) -> Tensor:
    """log sum exp of each row, from the probabilities at hand: a third of the time of torch.logsumexp."""
    return logits.amax(-1) - probs.amax(-1).log()


class DistillLoss(torch.autograd.Function):
    """The loss of `chunk_loss` over many positions, computed and differentiated block by block."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target_logits: Callable, weights: Tensor, tv_share: float):
        """Takes `hidden [n, d]`, the student's head `[V, d]`, a function `slice -> [m, V]` and `weights [n]`."""
        share = weights / weights.sum()
        hidden16, head16 = hidden.bfloat16(), head.bfloat16()
        d_hidden, d_head, figures = torch.empty_like(hidden), torch.zeros_like(head), torch.zeros(2)
        for block in spans(len(hidden), LOGITS_CHUNK):
            logits = F.linear(hidden16[block], head16).float()
            gradient, rows = chunk_loss(logits, target_logits(block), tv_share)
            gradient = gradient.mul_(share[block, None]).bfloat16()
            d_hidden[block] = gradient @ head16
            d_head += gradient.T @ hidden16[block]
            figures += rows @ share[block]
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(figures)
        return (1 - tv_share) * figures[0] + tv_share * (1 - figures[1]), figures

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """Hands back the stored gradients."""
        scale, (d_hidden, d_head) = grad_outputs[0], ctx.saved_tensors
        return scale * d_hidden, scale * d_head, None, None, None


def student_hidden(student: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The student's final hidden states `[B, T, d]`, computed in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return student.model(input_ids=ids, use_cache=False).last_hidden_state


def distill_loss(student: LlamaForCausalLM, target_head: Tensor, batch: Batch, tv_share: float) -> tuple[Tensor, Tensor]:
    """Loss and figures `(kl, acceptance)` of one batch; positions of weight 0 are left out."""
    chosen = batch.weights > 0
    hidden, features = student_hidden(student, batch.ids), batch.features[chosen]
    target_logits = lambda block: F.linear(features[block], target_head).float()  # noqa: E731
    return DistillLoss.apply(hidden[chosen].float(), student.lm_head.weight, target_logits, batch.weights[chosen], tv_share)


@torch.no_grad()
def batch_figures(student: LlamaForCausalLM, target_head: Tensor, batch: Batch) -> Tensor:
    """Sums over the answers' positions: `(kl, acceptance, agreement of the most likely token, positions)`."""
    hidden = student_hidden(student, batch.ids)[batch.weights > 0].bfloat16()
    features, head = batch.features[batch.weights > 0], student.lm_head.weight.bfloat16()
    sums = torch.zeros(4)
    for block in spans(len(hidden), LOGITS_CHUNK):
        p, q = F.linear(hidden[block], head).float(), F.linear(features[block], target_head).float()
        agree = (p.argmax(-1) == q.argmax(-1)).sum()
        sums += torch.stack((*chunk_loss(p, q, 0.0)[1].sum(-1), agree, torch.tensor(len(p))))
    return sums


def evaluate(student: LlamaForCausalLM, target_head: Tensor, rows: list[Row], tokens: int) -> dict[str, dict]:
    """Held-out means over the answers' positions, for each kind of text."""
    means = {}
    for kind in sorted({row.kind for row in rows}):
        chosen = [row for row in rows if row.kind == kind]
        groups = [collate(group, prompt_weight=0.0) for group in batches(chosen, tokens, seed=0)]
        sums = torch.stack([batch_figures(student, target_head, group) for group in groups]).sum(0)
        kl, acceptance, agreement = (round(x, 4) for x in (sums[:3] / sums[3]).tolist())
        means[kind] = {"kl": kl, "acceptance": acceptance, "top1_agreement": agreement, "positions": int(sums[3])}
    return means


# ----------------------------------------------------------------------------------------------------------- training


def optimizers(student: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; each group remembers its peak rate."""
    matrices = [p for p in student.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in student.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": [student.lm_head.weight], "lr": args.embedding_lr}, {"params": norms, "lr": args.embedding_lr}],
        betas=(0.9, 0.98), weight_decay=0.0,
    )  # fmt: skip
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01)
    for group in adam.param_groups + muon.param_groups:
        group["peak"] = group["lr"]
    return [adam, muon]


def learning_rate(done: float) -> float:
    """Factor of the peak rate at a share `done` of the run: 2 % warm-up, then a cosine to zero."""
    return min(1.0, done / 0.02 + 0.01) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class Run:
    """What a checkpoint must hold besides the weights."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    figures: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __str__(self) -> str:
        """The line beside the progress bar."""
        return f"step {self.step} kl {self.figures[0]:.3f} acceptance {self.figures[1]:.3f}"

    def done(self, args: argparse.Namespace) -> float:
        """The share of the run behind us, in steps where --steps is given and in time otherwise."""
        return self.step / args.steps if args.steps else self.seconds / (60 * args.minutes)


def train_step(student, target_head: Tensor, batch: Batch, opts: list, run: Run, args: argparse.Namespace) -> None:
    """One update; moves the running figures of `run` along."""
    done = run.done(args)
    loss, figures = distill_loss(student, target_head, batch, args.tv_share if done > args.tv_from else 0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(done)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    keep = min(0.98, run.step / (run.step + 1))
    run.figures = [keep * old + (1 - keep) * new for old, new in zip(run.figures, figures.tolist(), strict=True)]
    run.step, run.batch, run.tokens = run.step + 1, run.batch + 1, run.tokens + int((batch.weights > 0).sum())


def endless(rows: list[Row], run: Run, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Epoch after epoch of batches, from where `run` stands."""
    while True:
        epoch = list(batches(rows, args.batch_tokens, args.seed + run.epoch))
        yield from epoch[run.batch :]
        run.epoch, run.batch = run.epoch + 1, 0


def train(student, target_head: Tensor, rows: list[Row], args: argparse.Namespace, on_checkpoint: Callable) -> Run:
    """Trains until --steps or --minutes, from the checkpoint in --work if there is one."""
    opts, run, path = optimizers(student, args), Run(), args.work / "checkpoint.pt"
    if path.exists():
        run = restore(path, student, opts)
    saved = run.seconds
    with progress_bar() as bar:
        task = bar.add_task("train", total=1.0)
        for group in endless(rows, run, args):
            if run.done(args) >= 1:
                break
            began = time.time()
            train_step(student, target_head, collate(group, PROMPT_WEIGHT), opts, run, args)
            run.seconds += time.time() - began
            bar.update(task, completed=run.done(args), description=str(run))
            if run.seconds - saved > 60 * args.checkpoint_minutes:
                checkpoint(path, student, opts, run)
                on_checkpoint(student, run)
                saved = run.seconds
    checkpoint(path, student, opts, run)
    return run


def checkpoint(path: Path, student: LlamaForCausalLM, opts: list, run: Run) -> None:
    """Writes the checkpoint beside the old one and then over it, so that a kill never leaves half a file."""
    state = {"student": student.state_dict(), "optimizers": [o.state_dict() for o in opts], "run": vars(run)}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def restore(path: Path, student: LlamaForCausalLM, opts: list) -> Run:
    """Loads a checkpoint into the student and its optimizers."""
    state = torch.load(path, weights_only=True)
    student.load_state_dict(state["student"])
    for optimizer, saved in zip(opts, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Run(**state["run"])


# ------------------------------------------------------------------------------------------------------------- output


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command_line(args: argparse.Namespace) -> str:
    """The command that makes such weights again: every option that has a say in them."""
    options = {k.replace("_", "-"): v for k, v in vars(args).items() if v is not None and k not in ("work", "stage")}
    return "python recipes/distill_draft_lm.py " + " ".join(f"--{k} {v}" for k, v in options.items())


def count_tokens(folder: Path) -> dict[str, int]:
    """Answer tokens in the shards, by kind; held-out ones apart."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        kind = "teacher_forced" if about["temperature"] is None else f"temperature_{about['temperature']:g}"
        key = f"held_out_{kind}" if about["held_out"] else kind
        counts[key] = counts.get(key, 0) + about["answer_tokens"]
    return counts


def export(student: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Saves a bf16 copy in the Hugging Face layout and returns it as a user would load it."""
    copy = LlamaForCausalLM(student.config)
    copy.load_state_dict(student.state_dict())
    config = student.config
    copy.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    copy.bfloat16().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner only
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)


def provenance(args: argparse.Namespace, run: Run, target: LlamaForCausalLM, student: LlamaForCausalLM, figures: dict) -> dict:
    """Everything needed to say where the weights come from."""
    ratio = multiply_adds(target.config) / multiply_adds(student.config)
    files = {f"{n}.jsonl.gz": LICENCES[n] for n in READERS if (args.data / f"{n}.jsonl.gz").exists()}
    return {
        "what": "draft language model, distilled from the target's full next-token laws",
        "command": command_line(args),
        "commit": None,
        "target": args.target.name,
        "target_sha256": sha256(args.target / "model.safetensors"),
        "parameters": student.num_parameters(),
        "multiply_adds_per_token": multiply_adds(student.config),
        "multiply_adds_target_to_draft": round(ratio, 2),
        "data_files": files,
        "answer_tokens": count_tokens(args.work / "shards"),
        "steps": run.step,
        "epochs": run.epoch + 1,
        "tokens_seen": run.tokens,
        "train_minutes": round(run.seconds / 60, 1),
        "final_train": dict(zip(("kl", "acceptance"), (round(x, 4) for x in run.figures), strict=True)),
        "held_out": figures,
        "seed": args.seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"CPU, {torch.get_num_threads()} thread(s), bf16",
        "weights_licence": "Apache-2.0",
    }


def save_all(args: argparse.Namespace, run: Run, target, student, rows: list[Row]) -> dict:
    """Exports the student, evaluates the exported weights on the held-out rows, writes provenance.json."""
    loaded = export(student, args.out)
    figures = evaluate(loaded, target.lm_head.weight, rows, args.batch_tokens)
    path = args.out / "provenance.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    about = provenance(args, run, target, student, figures) | {k: old[k] for k in ("tried",) if k in old}
    path.write_text(json.dumps(about, indent=1) + "\n")
    return figures


def progress_bar() -> Progress:
    """A bar with the description that the loop keeps up to date."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder of the target (Hugging Face layout)")
    add("--data", type=Path, required=True, help="folder of the training text (.jsonl.gz)")
    add("--out", type=Path, required=True, help="folder that gets the draft model")
    add("--work", type=Path, default=Path("build/distill"), help="folder for shards and the checkpoint")
    add("--tokens", type=int, default=3_000_000, help="answer tokens to capture")
    add("--generate-minutes", type=float, default=25.0, help="time limit of the capture")
    add("--window", type=int, default=512, help="longest sampled text, in tokens")
    add("--max-prompt", type=int, default=1024, help="longer prompts are left out")
    add("--rows", type=int, default=160, help="texts sampled together")
    add("--minutes", type=float, default=45.0, help="training time")
    add("--steps", type=int, help="training steps, in place of --minutes")
    add("--batch-tokens", type=int, default=8192, help="positions in a batch, padding included")
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=2)
    add("--ffn", type=int, default=512)
    add("--heads", type=int, default=3)
    add("--kv-heads", type=int, default=1)
    add("--head-dim", type=int, default=64)
    add("--init", choices=("pca", "random"), default="pca", help="start of the embedding")
    add("--muon-lr", type=float, default=0.04)
    add("--embedding-lr", type=float, default=0.006)
    add("--tv-share", type=float, default=0.5, help="share of total variation in the loss, late in training")
    add("--tv-from", type=float, default=0.6, help="the share of the run after which --tv-share holds")
    add("--checkpoint-minutes", type=float, default=5.0)
    add("--stage", choices=("all", "capture"), default="all", help="capture stops before the training")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Documents, shards, student, held-out figures."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    target = LlamaForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    if not (args.work / "shards" / "complete").exists():
        examples = encode(read_documents(args.data, args.seed), tokenizer, args.max_prompt)
        plan = cohorts(examples, args.rows, args.window, args.seed)
        generate_shards(BatchedLlama(target, max(args.window, args.max_prompt + ROOM)), plan, args, tokenizer.eos_token_id)
    if args.stage == "capture":
        return
    torch.manual_seed(args.seed)
    student = new_student(target, args)
    train_rows, eval_rows = (load_rows(args.work / "shards", held_out=side) for side in (False, True))
    report = lambda student, run: print(run.step, save_all(args, run, target, student, eval_rows), flush=True)  # noqa: E731
    run = train(student, target.lm_head.weight, train_rows, args, report)
    report(student, run)


if __name__ == "__main__":
    main()
