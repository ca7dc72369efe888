"""Lookup before a drafter with weights: who drafts when, and that neither loses the thread."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from foredraft import LLM, SamplingParams
from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.drafters import DRAFTERS
from foredraft.drafters.lookup_first import LookupFirst
from foredraft.plan.config import bundled_drafter, parse

DATA = Path(__file__).parent / "data"
TARGET, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
CONFIG = {"method": "lm-lookup", "model": OTHER, "tree": "dyspec", "num_speculative_tokens": 6, "lookup_min_match": 1}
HEADS = [name for name, row in DRAFTERS.items() if row.weights == "head" and row.asks]
PROMPTS = [[5, 9, 31, 7] * 6, list(range(3, 40)), "Once upon a time"]


def config_of(method: str) -> dict[str, Any]:
    """The asked drafter's weights, and a tree where it grows one."""
    row = DRAFTERS[method]
    own = {key: CONFIG[key] for key in ("num_speculative_tokens", "lookup_min_match")}
    tree = {"tree": "dyspec"} if not row.makes_own else {}
    return {"method": method, "model": str(DATA / "heads" / str(row.asks)) if row.weights == "head" else OTHER, **tree, **own}


@cache
def plain() -> list[list[int]]:
    """What plain decoding gives for the prompts."""
    sampling = SamplingParams(temperature=0.0, max_tokens=60, seed=3, ignore_eos=True)
    results = LLM(TARGET, {"method": "ar"}, dtype="float64").generate(PROMPTS, sampling)
    return [out.outputs[0].token_ids for out in results]


@pytest.mark.parametrize(
    ("method", "temperature"),
    [*((one, 0.0) for one in ("lm-lookup", *HEADS)), ("lm-lookup", 1.0), ("fspad-lookup", 1.0), ("ctc-lookup", 1.0)],
)
def test_both_take_part_and_the_output_is_that_of_plain_decoding(method: str, temperature: float) -> None:
    llm = LLM(TARGET, config_of(method), dtype="float64", max_num_seqs=3)
    sampling = SamplingParams(temperature=temperature, max_tokens=60, seed=3, ignore_eos=True)
    together = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, sampling)]
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    assert drafter.num_looked_up > 0
    assert drafter.num_drafted > 0
    assert [llm.generate(prompt, sampling)[0].outputs[0].token_ids for prompt in PROMPTS] == together
    if temperature == 0:
        assert plain() == together


def test_the_draft_model_knows_the_whole_text_after_steps_it_was_not_asked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step that it drafts, what its cache holds is the committed text without the root."""
    llm = LLM(TARGET, CONFIG, dtype="float64", max_num_seqs=1)
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    other, seen = drafter._other, []
    propose = other.propose

    def watched(work):  # type: ignore[no-untyped-def]
        batch = propose(work)
        [state] = work.states
        if state.place:  # where there is room for no more than the next token, nothing is run
            seen.append((state.num_committed, state.cache.length + len(state.pending), state.tokens[state.place[0]]))
        return batch

    monkeypatch.setattr(other, "propose", watched)
    ids = llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))[0]
    text = [*ids.prompt_token_ids, *ids.outputs[0].token_ids]
    assert drafter.num_looked_up > 3
    assert len(seen) > 3
    for committed, known, root in seen:
        assert known == committed
        assert root == text[committed - 1]


@pytest.mark.parametrize("method", HEADS)
def test_a_head_drafts_after_lookups_as_if_it_began_there(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tree hangs on the committed text alone: a request that begins with that text gets the same one."""
    llm = LLM(TARGET, config_of(method), dtype="float64", max_num_seqs=2)
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    propose, steps = drafter.propose, []

    def watched(work):  # type: ignore[no-untyped-def]
        before = drafter.num_looked_up
        batch = propose(work)
        steps.append((drafter.num_looked_up > before, list(work.states[0].lookup.tokens), work, batch[0]))
        return batch

    monkeypatch.setattr(drafter, "propose", watched)
    llm.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    late = [step for before, step in pairwise(steps) if before[0] and not step[0]]
    assert len(late) > 3
    for _, text, work, tree in late:
        pool = llm.target.new_pool(num_blocks(len(text)))
        [chunks] = prefill(llm.target, [pool.allocate()], [text[:-1]], feature_layers=drafter.feature_layers)
        fresh = drafter._other.start(text, torch.cat([one.features for one in chunks if one.features is not None]))
        found = drafter._other.propose(work.part([0], [fresh]))[0]
        drafter._other.finish(fresh)
        assert (found.tokens.tolist(), found.parents.tolist()) == (tree.tokens.tolist(), tree.parents.tolist())


def test_every_drafter_with_weights_can_stand_behind_a_lookup() -> None:
    """With what the asked one gives, its options and its bundled weights."""
    for name, row in DRAFTERS.items():
        if row.weights is None or row.asks:
            continue
        front = DRAFTERS[f"{name}-lookup"]
        assert (front.asks, front.gives, front.makes_own, front.weights) == (name, row.gives, row.makes_own, row.weights)
        assert {*row.options, "lookup_min_match"} == set(front.options) == set(front.option_types()) & set(front.options)
        assert bundled_drafter(f"{name}-lookup") == bundled_drafter(name)
    found = parse({"method": "ctc-lookup", "ctc_tokens": 3, "lookup_min_match": 2, "force": True})
    assert found is not None
    assert found.calibrated == "ctc"
    with pytest.raises(TypeError, match="ctc_tokens must be a whole number or null, got 'x'"):
        parse({"method": "ctc-lookup", "ctc_tokens": "x"})


def test_options_reach_the_drafter_that_they_are_for() -> None:
    llm = LLM(TARGET, {**config_of("ctc-lookup"), "ctc_tokens": 3, "force": True, "lookup_min_match": 2})
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    assert drafter._other._num_tokens == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ctc_tokens must be at least 1, got 0"):
        llm.with_speculation({**config_of("ctc-lookup"), "ctc_tokens": 0})
    with pytest.raises(ValueError, match="ctc_tokens=3 only affects ctc's own tree"):
        llm.with_speculation({**config_of("ctc-lookup"), "ctc_tokens": 3, "tree": "dyspec"})


def test_a_text_that_repeats_itself_is_looked_up() -> None:
    llm = LLM(TARGET, CONFIG, dtype="float64", max_num_seqs=1)
    llm.generate([5, 9, 31, 7, 8, 2] * 6, SamplingParams(temperature=0, max_tokens=2))
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    assert (drafter.num_looked_up, drafter.num_drafted) == (1, 0)


def test_a_match_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="lookup_min_match must be at least 1, got 0"):
        LLM(TARGET, {**CONFIG, "lookup_min_match": 0})


def test_pairs_that_wait_for_a_head_are_not_copied_in_every_step() -> None:
    """Whatever a step brings while the lookup drafts is put beside the rest once, when the head drafts again."""
    llm = LLM(TARGET, config_of("fspad-lookup"), dtype="float64", max_num_seqs=1)
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    state = drafter.start([5, 9, 31, 7] * 6, torch.randn(23, 128, dtype=torch.float64))
    for _ in range(20):
        drafter.observe(state, [5], torch.randn(1, 128, dtype=torch.float64), [])
    assert [len(part) for part in state.other.parts] == [23] + [1] * 20
    assert len(state.other.features) == len(state.other.pending) == 43
    assert len(state.other.parts) == 1
