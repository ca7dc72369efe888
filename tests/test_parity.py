"""Greedy speculative decoding is plain decoding, token for token, in float64: every drafter with every tree it can grow."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from exact import MEASURED
from foredraft import LLM, RequestOutput, SamplingParams
from foredraft.core.folders import BUNDLED_LM, BUNDLED_TARGET
from foredraft.drafters import DRAFTERS
from foredraft.plan.config import bundled_drafter
from foredraft.plan.speculation import trees_of
from narrow import narrow_head

pytestmark = pytest.mark.unchecked

DATA = Path(__file__).parent / "data"
STORIES, OTHER_STORIES = DATA / "babyllama-105", DATA / "babyllama-105-b"
HEADS = DATA / "heads"
"""Draft heads for STORIES."""
LEAST = {"medusa": 1.2, "medusa-lookup": 1.2}
"""Tokens a step that a drafter gives at least, where it is not 1.5: so small a Medusa learns little."""
STORY_PROMPTS = ["Once upon a time", "Tom", "One day, a girl named Sue went to the park with her red ball and"]
COMBINATIONS = [(drafter, tree) for drafter, row in DRAFTERS.items() for tree in trees_of(row)]
USUAL = [
    pytest.param(
        drafter, tree, marks=[pytest.mark.slow] if DRAFTERS[drafter].asks and tree not in ("chain", "dyspec", None) else []
    )
    for drafter, tree in COMBINATIONS
]
"""Behind a lookup not every tree in the default suite."""


@cache
def chat_prompts() -> list[str]:
    rows = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    return [f"<|user|>\n{row['prompt']}\n<|assistant|>\n" for row in rows]


def config_of(drafter: str, tree: str | None, draft_model: Path, nodes: int = 8) -> dict[str, Any]:
    row = DRAFTERS[drafter]
    config: dict[str, Any] = {"method": drafter, "num_speculative_tokens": nodes}
    is_head, ours = row.weights == "head", draft_model == OTHER_STORIES
    config |= {"model": HEADS / (row.asks or drafter) if is_head and ours else draft_model} if row.weights else {}
    return config | ({"tree": tree, **MEASURED.get(tree, {})} if tree is not None else {})


def outputs(model: Any, config: dict[str, Any], prompts: list[str], max_tokens: int, **more: Any) -> list[RequestOutput]:
    llm = LLM(model, config, dtype="float64", max_num_seqs=more.pop("max_num_seqs", 8))
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more))


def token_ids(results: list[RequestOutput]) -> list[list[int]]:
    return [one.outputs[0].token_ids for one in results]


@cache
def plain(model: Path, num_prompts: int, max_tokens: int) -> list[list[int]]:
    prompts = STORY_PROMPTS if model == STORIES else chat_prompts()
    return token_ids(outputs(model, {"method": "ar"}, prompts[:num_prompts], max_tokens))


@pytest.mark.parametrize(("drafter", "tree"), USUAL)
def test_stories(drafter: str, tree: str | None) -> None:
    results = outputs(STORIES, config_of(drafter, tree, OTHER_STORIES), STORY_PROMPTS[:2], 100)
    assert token_ids(results) == plain(STORIES, 2, 100)
    assert all(len(one.outputs[0].token_ids) == 100 for one in results)
    if DRAFTERS[drafter].weights:  # the two agree often: a drafter that never gets a token through would pass for nothing
        assert all(one.metrics.acceptance_length > LEAST.get(drafter, 1.5) for one in results)


@pytest.mark.parametrize("tree", ["chain", "topk", "dyspec"])
def test_a_narrow_head(tree: str, tmp_path: Path) -> None:
    config = {"method": "eagle3", "model": narrow_head(STORIES, tmp_path / "head"), "num_speculative_tokens": 8, "tree": tree}
    assert token_ids(outputs(STORIES, config, STORY_PROMPTS[:2], 100)) == plain(STORIES, 2, 100)


@pytest.mark.parametrize(
    ("drafter", "tree"),
    [("lm", "dyspec"), ("lm", "branching"), ("fspad", "dyspec"), ("eagle", "topk"), ("ctc", None), ("suffix", None)],
)
def test_bundled_pair(drafter: str, tree: str | None) -> None:
    results = outputs(BUNDLED_TARGET, config_of(drafter, tree, bundled_drafter(drafter) or BUNDLED_LM), chat_prompts()[:2], 60)
    assert token_ids(results) == [ids[:60] for ids in plain(BUNDLED_TARGET, 2, 60)]


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "tree"), COMBINATIONS)
@pytest.mark.parametrize(("target", "draft"), [(STORIES, OTHER_STORIES), (BUNDLED_TARGET, BUNDLED_LM)])
def test_200_tokens(target: Path, draft: Path, drafter: str, tree: str | None) -> None:
    if DRAFTERS[drafter].weights == "head" and target == BUNDLED_TARGET:
        draft = bundled_drafter(drafter) or pytest.skip("this head is not bundled")
    prompts = STORY_PROMPTS if target == STORIES else chat_prompts()[:6]
    for nodes in (4, 16):
        results = outputs(target, config_of(drafter, tree, draft, nodes), prompts, 200)
        assert token_ids(results) == plain(target, len(prompts), 200)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "ar"},
        {"method": "lm", "model": OTHER_STORIES, "tree": "dyspec", "num_speculative_tokens": 8},
        {"method": "suffix", "num_speculative_tokens": 8},  # an automatic choice would depend on max_num_seqs
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_batch_is_what_each_prompt_is_alone(config: dict[str, Any], temperature: float) -> None:
    """Eight prompts of different lengths, three at a time, in ragged acceptance; sampled ones have seeds of their own."""
    prompts = [("Once upon a time there was a little girl. " * 5)[: 1 + 17 * i] for i in range(8)]
    sampling = [SamplingParams(temperature=temperature, max_tokens=24 + i, seed=i) for i in range(8)]
    together = LLM(STORIES, config, dtype="float64", max_num_seqs=8).generate(prompts, sampling)
    waves = LLM(STORIES, config, dtype="float64", max_num_seqs=3).generate(prompts, sampling)
    llm = LLM(STORIES, config, dtype="float64", max_num_seqs=1)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, sampling, strict=True)]
    assert token_ids(together) == token_ids(alone) == token_ids(waves)


@pytest.mark.parametrize("model", [STORIES, BUNDLED_TARGET])
def test_plain_decoding_is_transformers_generate(model: Path) -> None:
    prompts = STORY_PROMPTS[:2] if model == STORIES else chat_prompts()[:2]
    llm = LLM(model, {"method": "ar"}, dtype="float64")
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for prompt in prompts:
        ids = llm.tokenizer(prompt, return_tensors="pt")
        generated = reference.generate(
            input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=60, do_sample=False
        )
        [result] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60))
        assert result.outputs[0].token_ids == generated[0, ids["input_ids"].shape[1] :].tolist()


def test_acceptance_of_chains_is_the_overlap_of_the_laws() -> None:
    """Over sampled text, the share of first drafted tokens that are accepted is the mean of sum min(draft, target).

    The same prefixes are scored by both models. 1,800 steps or more; the standard error of the difference is about 0.7 %, and
    2 % is allowed, so that a correct rule fails in less than 1 % of seeds (the seed is fixed).
    """
    llm = LLM(STORIES, {"method": "lm", "model": OTHER_STORIES, "tree": "chain", "rule": "chain", "num_speculative_tokens": 1})
    results = llm.generate(
        ["Once", "The", "One day", "Tom", "Lily", "There"] * 8,
        SamplingParams(temperature=1, max_tokens=80, seed=7, ignore_eos=True),
    )
    results += llm.generate(
        ["A", "She", "He", "Max", "Sam", "Mia"] * 8, SamplingParams(temperature=1, max_tokens=80, ignore_eos=True)
    )
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (STORIES, OTHER_STORIES)]
    drafted = accepted = 0
    expected: list[float] = []
    for one in results:
        drafted += one.metrics.num_draft_tokens
        accepted += one.metrics.num_accepted_tokens
        expected += overlap_at_roots(models, one)[: one.metrics.num_draft_tokens]  # a last step may have no room to draft
    assert drafted == len(expected) > 1800
    assert accepted / drafted == pytest.approx(np.mean(expected), rel=0.02)


def overlap_at_roots(models: list[Any], result: RequestOutput) -> list[float]:
    """sum min(draft, target) after the root of every step."""
    prompt, kinds = result.prompt_token_ids, result.outputs[0].kinds
    ids = torch.tensor([prompt + result.outputs[0].token_ids])
    with torch.no_grad():
        laws = [model(ids).logits[0].softmax(-1) for model in models]
    ends = [i for i, kind in enumerate(kinds) if kind != "accepted"]
    roots = [len(prompt) - 1, *(len(prompt) + end for end in ends[:-1])]
    return [float(laws[0][root].minimum(laws[1][root]).sum()) for root in roots]
