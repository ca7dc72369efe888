"""Requests that choose their drafter: of several that an engine was given, none, or one with fewer nodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM, SamplingParams

DATA = Path(__file__).parent / "data"
TARGET, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
HEADS = DATA / "heads"
LM = {"method": "lm", "model": OTHER, "tree": "dyspec", "num_speculative_tokens": 6}
EAGLE = {"method": "eagle", "model": str(HEADS / "eagle"), "tree": "chain", "num_speculative_tokens": 3, "force": True}
EAGLE3 = {"method": "eagle3", "model": str(HEADS / "eagle3"), "tree": "chain", "num_speculative_tokens": 3, "force": True}
MEDUSA = {"method": "medusa", "model": str(HEADS / "medusa"), "tree": "topk", "num_speculative_tokens": 5, "force": True}
LOOKUP = {"method": "suffix", "num_speculative_tokens": 4}
KNOWN = {one["method"]: one for one in (LM, EAGLE, EAGLE3, MEDUSA, LOOKUP)}
PROMPT = "Once upon a time, there was a little girl. Once upon a time"


@cache
def llm(*configs: str) -> LLM:
    return LLM(TARGET, [KNOWN[name] for name in configs], dtype="float64")


def params(wish: Any, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, "speculative": wish, **more})


def test_each_request_drafts_as_it_chose() -> None:
    both = llm("lm", "suffix")
    wishes: list[Any] = [None, False, {"method": "suffix"}, {"method": "lm", "num_speculative_tokens": 2}]
    results = [one.outputs[0] for one in both.generate([PROMPT] * 4, [params(wish) for wish in wishes])]
    assert len({tuple(one.token_ids) for one in results}) == 1
    budgets = [{record.budget for record in one.records[:4]} for one in results]
    assert budgets == [{6}, {0}, {4}, {2}]
    assert set(results[1].kinds) == {"plain"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafters_side_by_side_are_what_each_is_alone(temperature: float) -> None:
    """In one batch, also with the features of different layers."""
    names = [name for name in ("eagle", "eagle3", "medusa", "suffix") if name == "suffix" or (HEADS / name).exists()]
    together = llm(*names)
    given = [params({"method": name}, temperature=temperature, seed=7) for name in names]
    found = [one.outputs[0] for one in together.generate([PROMPT] * len(names), given)]
    for name, one in zip(names, found, strict=True):
        alone = llm("eagle").with_speculation(
            dict({"eagle": EAGLE, "eagle3": EAGLE3, "medusa": MEDUSA, "suffix": LOOKUP}[name])
        )
        [wanted] = alone.generate(PROMPT, params(None, temperature=temperature, seed=7))
        assert (one.token_ids, one.kinds) == (wanted.outputs[0].token_ids, wanted.outputs[0].kinds)
    blocks = together.engine.scheduler.pool.blocks
    assert blocks.num_free == blocks.count


def test_what_was_not_named_at_the_start_is_refused() -> None:
    both = llm("lm", "suffix")
    with pytest.raises(ValueError, match=r"unknown method of a request 'ngram'.*lm, suffix"):
        both.generate(PROMPT, params({"method": "ngram"}))
    with pytest.raises(ValueError, match="must be at most 4, got 5"):
        both.generate(PROMPT, params({"method": "suffix", "num_speculative_tokens": 5}))


WISHES = [True, 3, {}, {"method": 3}, {"method": "lm", "nodes": 2}, {"method": "lm", "num_speculative_tokens": 0}]


@pytest.mark.parametrize("wish", WISHES)
def test_a_wish_of_another_form_is_refused(wish: Any) -> None:
    with pytest.raises(TypeError, match="speculative must be False or a dictionary"):
        SamplingParams(speculative=wish)


def test_plain_decoding_by_default_beside_a_named_method() -> None:
    mixed = LLM(TARGET, [{"method": "ar"}, LOOKUP], dtype="float64")
    plain, drafted = mixed.generate([PROMPT] * 2, [params(None), params({"method": "suffix"})])
    assert {record.budget for record in plain.outputs[0].records} == {0}
    assert {record.budget for record in drafted.outputs[0].records[:4]} == {4}
    assert plain.outputs[0].token_ids == drafted.outputs[0].token_ids
