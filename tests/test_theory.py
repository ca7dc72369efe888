"""The theory of Yin et al.: formulas against fixtures, linear programmes, enumeration of the real rules, and simulated runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import combinations, product
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from exact import enumerate_branches, joint_law, target_joint, target_law_of, tree_law
from foredraft.__main__ import main
from foredraft.core.contracts import Budget
from foredraft.drafters.along import AskedAlong
from foredraft.models.table import Law, random_law
from foredraft.rules import RULES
from foredraft.theory import figures, predict, transport
from foredraft.theory.chains import Pair, iid_pair, random_pair, read_pair, total_variation
from foredraft.theory.estimate import estimated_pair, merged
from foredraft.theory.rejections import (
    batch_rejections,
    check_acceptance,
    least_acceptance,
    lookahead_rejections,
    rejections_by_position,
    speculative_rejections,
    speedup,
)
from foredraft.theory.simulate import simulated_rejections
from foredraft.theory.speedup import (
    best_length,
    break_even_acceptance,
    chain_speedup,
    chain_tokens,
    interpolated,
)
from foredraft.theory.texts import Texts
from foredraft.theory.tradeoff import best_residual, front, least_loss, loss, optimal, reject_prob, uno
from foredraft.trees import GROWERS
from foredraft.trees.budget import best_paths

EXACT = 1e-12
FIXED = iid_pair([0.5, 0.5], [0.8, 0.2])
P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])


def markov_law(first: np.ndarray, steps: np.ndarray) -> Law:
    """Makes the law of a Markov chain: `first` for the empty prefix, then ``steps[n - 1][last token]`` after n tokens.

    The last matrix also serves all later tokens, so a single matrix makes a stationary chain.
    """

    def law(prefix: tuple[int, ...]) -> np.ndarray:
        return steps[min(len(prefix), len(steps)) - 1][prefix[-1]] if prefix else first

    return law


def random_laws(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(size, 0.7)), rng.dirichlet(np.full(size, 0.7))


# --- Theorems 1 to 3


@pytest.mark.parametrize(("drafts", "value"), [(1, 0.9), (2, 0.685875), (3, 0.594421875), (4, 0.551490234375), (inf, 0.51)])
def test_fixture_of_rejections(drafts: float, value: float) -> None:
    assert batch_rejections(FIXED, 3, drafts) == pytest.approx(value, abs=1e-12)


def test_rejections_by_position() -> None:
    assert rejections_by_position(FIXED, 3, 2) == pytest.approx([0.15, 0.2775, 0.258375], abs=EXACT)
    assert rejections_by_position(FIXED, 3, inf) == pytest.approx([0.0, 0.3, 0.21], abs=EXACT)


def test_theorem_1_is_the_expected_distance_under_the_target() -> None:
    pair, prefix, total = random_pair(4, 5, 3), np.ones(1), 0.0
    for p, q in pair.steps(5):
        total += prefix @ total_variation(p, q)
        prefix = prefix @ q
    assert speculative_rejections(pair, 5) == pytest.approx(total, abs=EXACT)
    same = Pair(pair.target, pair.target)
    assert speculative_rejections(same, 5) == 0
    assert speedup(5, 0.0) == 5


@pytest.mark.parametrize("seed", range(5))
def test_more_drafts_never_reject_more_and_never_reach_0(seed: int) -> None:
    pair = random_pair(7, 6, seed)
    values = [batch_rejections(pair, 6, m) for m in (1, 2, 4, 5, 50, inf)]
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    gaps = [batch_rejections(pair, 6, m) - values[-1] for m in (50, 500, 5000)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 2


@pytest.mark.parametrize("seed", range(5))
def test_theorem_2_bounds_every_unbiased_acceptance(seed: int) -> None:
    pair, rng = random_pair(5, 4, seed), np.random.default_rng(seed)
    own = check_acceptance(pair, 4, least_acceptance)
    assert own.is_unbiased
    assert own.rejections == pytest.approx(own.bound, abs=EXACT)
    shares = iter(rng.uniform(0, 1, 100))
    some = check_acceptance(pair, 4, lambda p, q: least_acceptance(p, q) * next(shares))
    assert some.is_unbiased
    assert some.rejections > some.bound
    over = check_acceptance(pair, 4, lambda p, q: np.minimum(1, least_acceptance(p, q) + 0.1))
    assert not over.is_unbiased


# --- A finite lookahead and the bonus token


@pytest.mark.parametrize("drafts", [1, 2, 4, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_lookahead_to_the_horizon_without_bonus_is_the_theorem(drafts: int, seed: int) -> None:
    pair = random_pair(7, 6, seed)
    found = lookahead_rejections(pair, 6, 6, drafts=drafts, bonus=False)
    assert found.rejections == pytest.approx(batch_rejections(pair, 6, drafts), abs=EXACT)


def test_a_lookahead_of_one_draft_without_bonus_rejects_as_often() -> None:
    for length in (1, 2, 3):
        found = lookahead_rejections(FIXED, 20, length, bonus=False)
        assert found.rejections == pytest.approx(speculative_rejections(FIXED, 20), abs=EXACT)


@pytest.mark.parametrize(("drafts", "value", "plain"), [(1, 54.9, 60.0), (4, 38.9, 47.4), (8, 37.2, 46.1)])
def test_the_bonus_token_changes_the_rejections(drafts: int, value: float, plain: float) -> None:
    found = lookahead_rejections(FIXED, 200, 4, drafts=drafts, tests_last=True)
    assert found.rejections == pytest.approx(value, abs=0.05)
    assert batch_rejections(FIXED, 200, drafts) == pytest.approx(plain, abs=0.05)


# --- The rules of the package, enumerated


def laws_of(pair: Pair, horizon: int) -> tuple[Any, Any]:
    def law(chain: Any) -> Any:
        return markov_law(chain[0][0], np.stack([chain[min(n, len(chain) - 1)] for n in range(1, max(2, horizon))]))

    return law(pair.draft), law(pair.target)


def enumerated(pair: Pair, horizon: int, *, merge: bool, drafts: int, lookahead: int | None = None) -> tuple[float, float]:
    """Expected rejections and rounds of the branching tree and its rule. Without a lookahead trees reach the horizon and
    what lies behind it is dropped; with one the last token is the target's own, as in the engine."""
    draft, target = laws_of(pair, horizon)
    size, rule = pair.vocab_size, RULES["multiround-iid"].rule

    @cache
    def ahead(prefix: tuple[int, ...]) -> tuple[float, float]:
        left = horizon - len(prefix)
        if left <= 0:
            return 0.0, 0.0
        depth = left if lookahead is None else min(lookahead, left - 1)
        context = (-1, *prefix)
        strip = lambda law: lambda path: law(path[1:])  # noqa: E731 - the -1 stands for a root before the first token
        if depth == 0:
            return 0.0, 1.0
        options = {"expansion": [drafts] + [1] * (depth - 1)} if merge else {"num_chains": drafts, "draft_depth": depth}
        grower = GROWERS["branching"].grower(merge=merge, **options)
        nodes = drafts * depth
        trees = tree_law(grower, strip(draft), size, Budget(nodes, depth), 1.0, context)
        rejections, rounds = 0.0, 1.0
        for prob, tree, keys in trees.values():
            law = target_law_of(strip(target), tree, context, 1.0)
            for share, verdict, _ in enumerate_branches(lambda draws, t=tree, w=law: rule(t, w, draws), keys):
                emitted = (*tree.tokens[verdict.path].tolist(), verdict.next_token)[:left]
                more = ahead((*prefix, *emitted))
                rejected = verdict.kind == "recovered" and len(verdict.path) < depth
                rejections += prob * share * (rejected + more[0])
                rounds += prob * share * more[1]
        return rejections, rounds

    return ahead(())


