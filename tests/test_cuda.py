"""On a CUDA device, by `pytest -m gpu`: what is drafted there, by graphs too, is what plain decoding gives on a CPU."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from foredraft import LLM, SamplingParams
from foredraft.cache.blocks import BLOCK, num_blocks
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from test_batched import given_at, is_close
from test_isolation import check_empty, run, tokens_of
from test_schedules import QUIET, Script, check_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLAIN: dict[str, Any] = {"method": "ar"}
METHODS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "fspad, dynamic": {"method": "fspad", "tree": "dyspec", "num_speculative_tokens": 12},
    "eagle, levels": {"method": "eagle", "tree": "topk", "num_speculative_tokens": 12},
    "ctc": {"method": "ctc", "num_speculative_tokens": 12},
    "lm": {"method": "lm", "tree": "dyspec", "num_speculative_tokens": 12},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
PROMPTS = ["Write a poem about the sea.", "What is 17 times 3?", "Name three animals and say what they eat."]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def ids_of(llm: LLM) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, GREEDY)]


@cache
def expected() -> list[list[int]]:
    return ids_of(LLM(speculative_config=PLAIN, dtype="float64", device="cpu"))


@cache
def on_cuda() -> LLM:
    return LLM(speculative_config=PLAIN, dtype="float64", device="cuda", max_num_seqs=2)


@pytest.mark.parametrize("name", METHODS)
def test_greedy_output_is_that_of_a_cpu(name: str) -> None:
    llm = on_cuda().with_speculation(METHODS[name])
    for _ in range(3):  # graphs are captured on the way
        assert ids_of(llm) == expected()


def test_graphs_outlive_the_pools_that_they_were_captured_on() -> None:
    """One model, one engine after another; what the last one left is given to others and written over."""
    for name in [*METHODS, *METHODS]:
        llm = on_cuda().with_speculation(METHODS[name])
        assert ids_of(llm) == expected(), name
        del llm
        gc.collect()
        left = [torch.randint(1 << 40, (1 << power,), device="cuda") for power in range(2, 16) for _ in range(8)]
        del left


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_verdicts_are_those_of_the_rule(dtype: torch.dtype) -> None:
    """The batched rule on the device against the rule of one tree on a CPU; numbers differ beyond rounding never."""
    for number in range(20):
        given = given_at(number, 200, torch.float64 if dtype == torch.float64 else torch.float32)
        given.logits = given.logits.to(dtype)
        alone = given.alone()
        given.logits = given.logits.cuda()
        found = given.batched().verdicts
        given.logits = given.logits.cpu()
        for b, (mine, theirs) in enumerate(zip(found, alone, strict=True)):
            assert mine == theirs or is_close(given, b), f"tree {b} of batch {number}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_transfers_no_logits(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as a row of logits goes from the device to the host."""
    given = given_at(1, 50)
    given.sampling = [SamplingParams(temperature=temperature)] * 50
    given.logits, expected = given.logits.cuda(), given.batched().verdicts
    largest, move = [0], torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        largest[0] = max(largest[0], tensor.numel())
        return move(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    assert given.batched().verdicts == expected
    assert largest[0] == 3 * 50


# --- Several requests

SAMPLED = SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True)
many = pytest.mark.parametrize("name", ["plain", "fspad, dynamic", "lm", "suffix"])


def engine_of(name: str, options: EngineOptions | None = None, blocks: int = 60) -> Engine:
    """An engine of its own on the model of `on_cuda`."""
    llm = on_cuda().with_speculation(METHODS[name])
    parts = llm.plan.engine_options() if llm.plan else {}
    common = {"max_model_len": 160, "eos_ids": llm.eos_ids, "tokenizer": llm.tokenizer}
    return Engine(llm.target, options=options, num_kv_blocks=blocks, **common, **parts)


def texts(count: int, length: int) -> list[list[int]]:
    return np.random.default_rng(6).integers(5, 200, size=(count, length)).tolist()


@many
def test_random_schedules(name: str) -> None:
    """Requests that join, leave, are aborted and preempted, share prefixes and are cut into chunks: see test_schedules."""
    quiet = engine_of(name, QUIET)
    for number in range(4):
        rng = np.random.default_rng([number, *name.encode()])
        longest = texts(2, 100)
        prompts = [*longest, longest[0][:49] + longest[1][:30], longest[0][:64] + longest[1][:20]]
        options = EngineOptions(max_num_seqs=int(rng.integers(1, 6)), max_num_batched_tokens=int(rng.choice([16, 50, 512])))
        script = Script(engine_of(name, options, num_blocks(160 + 16) + 3), prompts, rng, most_tokens=24)
        script.run(events=20)
        check_tokens(script, quiet, has_equal_bits=False)


@many
@pytest.mark.parametrize("sampling", [replace(SAMPLED, temperature=0.0), SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_equal_with_prefixes_preemptions_and_neighbours(name: str, sampling: SamplingParams) -> None:
    [text, other], engine, quiet = texts(2, 2 * BLOCK + 9), engine_of(name), engine_of(name, QUIET)
    alone = [quiet.add_request(None, prompt, sampling) for prompt in (text, other)]
    run(quiet)
    first = engine.add_request(None, text, sampling)
    run(engine)
    again, beside = (engine.add_request(None, prompt, sampling) for prompt in (text, other))
    while len(beside.sequences[0].output_ids) < 10:
        engine.step()
    engine.scheduler.preempt(beside.sequences[0])
    run(engine)
    assert again.output().num_cached_tokens == 2 * BLOCK
    assert tokens_of(first) == tokens_of(again) == tokens_of(alone[0])
    assert tokens_of(beside) == tokens_of(alone[1])


@many
def test_a_seed_decides_the_tokens(name: str) -> None:
    [text], found = texts(1, 20), []
    for seed in (5, 5, 6):
        engine = engine_of(name)
        found.append(engine.add_request(None, text, replace(SAMPLED, seed=seed)))
        run(engine)
    assert tokens_of(found[0]) == tokens_of(found[1]) != tokens_of(found[2])


@many
def test_a_request_that_fails_ends_alone(name: str) -> None:
    """All tokens are forbidden for the one in the middle."""
    engine, quiet, prompts = engine_of(name), engine_of(name, QUIET), texts(3, 20)
    banned = replace(SAMPLED, logit_bias=dict.fromkeys(range(engine.target.vocab_size), -np.inf))
    requests = [engine.add_request(None, prompt, banned if i == 1 else SAMPLED) for i, prompt in enumerate(prompts)]
    run(engine)
    assert requests[1].sequences[0].finish_reason == "error"
    for i in (0, 2):
        alone = quiet.add_request(None, prompts[i], SAMPLED)
        run(quiet)
        assert tokens_of(requests[i]) == tokens_of(alone)
    check_empty(engine)
