"""Losslessness, computed: every grower with every rule that may verify its trees, against the target's joint law.

The emitted tokens, completed by the target, must have the target's joint law over V^(depth + 1) to 1e-12 in float64, by
enumeration of every branch of `Draws`. The same harness must fail on every planted fault.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from exact import MEASURED, Grown, batched_joint_law, joint_law, target_joint, tree_law
from foredraft import kernels
from foredraft.core.contracts import Budget, Verdict, Work
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree, Drawn
from foredraft.kernels.acceptance import Trees
from foredraft.models.table import Law, random_law
from foredraft.plan.speculation import fitting_rules
from foredraft.rules import RULES
from foredraft.rules.residual import subtract, without
from foredraft.trees import GROWERS
from foredraft.trees.chain import Branching
from foredraft.trees.dyspec import DySpec, DySpecThreshold

pytestmark = pytest.mark.unchecked

TOLERANCE = 1e-12
DEPTH = 3
PREFIX = (0,)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("chain", {}),
    ("branching", {"num_chains": 2}),
    ("branching", {"num_chains": 3, "draft_depth": 1}),
    ("branching", {"expansion": [2, 1], "merge": True}),
    ("branching", {"expansion": [2, 2], "merge": True}),
    ("static", {}),
    ("static", {"paths": [[0], [0, 0], [0, 1], [1], [1, 0]]}),
    ("sequoia", {"acceptance": [0.6, 0.3, 0.2]}),
    ("topk", {"topk": 2, "draft_depth": 3}),
    ("opt", {"delta": 0.05}),
    ("dyspec", {}),
    ("dyspec", {"draft_top_k": 2}),
    ("branching", {"num_chains": 2, "draft_top_k": 2}),
    ("dyspec-calibrated", {"width": 1, **MEASURED["dyspec-calibrated"]}),  # wider, it draws too many orders to visit
    ("dyspec-threshold", {}),
]
ONLY_SMALL: list[tuple[str, dict[str, Any]]] = [  # more options, at V = 2 in the default suite
    ("branching", {"expansion": [1, 2, 1], "merge": False}),
    ("dyspec", {"width": 1}),
    ("dyspec", {"draft_temperature": 0.5}),
    ("dyspec-threshold", {"threshold": 0.15}),
]
BUDGETS = {2: 6, 3: 4, 4: 3}
MORE_BUDGETS = {2: 7, 3: 6, 4: 4}


def variant_name(variant: tuple[str, dict[str, Any]]) -> str:
    said = {key: "" if isinstance(value, dict) else value for key, value in variant[1].items()}
    return variant[0] + "".join(f"-{key}{value}" for key, value in said.items()).replace(" ", "")


def draft_laws(vocab_size: int) -> list[Law]:
    return [random_law(vocab_size, 1), random_law(vocab_size, 2, zeros=0.3, concentration=0.6)]


def target_laws(vocab_size: int) -> list[Law]:
    return [random_law(vocab_size, 3), random_law(vocab_size, 4, zeros=0.3)]


@cache
def grown(name: str, options: str, vocab_size: int, draft: int, nodes: int, sampled: bool) -> Grown:
    """The law over trees, sampled or (as at target temperature 0) of the most likely tokens."""
    grower = GROWERS[name].grower(**json.loads(options))
    law = draft_laws(vocab_size)[draft]
    return tree_law(grower, law, vocab_size, Budget(nodes, min(nodes, DEPTH)), float(sampled), PREFIX)


@cache
def answer(vocab_size: int, target: int, length: int, temperature: float) -> np.ndarray:
    return target_joint(target_laws(vocab_size)[target], vocab_size, length, temperature, PREFIX)


def frozen(options: dict[str, Any]) -> str:
    """The options as something that a cache can look up."""
    return json.dumps(options)


MODES = {1.0: (True,), 0.0: (True, False)}
"""Target temperature -> whether the trees are sampled. Sampled trees of a greedy target: what ``draft_sampling="sampled"``
with ``draft_temperature=1`` grows, which is the same law over trees as at target temperature 1."""


def worst_error(name: str, options: dict[str, Any], rule: Any, vocab_size: int, nodes: int, law_of: Any = joint_law) -> float:
    """Largest difference over draft laws, target laws, temperatures and ways of drawing. `law_of` gives the law of the rule, or
    that of its batched form."""
    worst, length = 0.0, min(nodes, DEPTH) + 1
    for temperature, ways in MODES.items():
        for sampled, draft in product(ways, range(2)):
            trees = grown(name, frozen(options), vocab_size, draft, nodes, sampled)
            worst = max(worst, abs(sum(prob for prob, _, _ in trees.values()) - 1))
            for target, law in enumerate(target_laws(vocab_size)):
                joint = law_of(trees, rule, law, vocab_size, length, temperature=temperature, prefix=PREFIX)
                worst = max(worst, np.abs(joint - answer(vocab_size, target, length, temperature)).max())
    return worst


def pairs(variants: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(name, options, rule, id=f"{variant_name((name, options))}-{rule}")
        for name, options in variants
        for rule in fitting_rules(GROWERS[name])
        if RULES[rule].guarantee.startswith("exact")
    ]


@pytest.mark.parametrize("vocab_size", BUDGETS)
@pytest.mark.parametrize(("name", "options", "rule"), pairs(VARIANTS))
def test_pair_is_exact(name: str, options: dict[str, Any], rule: str, vocab_size: int) -> None:
    for nodes in range(1, BUDGETS[vocab_size] + 1):
        assert worst_error(name, options, RULES[rule].rule, vocab_size, nodes) < TOLERANCE, f"{nodes} nodes"


@pytest.mark.parametrize(("name", "options", "rule"), pairs(ONLY_SMALL))
def test_more_options_are_exact(name: str, options: dict[str, Any], rule: str) -> None:
    for nodes in range(1, BUDGETS[2] + 1):
        assert worst_error(name, options, RULES[rule].rule, 2, nodes) < TOLERANCE, f"{nodes} nodes"


def batched(variants: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [pair for pair in pairs(variants) if RULES[pair.values[2]].batched]


@pytest.mark.parametrize("vocab_size", BUDGETS)
@pytest.mark.parametrize(("name", "options", "rule"), batched(VARIANTS))
def test_batched_form_is_exact(name: str, options: dict[str, Any], rule: str, vocab_size: int) -> None:
    """The largest budget: its trees contain the smaller ones."""
    nodes = BUDGETS[vocab_size]
    assert worst_error(name, options, RULES[rule].rule, vocab_size, nodes, batched_joint_law) < TOLERANCE


# not the calibrated tree, which follows any table: at one node more its orders are too many to visit
LARGER = [variant for variant in VARIANTS + ONLY_SMALL if variant[0] != "dyspec-calibrated"]


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", BUDGETS)
@pytest.mark.parametrize(("name", "options", "rule"), pairs(LARGER))
def test_larger_pair_is_exact(name: str, options: dict[str, Any], rule: str, vocab_size: int) -> None:
    if name == "dyspec" and vocab_size == 4:  # wider passes draw in vain too, and there are 24 orders a node
        options = {**options, "width": 1}
    for nodes in range(1, MORE_BUDGETS[vocab_size] + 1):
        assert worst_error(name, options, RULES[rule].rule, vocab_size, nodes) < TOLERANCE, f"{nodes} nodes"


def test_every_table_row_is_covered() -> None:
    assert {name for name, _ in VARIANTS} == set(GROWERS)
    covered = {param.values[2] for param in pairs(VARIANTS)}
    assert covered == {name for name, row in RULES.items() if row.guarantee.startswith("exact")}


def test_sampled_trees_of_a_greedy_target_are_those_of_temperature_1() -> None:
    """What `MODES` relies on."""
    law, budget = draft_laws(3)[0], Budget(3, 3)
    greedy = GROWERS["dyspec"].grower(draft_sampling="sampled", draft_temperature=1.0)
    at_0 = tree_law(greedy, law, 3, budget, 0.0, PREFIX)
    at_1 = grown("dyspec", frozen({}), 3, 0, 3, True)
    assert {key: round(prob, 12) for key, (prob, _, _) in at_0.items()} == {
        key: round(prob, 12) for key, (prob, _, _) in at_1.items()
    }


def test_lossy_rule_is_caught() -> None:
    assert worst_error("dyspec", {}, RULES["typical"].rule, 3, 3) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults. Each must be caught by the same harness.


def faulty_multiround(
    *,
    draft_kept: bool = False,
    reversed_test: bool = False,
    plain_below: bool = False,
    row_by_token: bool = False,
) -> Any:
    """`multiround` with a fault: the draft law not renormalised; the coin reversed; the residual forgotten below depth 1; the
    target's row of the first node with the same token."""

    def rule(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        path, node = [], 0
        while True:
            place = tree.tokens.tolist().index(tree.tokens[node]) if row_by_token else node
            residual, draft = target_law.row(place), tree.law(node)
            for child in tree.children[node]:
                token = int(tree.tokens[child])
                draft_prob = 1.0 if draft is None else float(draft[token])
                prob = min(1.0, float(residual[token]) / draft_prob) if draft_prob > 0 else 0.0
                if draws.bernoulli(1 - prob if reversed_test else prob, ("accept", tree.ranks[child], 0)):
                    break
                if not (plain_below and tree.depths[node] >= 1):
                    residual = subtract(residual, draft, token)
                if draft is not None and tree.drawn[node] == Drawn.WITHOUT_REPLACEMENT:
                    draft = draft.clone().index_fill_(0, torch.tensor(token), 0.0) if draft_kept else without(draft, token)
            else:
                kind = "recovered" if tree.children[node] else "bonus"
                return Verdict(path, draws.categorical(residual, ("next", tree.ranks[node], 0)), kind)
            path.append(child)
            node = child

    return rule


def batched_fault(alter: Any, tree: str = "dyspec", options: dict[str, Any] | None = None) -> float:
    """The error of the batched form of `multiround` when `alter` changes what its operation is given."""
    plain = kernels.OPERATIONS["accept"].plain

    def faulty(logits: Any, laws: Any, *, trees: Trees, draft_ids: Any) -> Any:
        return plain(logits, laws, trees=alter(trees), draft_ids=draft_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.OPERATIONS, "accept", kernels.Operation(faulty, None))
        return worst_error(tree, options or {}, RULES["multiround"].rule, 3, 3, batched_joint_law)


def numbers_moved(trees: Trees) -> Trees:
    """Every number a hundredth further, as if thresholds were wrong by that much."""
    return trees._replace(uniforms=None if trees.uniforms is None else np.minimum(trees.uniforms + 0.01, 1 - 1e-9))


def test_the_batched_form_without_a_fault_passes() -> None:
    assert batched_fault(lambda trees: trees) < TOLERANCE


@pytest.mark.parametrize(
    "alter",
    [
        lambda trees: trees._replace(drawn=trees.drawn.clip(max=1)),  # the draft law kept after a rejection
        lambda trees: trees._replace(draft_row=np.full_like(trees.draft_row, -1)),  # sampled children taken for certain ones
        lambda trees: trees._replace(uniforms=None if trees.uniforms is None else trees.uniforms[::-1]),
        lambda trees: trees._replace(rows=np.roll(trees.rows, 3)),  # the laws of another tree
        numbers_moved,
    ],
)
def test_a_fault_of_the_batched_form_is_caught(alter: Any) -> None:
    assert batched_fault(alter) > 1e-3


def test_a_residual_that_is_not_updated_is_caught_in_the_batched_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda self, min: self.zero_())
    assert batched_fault(lambda trees: trees) > 1e-3