@pytest.mark.parametrize(("drafts", "horizon"), [(1, 3), (2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_batch_has_the_rejections_of_theorem_3(drafts: int, horizon: int, seed: int) -> None:
    pair = random_pair(2, horizon, seed)
    rejections, _ = enumerated(pair, horizon, merge=False, drafts=drafts)
    assert rejections == pytest.approx(batch_rejections(pair, horizon, drafts), abs=EXACT)


def test_the_merged_variant_is_another_rule_and_rejects_less() -> None:
    pair = random_pair(2, 3, 0)
    merged, _ = enumerated(pair, 3, merge=True, drafts=2)
    assert merged < batch_rejections(pair, 3, 2) - 1e-4


@pytest.mark.parametrize(("drafts", "lookahead"), [(1, 2), (1, 3), (2, 1), (2, 2)])
def test_rounds_of_the_engine(drafts: int, lookahead: int) -> None:
    pair = random_pair(2, 5, 2)
    found = lookahead_rejections(pair, 5, lookahead, drafts=drafts)
    rejections, rounds = enumerated(pair, 5, merge=False, drafts=drafts, lookahead=lookahead)
    assert rejections == pytest.approx(found.rejections, abs=EXACT)
    assert rounds == pytest.approx(found.target_calls, abs=EXACT)


# --- Quality against rejections


def least_loss_by_programme(p: np.ndarray, q: np.ndarray, b: np.ndarray) -> float:
    """min over laws P of sum |q - b p - Z P| / 2: variables P and the absolute values."""
    size, z = len(p), reject_prob(p, b)
    eye, rest = np.eye(size), q - b * p
    upper = np.block([[-z * eye, -eye], [z * eye, -eye]])
    equal = np.concatenate([np.ones(size), np.zeros(size)])[None]
    cost = np.concatenate([np.zeros(size), np.full(size, 0.5)])
    found = linprog(cost, A_ub=upper, b_ub=np.concatenate([-rest, rest]), A_eq=equal, b_eq=[1.0], method="highs")
    return float(found.fun)


@pytest.mark.parametrize("seed", range(200))
def test_theorem_4_is_the_minimum_of_the_linear_programme(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = random_laws(2 + seed % 7, seed)
    b = rng.uniform(0, 1, len(p))
    assert least_loss(p, q, b) == pytest.approx(least_loss_by_programme(p, q, b), abs=1e-10)
    assert loss(p, q, b, best_residual(p, q, b)) == pytest.approx(least_loss(p, q, b), abs=EXACT)


def test_theorem_5_is_a_line_for_over_acceptance_and_a_bound_below() -> None:
    rng, strict = np.random.default_rng(0), 0
    for seed in range(1000):
        p, q = random_laws(2 + seed % 9, seed)
        least, distance = least_acceptance(p, q), np.abs(p - q).sum() / 2
        over = least + (1 - least) * rng.uniform(0, 1, len(p))
        assert reject_prob(p, over) + least_loss(p, q, over) == pytest.approx(distance, abs=EXACT)
        below = least * rng.uniform(0, 1, len(p))
        total = reject_prob(p, below) + least_loss(p, q, below)
        assert total >= distance - EXACT
        strict += total > distance + 1e-6
    assert strict > 900


@pytest.mark.parametrize(
    ("epsilon", "reject", "best", "other"),
    [(0, 0.3, 0.0, 0.15), (0.1, 0.2, 0.1, 0.2), (0.2, 0.1, 0.2, 0.25), (0.3, 0.0, 0.3, 0.3)],
)
def test_fixture_of_the_dial(epsilon: float, reject: float, best: float, other: float) -> None:
    assert optimal(P, Q, epsilon) == pytest.approx((reject, best), abs=EXACT)
    assert uno(P, Q, epsilon) == pytest.approx((reject, other), abs=EXACT)
    assert [tuple(one) for one in front(P, Q, 2)] == [pytest.approx((0.3, 0.0)), pytest.approx((0.0, 0.3))]


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("name", ["tolerance", "uno"])
def test_the_rule_has_exactly_the_loss_of_the_theory(name: str, epsilon: float) -> None:
    """One draft, enumerated; and the bound that the verdict carries is that loss."""
    for seed in range(4):
        draft, target = random_law(3, 10 + seed), random_law(3, 20 + seed)
        trees = tree_law(GROWERS["chain"].grower(), draft, 3, Budget(1, 1), 1.0, (0,))
        rule = RULES[name].with_options(epsilon=epsilon)
        law = joint_law(trees, rule, target, 3, 2, temperature=1.0, prefix=(0,)).sum(1)  # of the first token
        p, q = draft((0,)), target((0,))
        wanted = (optimal if name == "tolerance" else uno)(p, q, epsilon)
        assert np.abs(law - q).sum() / 2 == pytest.approx(wanted.loss, abs=EXACT)
        for _, tree, keys in trees.values():
            row = target_law_of(target, tree, (0,), 1.0)
            for _, verdict, _ in enumerate_branches(lambda draws, t=tree, w=row, r=rule: r(t, w, draws), keys):
                assert verdict.tv_bounds[0] == pytest.approx(wanted.loss, abs=EXACT)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_tolerance_0_is_lossless_and_uno_is_not(nodes: int) -> None:
    draft, target = random_law(3, 1), random_law(3, 3)
    trees = tree_law(GROWERS["chain"].grower(), draft, 3, Budget(nodes, nodes), 1.0, (0,))
    answer = target_joint(target, 3, nodes + 1, 1.0, (0,))
    errors = {}
    for name in ("tolerance", "uno"):
        law = joint_law(trees, RULES[name].with_options(epsilon=0.0), target, 3, nodes + 1, temperature=1.0, prefix=(0,))
        errors[name] = np.abs(law - answer).max()
    assert errors["tolerance"] < EXACT
    assert errors["uno"] > 1e-3


# --- The optimum over all rules


def iid_set_probs(p: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Computes the distribution of the set of distinct tokens among k independent draws."""
    size = len(p)
    inside_of = {tokens: float(p[list(tokens)].sum()) ** k for n in range(k + 1) for tokens in combinations(range(size), n)}
    probs: dict[tuple[int, ...], float] = {}
    for tokens in inside_of:
        subsets = (subset for n in range(len(tokens) + 1) for subset in combinations(tokens, n))
        prob = sum((-1) ** (len(tokens) - len(subset)) * inside_of[subset] for subset in subsets)
        if prob > 1e-15:
            probs[tokens] = prob
    return probs


@pytest.mark.parametrize("seed", range(30))
def test_optimum_with_replacement_is_that_of_the_linear_programme(seed: int) -> None:
    p, q = random_laws(3 + seed % 4, seed)
    for k in (1, 2, 3):
        exact = transport.by_programme(iid_set_probs(p, k), q)
        assert transport.with_replacement(p, q, k) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_bounds_without_replacement(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = random_laws(7, seed)
    for k in (1, 2, 3):
        exact = transport.without_replacement(p, q, k)
        assert exact.low == exact.high
        with monkeypatch.context() as patched:
            patched.setattr(transport, "MOST_SETS", 0)
            low, high = transport.without_replacement(p, q, k)
        assert low - 1e-9 <= exact.low <= high + 1e-9
        assert exact.low >= transport.multiround_without_replacement(p, q, k) - 1e-9


def test_probability_that_all_draws_lie_inside() -> None:
    p, _ = random_laws(6, 0)
    for k in (1, 2, 3):
        sets = transport.set_probs(p, k)
        assert sum(sets.values()) == pytest.approx(1)
        wanted = sum(prob for some, prob in sets.items() if set(some) <= {0, 2, 3, 5})
        assert transport.inside(p[[0, 2, 3, 5]], float(p[[1, 4]].sum()), k) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(
    ("k", "spec", "kseq", "without", "topk"),
    [(1, 0.7, 0.7, 0.7, 0.2), (2, 0.76, 0.79136, 0.82, 0.5), (3, 0.808, 0.85852, 1.0, 1.0)],
)
def test_table_of_single_node_acceptance(k: int, spec: float, kseq: float, without: float, topk: float) -> None:
    found = transport.reached(P, Q, k)
    assert found == pytest.approx({"multiround-iid": spec, "kseq": kseq, "deterministic": topk}, abs=1e-5)
    assert transport.multiround_without_replacement(P, Q, k) == pytest.approx(without, abs=EXACT)
    assert transport.with_replacement(P, Q, k) >= max(spec, kseq) - EXACT


# --- Trees and speed


def expected_tokens(paths: Sequence[tuple[int, ...]], acceptance: Sequence[float]) -> float:
    """Computes the tokens per step: 1, plus for every node the product of the acceptances on its path.

    Args:
        paths: the nodes below the root, with all parents and elder siblings.
        acceptance: probability that a child is accepted, by its sibling rank, given that its parent was accepted; 0 for
            higher ranks.

    Source: Sequoia (arXiv 2402.12374), section 4.1, the positional acceptance assumption.

    Raises:
        ValueError: a node's parent or elder sibling is missing, or an acceptance is outside 0 to 1.
    """
    rates = list(acceptance)
    known = {(), *paths}
    for path in paths:
        elder = (*path[:-1], path[-1] - 1) if path[-1] else ()
        if path[:-1] not in known or elder not in known:
            raise ValueError(f"node {path} is without its parent or its elder sibling")
    return 1.0 + sum(prod(rates[rank] if rank < len(rates) else 0.0 for rank in path) for path in set(paths))


def best_by_search(acceptance: Sequence[float], nodes: int, depth: int) -> float:
    """Computes the tokens per step of the best tree, by trying all trees of up to `nodes` nodes.

    It is a reference for `best_tree`, for small numbers of nodes.
    """
    ranks = range(min(nodes, len(acceptance)))
    candidates = [path for length in range(1, depth + 1) for path in product(ranks, repeat=length)]

    def grow(tree: frozenset[tuple[int, ...]], left: int) -> float:
        value = expected_tokens(sorted(tree), acceptance)
        if not left:
            return value
        return max([value] + [grow(tree | {path}, left - 1) for path in candidates if path not in tree and _fits(path, tree)])

    return grow(frozenset(), nodes)


def _fits(path: tuple[int, ...], tree: frozenset[tuple[int, ...]]) -> bool:
    has_parent = len(path) == 1 or path[:-1] in tree
    return has_parent and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree)


def test_trees_of_sequoias_table() -> None:
    rates = [0.6, 0.2, 0.1, 0.05]
    values = [expected_tokens(best_paths(rates, Budget(nodes - 1, nodes - 1)), rates) for nodes in (2, 4, 8, 16, 32)]
    assert values == pytest.approx([1.6, 2.176, 2.7456, 3.30936, 3.86849], abs=1e-5)
    for nodes in (1, 2, 3, 4):
        found = expected_tokens(best_paths(rates[:3], Budget(nodes, min(nodes, 3))), rates[:3])
        assert found == pytest.approx(best_by_search(rates[:3], nodes, 3))
    with pytest.raises(ValueError, match="without its parent"):
        expected_tokens([(0, 0)], rates)


def test_chains_and_their_break_even() -> None:
    assert chain_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert chain_tokens([0.8, 0.5], 3) == pytest.approx(1 + 0.8 + 0.4 + 0.2)
    verify = interpolated({1: 1.0, 9: 1.4})
    assert verify(5) == pytest.approx(1.2)
    even = break_even_acceptance(4, 0.1, verify)
    assert even is not None
    assert chain_speedup(even, 4, 0.1, verify) == pytest.approx(1.0, abs=1e-9)
    assert break_even_acceptance(4, 2.0, verify) is None
    best = best_length(0.8, 0.05, verify, 16)
    assert best.speedup == max(chain_speedup(0.8, k, 0.05, verify) for k in range(1, 17))
    assert best_length(0.1, 1.0, verify) == (0, 1.0)


# --- Simulation. 40,000 runs, 4 standard errors: a false alarm of 6e-5 a comparison, with fixed seeds.


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_simulated_runs_reject_as_often_as_the_theory_says(drafts: int) -> None:
    pair = random_pair(7, 6, 5)
    means = simulated_rejections(pair, 6, drafts, 40_000, seed=drafts)
    theory = np.cumsum(rejections_by_position(pair, 6, drafts))
    for mean, wanted in zip(means, theory, strict=True):
        assert abs(mean.value - wanted) < 4 * mean.error


# --- The command line


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["theory", *arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


LAWS = ("--p", "0.5,0.5", "--q", "0.8,0.2")


def test_command_rejections(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "rejections", *LAWS, "--horizon", "3", "--drafts", "2", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["expected_rejections"] == 0.685875
    assert (found["one_draft"], found["limit"]) == (0.9, 0.51)
    code, out, _ = run(
        capsys, "rejections", "--states", "7", "--horizon", "6", "--lookahead", "3", "--simulate", "50", "--json"
    )
    found = json.loads(out)
    assert found["lookahead"]["target_calls"] > 0
    assert found["simulated"]["standard_error"] > 0


def test_commands_as_tables_and_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    commands: dict[str, tuple[str, ...]] = {
        "rejections": (*LAWS, "--horizon", "6", "--simulate", "20"),
        "batch": (*LAWS, "--horizon", "6", "--drafts", "3"),
        "tradeoff": LAWS,
        "speedup": ("--acceptance", "0.8", "--verify-cost", "1:1,8:1.2", "--longest", "4"),
    }
    for name, arguments in commands.items():
        for ending in (".png", ".svg"):
            file = tmp_path / f"{name}{ending}"
            code, out, err = run(capsys, name, *arguments, "--plot", str(file))
            assert (code, err) == (0, "")
            assert out
            assert file.stat().st_size > 1000


def test_laws_from_a_file(tmp_path: Path) -> None:
    pair = random_pair(3, 4, 0)
    file = tmp_path / "laws.json"
    file.write_text(
        json.dumps({"draft": [one.tolist() for one in pair.draft], "target": [one.tolist() for one in pair.target]})
    )
    assert batch_rejections(read_pair(file), 4, 2) == pytest.approx(batch_rejections(pair, 4, 2), abs=EXACT)
    file.write_text(json.dumps({"draft": [0.5, 0.5], "target": [0.8, 0.2]}))
    assert batch_rejections(read_pair(file), 3, 2) == pytest.approx(0.685875, abs=EXACT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("rejections", "--states", "2000000"),
            "vocabulary too large to enumerate: two chains of 50 matrices over 2000000 tokens",
        ),
        (("rejections", "--p", "0.5,0.6", "--q", "0.8,0.2"), "p sums to 1.1, but probabilities must sum to 1"),
        (("rejections", "--p", "0.5,0.5", "--q", "1.2,-0.2"), "q has an entry that is not a probability: -0.2"),
        (("rejections", "--p", "1,0", "--q", "0.5,0.5"), "p has no support where q has mass: token 1"),
        (("rejections", "--p", "0.5,0.5", "--q", "0.2,0.3,0.5"), "p has 2 tokens and q 3"),
        (("rejections", *LAWS, "--drafts", "0"), "the number of drafts M must be a whole number of at least 1, or inf, got 0"),
        (("rejections", *LAWS, "--drafts", "two"), "--drafts must be a whole number or inf, got 'two'"),
        (("rejections", *LAWS, "--horizon", "0"), "horizon must be at least 1 token, got 0"),
        (("rejections", *LAWS, "--lookahead", "0"), "the lookahead K must be at least 1 token, got 0"),
        (("rejections",), "give the laws once"),
        (("rejections", *LAWS, "--states", "3"), "give the laws once"),
        (("rejections", "--p", "a,b", "--q", "0.8,0.2"), "--p must be numbers separated by commas, got 'a,b'"),
        (("rejections", "--laws", "nowhere.json"), "cannot read laws from 'nowhere.json'"),
        (("batch", *LAWS, "--drafts", "0"), "the number of drafts M must be a whole number of at least 1, got 0"),
        (("tradeoff", *LAWS, "--epsilon", "-0.1"), "epsilon must be 0 (lossless) or more, got -0.1"),
        (("tradeoff", *LAWS, "--plot", "line.pdf"), "the file of a figure must end in .png or .svg"),
        (("speedup", "--acceptance", "1.5"), "acceptance must be between 0 and 1"),
        (("speedup", "--acceptance", "0.5", "--verify-cost", "x"), "--verify-cost must be a number or NODES:COST"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    first, *rest = err.strip().splitlines()
    assert first.startswith("error: ")
    assert all(line.startswith("hint: ") for line in rest)
    assert says in err.replace("\nhint: ", ". ")


@pytest.mark.slow
def test_the_points_of_figure_2_lie_within_three_standard_errors_of_the_line() -> None:
    """The committed figure: 7 states, 50 tokens, 5000 runs; a dozen points of each of eleven curves."""
    found = figures.curves(random_pair(7, 50, 0), 50, figures.RUNS, 0)
    assert max(abs(one) for curve in found.values() for one in curve.deviations()) < 3
    assert all(len(curve.deviations()) >= 12 for curve in found.values())


def test_too_many_orders_are_refused() -> None:
    p = np.full(4096, 1 / 4096)
    with pytest.raises(
        ValueError, match="vocabulary too large to enumerate: 3 drafts among 4096 tokens come in 16,773,120 orders"
    ):
        transport.multiround_without_replacement(p, p[::-1].copy(), 3)


STORIES = [str(Path(__file__).parent / "data" / name) for name in ("babyllama-105", "babyllama-105-b")]


def test_chains_estimated_from_a_real_pair(tmp_path: Path) -> None:
    """A state that was visited once has the very laws of the two models there, with the rare tokens merged."""
    prompts = tmp_path / "stories.txt"
    prompts.write_text("Once upon a time\n")
    texts = Texts(prompts, *STORIES, max_tokens=24, dtype="float64", raw=True)
    pair, tokens = estimated_pair(texts, 12)
    assert pair.vocab_size == len(tokens) + 1 == 12
    llm = texts.load().with_speculation({**texts.drafting, "tree": "chain", "num_speculative_tokens": 1})
    plain = texts.load().generate(texts.encoded(llm), texts.sampling)[0]
    laws = predict.laws_of(
        AskedAlong(llm.target, llm.drafter_grown_by), plain.prompt_token_ids, plain.outputs[0].token_ids, texts.sampling
    )
    place = np.full(llm.target.vocab_size, 11)
    place[tokens] = np.arange(11)
    last = place[[plain.prompt_token_ids[-1], *plain.outputs[0].token_ids[:-1]]]
    [once, *_] = [state for state in range(11) if (last == state).sum() == 1]
    for chain, rows in zip((pair.draft, pair.target), laws, strict=True):
        states = merged(rows, place, 12)
        np.testing.assert_allclose(chain[0][0], states[0], rtol=1e-12)
        np.testing.assert_allclose(chain[1][once], states[list(last).index(once)], rtol=1e-12)
        np.testing.assert_allclose(chain[1].sum(-1), 1, rtol=1e-12)
        never = [state for state in range(12) if state not in last]
        np.testing.assert_allclose(chain[1][never], np.tile(states.mean(0), (len(never), 1)), rtol=1e-12)


HEADS = Path(__file__).parent / "data" / "heads"


@pytest.mark.parametrize("drafter", [STORIES[1], str(HEADS / "eagle"), str(HEADS / "medusa")])
def test_the_chains_of_a_real_pair_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], drafter: str) -> None:
    prompts, laws = tmp_path / "stories.txt", tmp_path / "laws.json"
    prompts.write_text("Once upon a time\nThe cat\n")
    given = ("--model", STORIES[0], "--drafter", drafter, "--raw", "--prompts", str(prompts), "--max-tokens", "16")
    code, out, err = run(capsys, "estimate", *given, "--states", "8", "--output", str(laws))
    assert (code, err) == (0, "")
    assert "chains over 8 states" in out
    code, out, err = run(capsys, "rejections", "--laws", str(laws), "--horizon", "10", "--drafts", "2", "--json")
    assert (code, err) == (0, "")
    assert 0 < json.loads(out)["expected_rejections"] < 10
    nowhere = ("--output", str(tmp_path / "nowhere" / "laws.json"))
    for states, says in (("1", "at least 2 states"), ("8", "cannot write")):
        code, out, err = run(capsys, "estimate", *given, "--states", states, *nowhere)
        assert (code, out) == (1, "")
        assert says in err


@pytest.mark.parametrize("method", ["eagle3", "ctc", pytest.param("hydra", marks=pytest.mark.slow)])
def test_rejections_of_a_head_are_predicted_for_one_token(tmp_path: Path, method: str) -> None:
    """480 tokens or more a number of drafts: a z of 4 or more has a chance below 1e-4; the seed is fixed."""
    prompts = tmp_path / "stories.txt"
    prompts.write_text("Once upon a time\nThe cat sat\nOne day\nMy dog is\n")
    texts = Texts(prompts, STORIES[0], str(HEADS / method), max_tokens=40, repeats=3, dtype="float64", raw=True)
    found = predict.predict(texts, lookahead=1, drafts=(1, 2))
    for one in found.compared:
        assert abs(one.counted - one.predicted) < 4 * one.standard_error
        assert one.counted > 50
    with pytest.raises(ValueError, match="Use --lookahead 1"):
        predict.predict(texts, lookahead=4, drafts=(1,))
