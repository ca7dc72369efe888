"""The engines that benchmarks/peers.py compares: foredraft, and other engines on the same weights."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from foredraft import LLM, SamplingParams
from foredraft.bench.peers import Peer
from foredraft.bench.run import Contender, Ours
from foredraft.core.errors import UserError
from foredraft.kernels import cpu_flags
from foredraft.kernels.sets import library

PROMPT, CONTEXT, TOKENS, WARM_UP = 512, 64, 64, 4
MAX_LEN = PROMPT + CONTEXT + TOKENS
GGUF = {"bfloat16": "model-bf16.gguf", "float16": "model-f16.gguf"}
"""Names of the files that to_gguf.py writes into the directory of a model, by the type of their matrices."""

HAS_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
"""Features of which one makes products of bfloat16 fast. Without them vLLM runs in float32 too, which may be faster."""

REST_S = 0.3
"""Pause in seconds after a turn. Threads keep spinning for a while and would slow down the next engine."""


class Turn(NamedTuple):
    """Seconds of one turn: a token, and a prompt of `PROMPT` tokens."""

    token_s: float
    prompt_s: float


class Engine(Protocol):
    """What takes turns.

    Attributes:
        name: its name in the tables.
        dtype: type of its matrices.
        facts: what else is known of it: version, setting.
    """

    name: str
    dtype: str
    facts: dict[str, Any]

    def turn(self, prompts: Iterator[int]) -> Turn:
        """Measures once; `prompts` gives a seed for each prompt."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class Generating:
    """An engine that generates from token ids: foredraft, Transformers, vLLM."""

    def __init__(self, contender: Contender, dtype: str, vocab: int, facts: dict[str, Any]):
        self.name, self.dtype, self.facts = contender.name, dtype, facts
        self._contender, self._vocab = contender, vocab

    def turn(self, prompts: Iterator[int]) -> Turn:
        """Measures once, see `Engine`. The time of a prompt and its first token is taken off the time of the tokens."""
        self._seconds(next(prompts), CONTEXT, WARM_UP)
        first = self._seconds(next(prompts), CONTEXT, 1)
        whole = self._seconds(next(prompts), CONTEXT, 1 + TOKENS)
        return Turn((whole - first) / TOKENS, self._seconds(next(prompts), PROMPT, 1))

    def close(self) -> None:
        """Ends the process of another engine."""
        getattr(self._contender, "close", lambda: None)()

    def _seconds(self, seed: int, length: int, count: int) -> float:
        prompt = np.random.default_rng(seed).integers(self._vocab, size=length).tolist()
        outcome = self._contender.run([prompt], [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)])
        if outcome.num_tokens != count:
            raise RuntimeError(f"{self.name} generated {outcome.num_tokens} tokens instead of {count}")
        return outcome.seconds


class AllThreads(Peer):
    """A peer with the largest of its numbers of threads, which is the number of cores."""

    def _fastest(self, settings: list[dict[str, Any]], *_: Any) -> dict[str, Any]:
        return max(settings, key=lambda setting: setting["threads"])


class LlamaBench:
    """llama.cpp by its own `llama-bench`, a process for each test. It warms up itself."""

    name = "llama.cpp"

    def __init__(self, program: Path, file: Path, dtype: str):
        if not file.is_file():
            raise UserError(f"there is no file {file}", f"run python benchmarks/to_gguf.py --model {file.parent}")
        self.dtype, self.facts = dtype, {"system_info": system_info(program)}
        self._command = [str(program), "-m", str(file), "-t", str(torch.get_num_threads()), "-r", "1", "-o", "jsonl"]

    def turn(self, prompts: Iterator[int]) -> Turn:
        """Measures once, see `Engine`. The program chooses random tokens itself."""
        token_s = self._seconds("-p", "0", "-n", str(TOKENS), "-d", str(CONTEXT)) / TOKENS
        return Turn(token_s, self._seconds("-p", str(PROMPT), "-n", "0"))

    def close(self) -> None:
        """Nothing is held between turns."""

    def _seconds(self, *test: str) -> float:
        done = subprocess.run([*self._command, *test], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"llama-bench failed: {done.stderr.strip().splitlines()[-1:]}")
        row = json.loads(done.stdout.strip().splitlines()[-1])
        self.facts |= {name: row[name] for name in ("build_commit", "build_number", "n_threads", "flash_attn") if name in row}
        sleep(REST_S)
        return row["samples_ns"][0] / 1e9


def system_info(program: Path) -> str:
    """Returns what llama.cpp says of the instructions that it was built with; empty if its library is not beside `program`."""
    file = program.resolve().parent / "libllama.so"
    if not file.is_file():
        return ""
    print_info = ctypes.CDLL(str(file)).llama_print_system_info
    print_info.restype = ctypes.c_char_p
    return print_info().decode().strip(" |")


@contextmanager
def preloaded(files: str | None) -> Iterator[None]:
    """Sets LD_PRELOAD for the processes that a block starts."""
    before = os.environ.get("LD_PRELOAD")
    if files:
        os.environ["LD_PRELOAD"] = files
    try:
        yield
    finally:
        if files:
            os.environ.pop("LD_PRELOAD")
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def engines(model: Path, given: Any) -> Iterator[Engine]:
    """Starts the engines for a model. The first one is foredraft. Only llama.cpp runs beside it on a GGUF file."""
    is_gguf = model.suffix == ".gguf"
    how: dict[str, Any] = {"activations": given.activations} if is_gguf else {"dtype": given.dtype}
    if is_gguf and (model.parent / "tokenizer.json").is_file():  # that of the model that was quantised
        how["tokenizer"] = str(model.parent)
    llm = LLM(str(model), {"method": "ar"}, **how, device="cpu", max_num_seqs=1)
    code = library()
    facts = {"instruction_set": code.name if code else "torch", "weight_bytes": llm.target.num_weight_bytes}
    vocab = llm.target.config.vocab_size
    shown = f"{model.stem}, activations {given.activations}" if is_gguf else given.dtype
    yield Generating(Ours("foredraft", llm, SamplingParams(temperature=0.0)), shown, vocab, facts)
    if is_gguf:
        if given.llama_bench:
            yield LlamaBench(given.llama_bench, model, model.stem)
        return
    options: dict[str, Any] = {"device": "cpu", "max_len": MAX_LEN, "eos_ids": [], "tuning": []}
    start: Callable[..., Peer] = partial(AllThreads, model=str(model), draft_model=None, sampling=SamplingParams(), **options)
    for dtype in ("bfloat16", "float32"):
        peer = start("transformers", dtype=dtype)
        yield Generating(peer, dtype, vocab, peer.setting)
    if given.vllm_python:
        preload = ", ".join(Path(file).name for file in (given.vllm_preload or "").split(":") if file)
        for dtype in ("bfloat16",) if HAS_BFLOAT16 & cpu_flags() else ("bfloat16", "float32"):
            with preloaded(given.vllm_preload):
                peer = start("vllm", dtype=dtype, python=str(given.vllm_python))
            yield Generating(peer, dtype, vocab, {**peer.setting, "preloaded": preload})
    if given.llama_bench:
        yield from (LlamaBench(given.llama_bench, model / file, dtype) for dtype, file in GGUF.items())
