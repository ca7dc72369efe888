"""The batched rule against the rule that verifies one tree: on random trees, in engines, and where something fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from exact import Branches, Replay
from foredraft import LLM, SamplingParams, kernels
from foredraft.core.contracts import Verdict
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree, Drawn, TreeBatch
from foredraft.engine import deciding
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.kernels.sets import using
from foredraft.models.table import TableTarget
from foredraft.rules import RULES
from foredraft.rules.batched import PURPOSES, Verdicts, batched_form, verify
from foredraft.rules.multiround import ForSampled, multiround
from foredraft.rules.residual import subtract, without
from instruction_sets import NAMES, code_of
from test_schedules import DRAFTING, LAW, VOCAB, hashed

pytestmark = pytest.mark.unchecked

NUM_TREES, OF_A_BATCH = 100_000, 500
SIZES = (1, 2, 3, 5, 17, 33)
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2, top_k=2),
    SamplingParams(temperature=0.7, top_k=4, top_p=0.83),
    SamplingParams(temperature=1, top_p=0.93),
    SamplingParams(temperature=1.3, min_p=0.07),
    SamplingParams(temperature=0.9, top_p=0.37, min_p=0.01, top_k=9),
]


@dataclass
class Given:
    """Random trees with what decides about them."""

    batch: TreeBatch
    logits: torch.Tensor
    sampling: list[SamplingParams]
    draws: list[Draws]

    @property
    def uniforms(self) -> np.ndarray:
        found = self.draws[0].of_nodes(self.draws, PURPOSES, self.batch.offsets, self.batch.parents)
        assert found is not None
        return found

    def batched(self) -> Verdicts:
        return verify(self.batch, self.logits, self.sampling, self.uniforms)

    def law(self, b: int) -> TargetLaw:
        return TargetLaw(self.logits[self.batch.offsets[b] : self.batch.offsets[b + 1]], self.sampling[b])

    def alone(self) -> list[Verdict]:
        """What `multiround` decides on each tree."""
        return [multiround(self.batch[b], self.law(b), self.draws[b]) for b in range(len(self.batch))]


def given_at(number: int, count: int = OF_A_BATCH, dtype: torch.dtype = torch.float32) -> Given:
    """A batch of random trees of 1 to 9 nodes. Siblings may be equal, and tokens may have draft probability 0.

    One batch in four has sparse draft laws, and one in five has logits that are tied, infinite or NaN.
    """
    rng = np.random.default_rng(number)
    size = int(rng.choice(SIZES))
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 10, count))])
    nodes, begin = int(offsets[-1]), offsets[:-1].repeat(np.diff(offsets))
    own = np.arange(nodes) - begin
    drawn = rng.integers(0, 3, nodes)
    probs = rng.dirichlet(np.full(size, 0.6), 40) * rng.integers(0, 4, (40, size)).clip(max=1)
    probs /= probs.sum(1, keepdims=True).clip(min=1e-9)
    token_ids = None
    if number % 4 == 0:
        kept = int(rng.integers(1, size + 1))
        token_ids = torch.from_numpy(rng.permuted(np.tile(np.arange(size), (40, 1)), axis=1)[:, :kept].copy())
        probs = rng.dirichlet(np.full(kept, 0.6), 40)
    batch = TreeBatch(
        tokens=rng.integers(0, size, nodes),
        parents=np.where(own == 0, -1, (rng.random(nodes) * own).astype(np.int64)),
        drawn=drawn,
        draft_row=np.where(drawn == 0, -1, rng.integers(0, 40, nodes)),
        offsets=offsets,
        draft_probs=torch.from_numpy(probs).to(dtype),
        draft_ids=token_ids,
        vocab_size=size,
    )
    logits = 2 * torch.from_numpy(rng.standard_normal((nodes, size)))
    if number % 5 == 0:
        logits[::3] = logits[::3].round()
        logits[::11, 0], logits[5::17], logits[7::19, -1] = torch.nan, -torch.inf, torch.inf
        logits[1::2, ::2] = -torch.inf
    sampling = [SAMPLINGS[i] for i in rng.integers(0, len(SAMPLINGS), count)]
    draws = [Draws(int(seed), int(at)) for seed, at in rng.integers(0, 1 << 40, (count, 2))]
    return Given(batch, logits.to(dtype), sampling, draws)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batched rule runs in torch, whatever runs the rule of one tree."""
    plain = kernels.OPERATIONS["accept"].plain
    found = kernels.Operation(plain, lambda code, *given, **options: plain(*given, **options))
    monkeypatch.setitem(kernels.OPERATIONS, "accept", found)


