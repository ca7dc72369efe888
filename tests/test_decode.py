"""The law of the engine itself, over several steps: cache, observe, bonus tokens, cuts at max_tokens and at an EOS."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import pytest

from exact import MEASURED, decoded, enumerate_branches
from foredraft.core.contracts import Budget
from foredraft.core.draws import Draws
from foredraft.core.params import SamplingParams
from foredraft.drafters.lm import LMDrafter
from foredraft.drafters.lookup_first import LookupFirst
from foredraft.drafters.ngram import NgramDrafter
from foredraft.drafters.suffix import SuffixDrafter
from foredraft.models.table import Law, TableTarget, random_law
from foredraft.rules import RULES
from foredraft.trees import GROWERS

PROMPT = (0, 1)
LENGTH = 4
TARGET = random_law(2, 11)
DRAFT = random_law(2, 12)


def law_of(make_drafter: Any, rule: str, nodes: int, sampling: SamplingParams, eos: int | None) -> dict[tuple[int, ...], float]:
    """The law of the output, every branch of every step enumerated; no drafter is plain decoding."""
    law: dict[tuple[int, ...], float] = defaultdict(float)

    def run(draws: Any) -> tuple[int, ...]:
        drafter, more = make_drafter(), {}
        if drafter is not None:
            more = {"drafter": drafter, "rule": RULES[rule].rule, "budget": Budget(nodes, nodes)}
        one = decoded(TableTarget(TARGET, 2), PROMPT, sampling, draws, len(PROMPT) + LENGTH, eos=eos, **more)
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
    drafter, sampling = lm_drafter("chain", {}, TARGET), SamplingParams(temperature=1.0)
    drafting = {"drafter": drafter, "rule": RULES["chain"].rule, "budget": Budget(5, 5)}
    one = decoded(TableTarget(TARGET, 2), PROMPT, sampling, Draws(5), 40, **drafting)
    assert len(one.output_ids) == 38 and one.finish_reason == "length"
    assert all(record.num_accepted_tokens == record.depth for record in one.records)
    assert set(one.kinds) == {"accepted", "bonus"}
