"""On a CUDA device, by `pytest -m gpu`: what is drafted there, by graphs too, is what plain decoding gives on a CPU."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch

from foredraft import LLM, SamplingParams
from test_batched import given_at, is_close

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
