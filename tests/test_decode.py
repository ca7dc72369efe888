"""The law of `speculative()` itself, over several steps: cache, observe, bonus tokens, cuts at max_tokens and at an EOS."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import pytest

from exact import MEASURED, enumerate_branches
from foredraft.core.contracts import Budget
from foredraft.core.draws import Draws
from foredraft.core.params import SamplingParams
from foredraft.core.processors import prefix_processors
from foredraft.core.text import TextStream
from foredraft.drafters.lm import LMDrafter
from foredraft.drafters.lookup_first import LookupFirst
from foredraft.drafters.ngram import NgramDrafter
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.engine.continuation import Continuation
from foredraft.engine.decode import autoregressive, speculative
from foredraft.models.table import Law, TableTarget, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS

PROMPT = (0, 1)
LENGTH = 4
TARGET = random_law(2, 11)
DRAFT = random_law(2, 12)


def new_continuation(
    draws: Draws, sampling: SamplingParams, eos: int | None, max_len: int = len(PROMPT) + LENGTH
) -> Continuation:
    return Continuation(
        token_ids=list(PROMPT),
        num_prompt=len(PROMPT),
        max_len=max_len,
        sampling=sampling,
        draws=draws,
        text=TextStream(None),
        eos_ids=frozenset() if eos is None else frozenset({eos}),
        processors=prefix_processors(sampling, len(PROMPT), () if eos is None else (eos,)),
    )


def law_of(make_drafter: Any, rule: str, nodes: int, sampling: SamplingParams, eos: int | None) -> dict[tuple[int, ...], float]:
    """The law of the output, every branch of every step enumerated; no drafter is plain decoding."""
    law: dict[tuple[int, ...], float] = defaultdict(float)

    def run(draws: Any) -> tuple[int, ...]:
        target = TableTarget(TARGET, 2)
        one = new_continuation(draws, sampling, eos)
        pool = target.new_pool(7)
        drafter = make_drafter()
        if drafter is None:
            steps = autoregressive(target, pool, [one])
        else:
            steps = speculative(target, pool, [one], drafter, RULES[rule].rule, Budget(nodes, nodes))
        for _ in steps:
            assert one.cache.length == len(one.token_ids) - 1 or one.finish_reason
        return tuple(one.output_ids)

    for prob, output, _ in enumerate_branches(run):
        law[output] += prob
    return law


def answer(eos: int | None, temperature: float = 1.0) -> dict[tuple[int, ...], float]:
    """Product of the target's probabilities, outputs cut after an EOS and at the length."""
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens in product(range(2), repeat=LENGTH):
        prob, output = 1.0, list(tokens)
        if eos in output:
            output = output[: output.index(eos) + 1]
        for i, token in enumerate(tokens):
            prob *= TARGET((*PROMPT, *tokens[:i]))[token]
        law[tuple(output)] += prob
    return law


def assert_equal_laws(law: dict[Any, float], expected: dict[Any, float]) -> None:
    assert set(law) == set(expected)
    for output, prob in expected.items():
        assert law[output] == pytest.approx(prob, abs=1e-12)


def lm_drafter(tree: str, options: dict[str, Any], law: Law = DRAFT) -> LMDrafter:
    return LMDrafter(TableTarget(law, 2), GROWERS[tree].grower(**options), 2)


CASES = [
    ("chain", {}, "chain"),
    ("chain", {}, "block"),
    ("branching", {"num_chains": 2}, "multiround-iid"),
    ("branching", {"num_chains": 2}, "kseq"),
    ("branching", {"expansion": [2, 1], "merge": True}, "multiround-iid"),
    ("dyspec", {}, "multiround"),
    ("dyspec-threshold", {}, "multiround"),
    ("dyspec-calibrated", MEASURED["dyspec-calibrated"], "multiround"),
    ("sequoia", {"acceptance": [0.6, 0.3]}, "multiround"),
    ("topk", {"topk": 2}, "deterministic"),
    ("opt", {}, "deterministic"),
    ("static", {}, "deterministic"),
]


@pytest.mark.unchecked
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize(("tree", "options", "rule"), CASES)
def test_law_of_four_tokens(tree: str, options: dict[str, Any], rule: str, nodes: int, eos: int | None) -> None:
    law = law_of(lambda: lm_drafter(tree, options), rule, nodes, SamplingParams(temperature=1.0), eos)
    assert_equal_laws(law, answer(eos))


@pytest.mark.parametrize("make", [NgramDrafter, SuffixDrafter, lambda: None])
@pytest.mark.parametrize("eos", [None, 1])
def test_law_of_drafters_without_weights(make: Any, eos: int | None) -> None:
    law = law_of(make, "deterministic", 3, SamplingParams(temperature=1.0), eos)
    assert_equal_laws(law, answer(eos))


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize(("tree", "rule"), [("chain", "block"), ("dyspec", "multiround")])
def test_law_of_a_draft_model_behind_a_lookup(tree: str, rule: str, eos: int | None) -> None:
    """Who drafts hangs on the tokens so far, which changes nothing of their law."""
    asked = []

    def make() -> LookupFirst:
        asked.append(LookupFirst(lm_drafter(tree, {}), lookup_min_match=1))
        return asked[-1]

    law = law_of(make, rule, 2, SamplingParams(temperature=1.0), eos)
    assert_equal_laws(law, answer(eos))
    assert sum(one.num_looked_up for one in asked) > 0
    assert sum(one.num_drafted for one in asked) > 0


def test_a_draft_equal_to_the_target_is_accepted_whole() -> None:
    target = TableTarget(TARGET, 2)
    one = new_continuation(Draws(5), SamplingParams(temperature=1.0), None, max_len=40)
    drafter = lm_drafter("chain", {}, TARGET)
    for _ in speculative(target, target.new_pool(3), [one], drafter, RULES["chain"].rule, Budget(5, 5)):
        pass
    assert len(one.output_ids) == 38 and one.finish_reason == "length"
    assert all(record.num_accepted_tokens == record.depth for record in one.records)
    assert set(one.kinds) == {"accepted", "bonus"}
