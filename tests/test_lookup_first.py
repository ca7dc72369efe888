"""Lookup before a draft model: who drafts when, and that neither loses the thread."""

from __future__ import annotations

from pathlib import Path

import pytest

from foredraft import LLM, SamplingParams
from foredraft.drafters.lookup_first import LookupFirst

DATA = Path(__file__).parent / "data"
TARGET, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
CONFIG = {"method": "lm-lookup", "model": OTHER, "tree": "dyspec", "num_speculative_tokens": 6, "lookup_min_match": 1}
PROMPTS = [[5, 9, 31, 7] * 6, list(range(3, 40)), "Once upon a time"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_take_part_and_the_output_is_that_of_plain_decoding(temperature: float) -> None:
    llm = LLM(TARGET, CONFIG, dtype="float64", max_num_seqs=3)
    sampling = SamplingParams(temperature=temperature, max_tokens=60, seed=3, ignore_eos=True)
    together = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, sampling)]
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    assert drafter.num_looked_up > 0
    assert drafter.num_drafted > 0
    assert [llm.generate(prompt, sampling)[0].outputs[0].token_ids for prompt in PROMPTS] == together
    if temperature == 0:
        plain = LLM(TARGET, {"method": "ar"}, dtype="float64").generate(PROMPTS, sampling)
        assert [out.outputs[0].token_ids for out in plain] == together


def test_the_draft_model_knows_the_whole_text_after_steps_it_was_not_asked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every step that it drafts, what its cache holds is the committed text without the root."""
    llm = LLM(TARGET, CONFIG, dtype="float64", max_num_seqs=1)
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    other, seen = drafter._other, []
    propose = other.propose

    def watched(states, *rest):  # type: ignore[no-untyped-def]
        batch = propose(states, *rest)
        [state] = states
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


def test_a_text_that_repeats_itself_is_looked_up() -> None:
    llm = LLM(TARGET, CONFIG, dtype="float64", max_num_seqs=1)
    llm.generate([5, 9, 31, 7, 8, 2] * 6, SamplingParams(temperature=0, max_tokens=2))
    drafter = llm.engine.drafter
    assert isinstance(drafter, LookupFirst)
    assert (drafter.num_looked_up, drafter.num_drafted) == (1, 0)


def test_a_match_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="lookup_min_match must be at least 1, got 0; without lookup use method 'lm'"):
        LLM(TARGET, {**CONFIG, "lookup_min_match": 0})