def test_correct_copy_passes() -> None:
    """The copy above without a fault is exact, so that what follows catches the fault and not the copy."""
    assert worst_error("dyspec", {}, faulty_multiround(), 3, 3) < TOLERANCE


def test_draft_law_not_renormalised_is_caught() -> None:
    assert worst_error("dyspec", {}, faulty_multiround(draft_kept=True), 3, 3) > 1e-3


def test_acceptance_test_reversed_is_caught() -> None:
    assert worst_error("chain", {}, faulty_multiround(reversed_test=True), 3, 2) > 1e-3


def test_residual_wrong_below_depth_1_is_caught() -> None:
    assert worst_error("dyspec", {}, faulty_multiround(plain_below=True), 3, 1) < TOLERANCE  # invisible at depth 1
    assert worst_error("static", {"paths": [[0], [0, 0], [0, 1]]}, faulty_multiround(plain_below=True), 3, 3) > 1e-3


def test_row_of_another_node_with_the_same_token_is_caught() -> None:
    assert worst_error("branching", {"num_chains": 2}, faulty_multiround(row_by_token=True), 2, 4) > 1e-3


def test_independent_tests_with_the_best_path_kept_is_caught() -> None:
    def rule(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        kept = [0]
        for node in range(1, tree.num_nodes):
            parent, token = int(tree.parents[node]), int(tree.tokens[node])
            draft = tree.law(parent)
            ratio = float(target_law.row(parent)[token]) / (1.0 if draft is None else float(draft[token]))
            if draws.bernoulli(ratio, ("accept", tree.ranks[node], 0)) and parent in kept:
                kept.append(node)
        last = max(kept, key=lambda node: int(tree.depths[node]))
        law = target_law.row(last)
        for child in tree.children[last]:
            law = subtract(law, tree.law(last), int(tree.tokens[child]))
        return Verdict(tree.path_to(last), draws.categorical(law, ("next", tree.ranks[last], 0)), "bonus")

    assert worst_error("dyspec", {}, rule, 3, 3) > 1e-3


@dataclass(frozen=True)
class Altered:
    """A grower whose trees are tampered with after they were drawn."""

    grower: Any
    alter: Any

    def grow(self, drafter: Any, work: Work) -> Any:
        sapling = []
        batch = self.grower.grow(drafter, work)
        tree = batch[0]
        keep = self.alter(tree)
        place = {node: i for i, node in enumerate(keep)} | {-1: -1}
        sapling = [place[int(tree.parents[node])] for node in keep]
        return replace(
            batch,
            tokens=tree.tokens[keep],
            parents=np.array(sapling),
            drawn=tree.drawn[keep],
            draft_row=tree.draft_row[keep],
            offsets=np.array([0, len(keep)]),
        )


def altered_error(grower: Any, alter: Any, rule: Any, nodes: int) -> float:
    """Largest error at V = 4, where a residual law can keep several tokens."""
    budget, length, worst = Budget(nodes, 2), 3, 0.0
    for draft in draft_laws(4):
        trees = tree_law(Altered(grower, alter), draft, 4, budget, 1.0, PREFIX)
        for target, law in enumerate(target_laws(4)):
            joint = joint_law(trees, rule, law, 4, length, temperature=1.0, prefix=PREFIX)
            worst = max(worst, float(np.abs(joint - answer(4, target, length, 1.0)).max()))
    return worst


def test_pruning_after_seeing_the_token_is_caught() -> None:
    def prune(tree: DraftTree) -> list[int]:
        kept = [0]
        for node in range(1, tree.num_nodes):
            parent = int(tree.parents[node])
            if parent in kept and tree.draft_probs[int(tree.draft_row[parent])][int(tree.tokens[node])] > 0.3:
                kept.append(node)
        return kept

    everything = lambda tree: list(range(tree.num_nodes))  # noqa: E731
    assert altered_error(DySpec(), everything, RULES["multiround"].rule, 2) < TOLERANCE
    assert altered_error(DySpec(), prune, RULES["multiround"].rule, 2) > 1e-3


def test_dropping_duplicate_siblings_is_caught() -> None:
    def drop(tree: DraftTree) -> list[int]:
        seen: set[tuple[int, int]] = set()
        kept = []
        for node in range(tree.num_nodes):
            if (int(tree.parents[node]), int(tree.tokens[node])) not in seen:
                seen.add((int(tree.parents[node]), int(tree.tokens[node])))
                kept.append(node)
        return kept

    everything = lambda tree: list(range(tree.num_nodes))  # noqa: E731
    grower = Branching(num_chains=3, draft_depth=1)
    assert altered_error(grower, everything, RULES["multiround-iid"].rule, 3) < TOLERANCE
    assert altered_error(grower, drop, RULES["multiround-iid"].rule, 3) > 1e-3


def test_one_number_for_draft_and_test_is_caught() -> None:
    def rule(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        return Verdict([], draws.categorical(target_law.row(0), ("draft", (), 0)), "recovered")

    with pytest.raises(AssertionError, match="the drafting used"):
        worst_error("dyspec", {}, rule, 2, 1)


def test_one_number_asked_twice_is_caught() -> None:
    def rule(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        draws.bernoulli(0.5, ("next", (), 0))
        return Verdict([], draws.categorical(target_law.row(0), ("next", (), 0)), "recovered")

    with pytest.raises(AssertionError, match="used twice"):
        worst_error("dyspec", {}, rule, 2, 1)


def value_violations(trees: Grown, threshold: float) -> int:
    """Draws of Algorithm 2's trees (large budget) that were made below the threshold, or not made although at or above it."""
    wrong = 0
    for _, tree, _ in trees.values():
        value = [1.0] * tree.num_nodes
        for node in range(tree.num_nodes):
            law, left = tree.law(node), value[node]
            for child in tree.children[node]:
                assert law is not None
                wrong += left < threshold - 1e-12
                value[child] = value[node] * float(law[int(tree.tokens[child])])
                left -= value[child]
            deeper = int(tree.depths[node]) < DEPTH
            wrong += deeper and left >= threshold + 1e-12 and len(tree.children[node]) < 2
    return wrong


def test_threshold_reversed_is_caught() -> None:
    """The paper prints "while v < t". Such a tree decides without looking, so its law is right, but it never drafts."""

    class Reversed(DySpecThreshold):
        def policy(self, tree: Any) -> Any:
            if tree.values[0] < self.least(tree.budget.nodes):
                yield from super().policy(tree)
            tree.keep_only([0])

    budget, law = Budget(30, DEPTH), random_law(2, 1)
    right = tree_law(DySpecThreshold(threshold=0.2), law, 2, budget, 1.0, PREFIX)
    wrong = tree_law(Reversed(threshold=0.2), law, 2, budget, 1.0, PREFIX)
    assert value_violations(right, 0.2) == 0
    assert value_violations(wrong, 0.2) > 0


@pytest.mark.parametrize(
    ("tree", "options", "rule"),
    [
        ("dyspec", {}, "multiround-iid"),
        ("dyspec", {}, "deterministic"),
        ("dyspec", {}, "kseq"),
        ("dyspec", {}, "chain"),
        ("dyspec", {}, "block"),
        ("branching", {"num_chains": 2}, "deterministic"),
        ("branching", {"num_chains": 2}, "chain"),
        ("branching", {"num_chains": 2}, "block"),
        ("chain", {}, "deterministic"),
        ("static", {"paths": [[0], [1]]}, "chain"),
        ("static", {"paths": [[0], [1]]}, "block"),
    ],
)
def test_tree_drawn_another_way_raises(tree: str, options: dict[str, Any], rule: str) -> None:
    trees = grown(tree, frozen(options), 3, 0, 3, True)
    with pytest.raises(ValueError, match=r"exact for children|verifies chains"):
        joint_law(trees, RULES[rule].rule, target_laws(3)[0], 3, 4, temperature=1.0, prefix=PREFIX)