def differing(given: Given, found: Verdicts) -> list[int]:
    return [b for b, (mine, theirs) in enumerate(zip(found.verdicts, given.alone(), strict=True)) if mine != theirs]


def test_verdicts_are_those_of_the_rule() -> None:
    """On 100,000 trees. Compiled code gives every one; torch those beyond rounding, see `foredraft.rules.batched`."""
    exact, plain = kernels.library() is not None, kernels.OPERATIONS["accept"].plain
    fast, close, kinds = kernels.OPERATIONS["accept"], 0, set()
    for number in range(NUM_TREES // OF_A_BATCH):
        given = given_at(number)
        alone = given.alone()
        found = given.batched().verdicts
        if exact:
            assert found == alone, f"batch {number}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(kernels.OPERATIONS, "accept", fast._replace(compiled=lambda _, *a, **k: plain(*a, **k)))
                found = given.batched().verdicts
        for b, (mine, theirs) in enumerate(zip(found, alone, strict=True)):
            if mine != theirs:
                close += 1
                assert is_close(given, b), f"tree {b} of batch {number}"
        kinds.update((len(one.path), one.kind) for one in alone)
    assert close <= 10
    assert len(kinds) > 8
    given = given_at(7)  # what is called close is rare
    assert sum(is_close(given, b) for b in range(OF_A_BATCH)) < OF_A_BATCH / 100


def is_close(given: Given, b: int) -> bool:
    """Whether a random number lies within the stated rounding of a threshold, on the way of the rule in float64."""
    tree, logits, unit = given.batch[b], given.law(b)._logits, 2.0**-22
    if given.sampling[b].temperature == 0:
        return False
    exact = TargetLaw(logits.double(), given.sampling[b])
    scaled = logits.nan_to_num(0, 0, 0).abs().max() / given.sampling[b].temperature
    size, node, draws = logits.shape[1], 0, given.draws[b]
    while True:
        residual, error = exact.row(node), unit * (8 + float(scaled) + size / 16)
        draft, draft_error = tree.law(node), 0.0
        draft = None if draft is None else draft.double()
        for child in tree.children[node]:
            token = int(tree.tokens[child])
            prob = 1.0 if draft is None else float(draft[token])
            if prob == 0:  # also after rounding
                child = None
                break
            limit, uniform = float(residual[token]) / prob, draws.uniform(("accept", tree.ranks[child], 0))
            if abs(uniform - limit) <= (error + limit * draft_error) / prob + unit:
                return True
            if uniform < limit:
                break
            left = residual.clone().index_fill_(0, torch.tensor(token), 0) if draft is None else (residual - draft).clamp(min=0)
            error = 2 * (error + draft_error) / max(float(left.sum()), 1e-300) + unit
            residual = subtract(residual, draft, token)
            if draft is not None and tree.drawn[node] == Drawn.WITHOUT_REPLACEMENT:
                draft_error = 2 * draft_error / max(1 - prob, 1e-300) + unit
                draft = without(draft, token)
        else:
            child = None
        if child is None:
            bounds = residual.cumsum(0) / residual.sum()
            return bool((bounds - draws.uniform(("next", tree.ranks[node], 0))).abs().min() <= 2 * error)
        node = child


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_verdicts_of_other_dtypes(dtype: torch.dtype) -> None:
    """In float64 both compute in torch; logits of 16 bits become float32 for both."""
    for number in range(6):
        given = given_at(number, 200, torch.float64 if dtype == torch.float64 else torch.float32)
        given.logits = given.logits.to(dtype)
        assert given.batched().verdicts == given.alone()


@pytest.mark.parametrize("name", NAMES)
def test_verdicts_are_those_of_the_rule_on_every_set(name: str) -> None:
    with using(code_of(name)):
        for number in range(8):
            given = given_at(number, 100)
            assert given.batched().verdicts == given.alone()


def test_what_the_verdicts_say_of_missing_laws(in_torch: None) -> None:
    """The first node of the path whose logits define no law, as `TargetLaw.failure` tells it; in torch and compiled."""
    for compiled in (False, True):
        for number in (0, 5, 10):
            given = given_at(number, 150)
            found = given.batched() if not compiled else _compiled(given)
            for b, (verdict, lawless) in enumerate(zip(found.verdicts, found.lawless, strict=True)):
                law = given.law(b)
                assert lawless == next((node for node in (0, *verdict.path) if law.failure(node)), -1)


def _compiled(given: Given) -> Verdicts:
    with pytest.MonkeyPatch.context() as patch:
        fast = kernels.acceptance.accept_compiled
        patch.setitem(kernels.OPERATIONS, "accept", kernels.Operation(kernels.acceptance.accept, fast))
        return given.batched()


def test_groups_of_trees_are_verified_one_after_another(in_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose laws would not fit into memory together."""
    given = given_at(3, 60)
    whole = given.batched()
    for most in (1, 100, 1000):
        monkeypatch.setattr(kernels.acceptance, "_MOST_NUMBERS", most)
        assert given.batched() == whole


def test_a_greedy_step_computes_no_law(in_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = given_at(1, 40)
    given.sampling = [SamplingParams(temperature=0)] * 40
    monkeypatch.setattr(torch.Tensor, "softmax", None)
    found = verify(given.batch, given.logits, given.sampling, None)
    monkeypatch.undo()
    assert found.verdicts == given.alone()


def test_rows_say_where_the_logits_are() -> None:
    given = given_at(2, 30)
    order = np.random.default_rng(0).permutation(30)
    parts = [given.logits[given.batch.offsets[b] : given.batch.offsets[b + 1]] for b in order]
    starts = np.zeros(30, np.int64)
    starts[order] = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    moved = verify(given.batch, torch.cat(parts), given.sampling, given.uniforms, starts)
    assert moved == given.batched()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.array([0, 7])},
        {"parents": np.array([-1, 1])},
        {"draft_row": np.array([5, -1])},
        {"draft_ids": torch.tensor([[0, 9]]), "vocab_size": 3},
        {"draft_probs": torch.ones(1, 4)},
    ],
)
def test_a_tree_that_cannot_be_read_is_refused(change: dict[str, Any]) -> None:
    """Compiled code reads nothing outside the arrays, and on a GPU a wrong index would end all work."""
    parts = {"tokens": np.array([0, 1]), "parents": np.array([-1, 0]), "drawn": np.array([1, 0])}
    batch = TreeBatch(**parts, draft_row=np.array([0, -1]), offsets=np.array([0, 2]), draft_probs=torch.full((1, 3), 1 / 3))
    if "draft_ids" in change:
        batch = replace(batch, draft_probs=torch.full((1, 2), 0.5))
    with pytest.raises((ValueError, RuntimeError), match=r"cannot be read|draft laws have 4|index 9 is out|shape mismatch"):
        verify(replace(batch, **change), torch.zeros(2, 3), [SamplingParams()], np.full((2, 2), 0.5))


# --- Which rules have a batched form


def chain_tree(drawn: Drawn, children: int = 1) -> DraftTree:
    rows = np.array([-1 if drawn is Drawn.DETERMINISTIC else 0, *[-1] * children])
    parents = np.array([-1, *[0] * children])
    drawns = np.array([int(drawn), *[0] * children])
    return DraftTree(np.arange(children + 1), parents, drawns, rows, torch.full((1, 4), 0.25))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drawn", Drawn)
@pytest.mark.parametrize("children", [1, 2])
def test_a_batched_form_is_exact_where_its_rule_is(rule: str, drawn: Drawn, children: int) -> None:
    row, tree = RULES[rule], chain_tree(drawn, children)
    form = batched_form(row.rule)
    assert (form is not None) == bool(row.batched)
    if form is not None:
        try:
            row.rule(tree, TargetLaw(torch.zeros(3, 4), SamplingParams()), Draws(0))
        except ValueError:
            assert not form(tree)
        else:
            assert form(tree)


def test_a_rule_for_sampled_trees_is_batched_where_its_parts_are() -> None:
    sampled, unsampled = chain_tree(Drawn.IID), chain_tree(Drawn.DETERMINISTIC)
    for name, wanted in (("multiround-iid", True), ("block", False)):
        form = batched_form(ForSampled(RULES[name].rule))
        assert form is not None and (form(sampled), form(unsampled)) == (wanted, True)
    assert batched_form(lambda *given: None) is None


def test_the_rule_of_chains_gives_the_verdicts_of_multiround() -> None:
    """It shares the batched form, so both must agree on chains whose tokens have draft probability."""
    rng = np.random.default_rng(0)
    for seed in range(500):
        nodes = int(rng.integers(1, 5))
        rows, drawn = np.arange(nodes), np.array([*rng.integers(0, 3, nodes)])
        laws = torch.from_numpy(rng.dirichlet(np.ones(4), nodes)).float()
        tree = DraftTree(rng.integers(0, 4, nodes), np.arange(-1, nodes - 1), drawn, np.where(drawn, rows, -1), laws)
        law = TargetLaw(torch.from_numpy(rng.standard_normal((nodes, 4))).float(), SamplingParams())
        assert RULES["chain"].rule(tree, law, Draws(seed)) == multiround(tree, law, Draws(seed))


# --- In an engine


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every batch is verified together, however small; the list has the number of trees of each."""
    found: list[int] = []

    def counted(*given: Any) -> Verdicts:
        found.append(len(given[0]))
        return verify(*given)

    monkeypatch.setattr(deciding, "_SMALL_BATCH_LOGITS", 0)
    monkeypatch.setattr(deciding, "verify", counted)
    return found


REQUESTS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1, max_tokens=25, ignore_eos=True, seed=1),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=20, ignore_eos=True, seed=2, logprobs=2),
    SamplingParams(temperature=1, max_tokens=15, ignore_eos=True, seed=3, repetition_penalty=1.2),
    SamplingParams(temperature=1, max_tokens=15, ignore_eos=True, seed=4, speculative=False),
    SamplingParams(temperature=1.1, top_k=5, max_tokens=20, ignore_eos=True, seed=5, n=2),
]


