"""Acceptance rules against published and independently computed numbers (fixture: draft .5 .3 .2, target .2 .3 .5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from exact import TableExpander, enumerate_branches, expected_tokens, tree_law
from foredraft import kernels as compiled
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, Drawn
from foredraft.models.table import Law, random_law
from foredraft.rules import RULES
from foredraft.rules.kseq import discount
from foredraft.trees import GROWERS

DRAFT, TARGET = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def constant(row: np.ndarray) -> Law:
    return lambda prefix: row


def tokens_per_step(tree: str, options: dict[str, Any], rule: str, nodes: int, depth: int) -> float:
    grower = GROWERS[tree].grower(**options)
    trees = tree_law(grower, constant(DRAFT), 3, Budget(nodes, depth), 1.0, (0,))
    return expected_tokens(trees, RULES[rule].rule, constant(TARGET), 1.0, (0,))


@pytest.mark.parametrize(
    ("tree", "rule", "acceptance"),
    [
        ("branching", "multiround-iid", [0.70, 0.76, 0.808]),
        ("branching", "kseq", [0.70, 0.79136, 0.85852]),
        ("dyspec", "multiround", [0.70, 0.82, 1.00]),
        ("topk", "deterministic", [0.20, 0.50, 1.00]),
    ],
)
def test_acceptance_at_a_single_node(tree: str, rule: str, acceptance: list[float]) -> None:
    """One node with k children; the rows of SpecInfer, K-SEQ, Sequoia and DySpec, EAGLE-2."""
    for k, expected in enumerate(acceptance, start=1):
        options = {"num_chains": k, "draft_depth": 1} if tree == "branching" else {}
        assert tokens_per_step(tree, options, rule, k, 1) - 1 == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(("k", "rho"), [(1, 1.0), (2, 1.45678), (3, 1.79259)])
def test_discount_of_kseq(k: int, rho: float) -> None:
    law, draft = torch.from_numpy(TARGET), torch.from_numpy(DRAFT)
    found = discount(law, draft, k)
    assert found == pytest.approx(rho, abs=6e-6)
    beta = float(draft.minimum(law / found).sum())
    reached = 1 - (1 - beta) ** k
    assert reached <= found * beta  # the valid side
    assert (law - draft.minimum(law / found) * reached / beta).min() >= -1e-15


@pytest.mark.parametrize(("length", "block", "chain"), [(1, 1.7, 1.7), (2, 2.25, 2.19), (3, 2.695, 2.533), (4, 3.0635, 2.7731)])
def test_block_verification_beats_token_verification(length: int, block: float, chain: float) -> None:
    assert tokens_per_step("chain", {}, "block", length, length) == pytest.approx(block, abs=1e-12)
    assert tokens_per_step("chain", {}, "chain", length, length) == pytest.approx(chain, abs=1e-12)


def make_tree(tokens: list[int], parents: list[int], drawn: Drawn, laws: np.ndarray | None) -> DraftTree:
    rows = np.full(len(tokens), -1)
    if laws is not None:
        inner = sorted({parent for parent in parents if parent >= 0})
        rows[inner] = range(len(inner))
    probs = torch.empty(0, 0) if laws is None else torch.from_numpy(laws)
    return DraftTree(np.array(tokens), np.array(parents), np.full(len(tokens), int(drawn)), rows, probs)


def law_of_rows(rows: np.ndarray, temperature: float = 1.0) -> TargetLaw:
    return TargetLaw(torch.from_numpy(rows).log(), SamplingParams(temperature=temperature))


@pytest.mark.parametrize("rule", RULES)
def test_root_alone_is_plain_sampling(rule: str) -> None:
    tree = make_tree([0], [-1], Drawn.DETERMINISTIC, None)
    law = {
        verdict.next_token: prob
        for prob, verdict, _ in enumerate_branches(lambda d: RULES[rule].rule(tree, law_of_rows(TARGET[None]), d))
    }
    assert [law[token] for token in range(3)] == pytest.approx(TARGET.tolist())


@pytest.mark.parametrize("rule", RULES)
def test_vocabulary_of_one(rule: str) -> None:
    drawn = Drawn.DETERMINISTIC
    tree = make_tree([0, 0, 0], [-1, 0, 1], drawn, None)
    verdict = RULES[rule].rule(tree, law_of_rows(np.ones((3, 1))), Draws(0))
    assert (verdict.path, verdict.next_token, verdict.kind) == ([1, 2], 0, "bonus")


@pytest.mark.parametrize("rule", [name for name, row in RULES.items() if Drawn.IID in row.drawn and name != "typical"])
def test_draft_equal_to_target_is_always_accepted(rule: str) -> None:
    tree = make_tree([0, 2, 1], [-1, 0, 1], Drawn.IID, np.stack([TARGET, TARGET]))
    for seed in range(200):
        verdict = RULES[rule].rule(tree, law_of_rows(np.stack([TARGET] * 3)), Draws(seed))
        assert verdict.path == [1, 2]


@pytest.mark.parametrize(
    "rule", [name for name, row in RULES.items() if Drawn.IID in row.drawn and "epsilon" not in row.options]
)
def test_no_overlap_is_never_accepted(rule: str) -> None:
    tree = make_tree([0, 0], [-1, 0], Drawn.IID, np.array([[1.0, 0.0, 0.0]]))
    rows = np.array([[0.0, 0.4, 0.6], [0.0, 0.0, 1.0]])
    for seed in range(50):
        verdict = RULES[rule].rule(tree, law_of_rows(rows), Draws(seed))
        assert verdict.path == [] and verdict.next_token in (1, 2) and verdict.kind == "recovered"


@pytest.mark.parametrize("rule", RULES)
def test_greedy_follows_the_argmax(rule: str) -> None:
    tree = make_tree([0, 2, 1], [-1, 0, 1], Drawn.DETERMINISTIC, None)
    rows = np.array([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]])
    verdict = RULES[rule].rule(tree, law_of_rows(rows, temperature=0), Draws(0))
    assert (verdict.path, verdict.next_token, verdict.kind) == ([1], 0, "recovered")


def test_exhausted_draft_law_returns_at_once() -> None:
    """Both tokens of the draft's support are rejected: what is left of the target's law is emitted."""
    tree = make_tree([0, 0, 1], [-1, 0, 0], Drawn.WITHOUT_REPLACEMENT, np.array([[0.5, 0.5, 0.0]]))
    rows = np.array([[0.0, 0.0, 1.0]] * 3)
    verdict = RULES["multiround"].rule(tree, law_of_rows(rows), Draws(1))
    assert (verdict.path, verdict.next_token) == ([], 2)


@pytest.mark.parametrize(
    ("tree", "options", "rule"),
    [
        ("dyspec", {}, "multiround"),
        ("sequoia", {"acceptance": [0.5, 0.3, 0.1]}, "multiround"),
        ("branching", {"num_chains": 3}, "multiround-iid"),
        ("branching", {"expansion": [3, 2], "merge": True}, "kseq"),
        ("topk", {}, "deterministic"),
        ("topk", {}, "kseq"),
        ("chain", {}, "chain"),
        ("chain", {}, "block"),
    ],
)
def test_certain_laws_give_the_verdict_of_the_rule_itself(tree: str, options: dict[str, Any], rule: str) -> None:
    """`follow` takes over at temperature 0; at temperature 1 the same one-hot rows go through the rule."""
    rng, paths = np.random.default_rng(1), set()
    for seed in range(150):
        drafter = TableExpander(random_law(3, seed % 9), 3, (0,))
        grower = GROWERS[tree].grower(**options)
        [grown] = [grower.grow(drafter, Work([None], [0], [Budget(6, 3)], [SamplingParams()], [Draws(seed)]))[0]]
        rows = np.eye(3)[rng.integers(3, size=grown.num_nodes)]
        fast, plain = (RULES[rule].rule(grown, law_of_rows(rows, temperature=t), Draws(seed)) for t in (0.0, 1.0))
        assert fast == plain
        paths.add((len(fast.path), fast.kind))
    assert len(paths) >= 3


@pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096])
def test_the_compiled_residuals_are_the_plain_ones(size: int) -> None:
    """Of laws that overlap, of equal ones (nothing is left) and of a law that has one token only.

    The plain version in float64 counts as exact. Compiled code adds the mass in float64. It rounds the difference, the
    reciprocal of the mass, and their product.
    """
    generator = torch.Generator().manual_seed(size)
    target, draft = (3 * torch.randn(2, size, generator=generator)).softmax(-1)
    code, only, unit = compiled.library(), torch.nn.functional.one_hot(torch.tensor(size // 2), size).float(), 2.0**-24

    def check(found: tuple[torch.Tensor, float], exact: tuple[torch.Tensor, float], roundings: int) -> None:
        """The mass has the error of the differences, so it counts once more."""
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1.01 * roundings * unit, atol=2.0**-149)
        assert found[1] == pytest.approx(exact[1], rel=unit, abs=0)

    for law, other in ((target, draft), (draft, target), (target, target), (only, draft)):
        plain, fast = compiled.OPERATIONS["subtract"]
        check(fast(code, law, other), plain(law.double(), other.double()), 4)
    for law, token in ((target, 0), (target, size - 1), (only, size // 2), (only, 0)):
        plain, fast = compiled.OPERATIONS["without"]
        check(fast(code, law, token), plain(law.double(), token), 2)