def outputs_of(drafting: str) -> list[Any]:
    target = TableTarget(hashed(LAW), VOCAB)
    options = EngineOptions(max_num_seqs=8)
    engine = Engine(target, max_model_len=96, options=options, num_kv_blocks=80, **DRAFTING[drafting]())
    for sampling in REQUESTS:
        engine.add_request(None, [1, 2, 3, 4, 5], sampling)
    found = {}
    while engine.has_unfinished_requests():
        found |= {output.request_id: output for output in engine.step()}
    return [(one.token_ids, one.kinds, one.logprobs, one.error) for output in found.values() for one in output.outputs]


@pytest.mark.parametrize("drafting", DRAFTING)
def test_an_engine_gives_the_tokens_of_the_rule(drafting: str, many: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With requests of every kind side by side: greedy, truncated, penalised, undrafted, with log-probabilities."""
    together = outputs_of(drafting)
    assert max(many) >= {"chain": 1, "mixed": 3}.get(drafting, 5)  # the rule `block` has no batched form
    monkeypatch.setattr(deciding, "_batched", lambda cases, **options: [])
    assert outputs_of(drafting) == together


def test_a_failure_of_the_batch_costs_no_request_its_tokens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs_of("tree")

    def failing(*given: Any) -> Verdicts:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(deciding, "verify", failing)
    assert outputs_of("tree") == expected
    assert "cannot be verified together (RuntimeError: out of memory)" in caplog.text


def test_a_tree_that_no_check_can_read_has_no_batched_form() -> None:
    """The rule raises the error then, for this tree alone."""
    tree = chain_tree(Drawn.IID)
    form = batched_form(RULES["multiround-iid"].rule)
    assert form is not None and form(tree)
    assert not form(replace(tree, parents=np.array([-1, 7])))


def test_draws_that_are_enumerated_are_decided_one_by_one() -> None:
    draws = Branches(0, replay=Replay([], frozenset()))
    assert draws.of_nodes([draws], PURPOSES, np.array([0, 1]), np.array([-1])) is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_bundled_pair_writes_the_tokens_of_the_rule(
    temperature: float, many: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In compiled code, where verdicts are equal bit for bit."""
    caplog.set_level(logging.WARNING, "foredraft")
    llm = LLM(None, {"method": "fspad", "tree": "dyspec", "num_speculative_tokens": 8}, max_num_seqs=3)
    sampling = SamplingParams(temperature=temperature, max_tokens=24, ignore_eos=True, seed=1)
    prompts = ["The sea", "Once upon a time", "Name three animals."]
    texts = [one.outputs[0].token_ids for one in llm.generate(prompts, sampling)]
    assert max(many) == 3
    monkeypatch.setattr(deciding, "_batched", lambda cases, **options: [])
    assert [one.outputs[0].token_ids for one in llm.generate(prompts, sampling)] == texts
    assert not caplog.records
