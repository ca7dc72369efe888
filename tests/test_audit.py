"""The audit passes what is exact and fails what is not: lossy rules, planted faults, and a control that it must find.

Statistical parts run on the two small story models. Their false-alarm rate is 1e-3 an audit, with fixed seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.audit.faults import FAULTS
from foredraft.audit.hypotheses import FALSE_ALARM, Evidence, holm
from foredraft.audit.report import as_dict, markdown
from foredraft.audit.run import Audit, Auditor, Drafted
from foredraft.core.draws import Draws
from foredraft.core.tree import DraftTree, Drawn
from foredraft.drafters import DRAFTERS
from foredraft.plan.config import with_usual_tree

pytestmark = pytest.mark.unchecked

DATA = Path(__file__).parent / "data"
TARGET, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
PROMPTS = ["Once upon a time", "The cat sat on", "One day a girl named", "There was a", "In the morning", "My dog is"]


def audited(config: dict[str, Any], *, rule: Any = None, temperature: float = 1.0, samples: int = 3, tokens: int = 60) -> Audit:
    llm = LLM(TARGET, {"num_speculative_tokens": 4, **config}, max_num_seqs=samples, dtype="float64")
    prompts = [llm.tokenizer(text)["input_ids"] for text in PROMPTS]
    sampling = SamplingParams(temperature=temperature, max_tokens=tokens, top_p=0.9, ignore_eos=True)
    return Auditor(llm, prompts, sampling, samples, rule, sizes={2: 3, 3: 2}).run()


LM = {"method": "lm", "model": OTHER}


def head(method: str) -> dict[str, Any]:
    """A drafter with its head for the target."""
    return {"method": method, "model": str(DATA / "heads" / (DRAFTERS[method].asks or method))}


EXACT = [
    {**LM, "tree": "dyspec"},
    {"method": "suffix"},
    {**LM, "tree": "chain", "rule": "chain"},
    {**LM, "tree": "branching", "rule": "kseq", "num_chains": 2},
    {**LM, "tree": "topk"},
    {**LM, "method": "lm-lookup", "tree": "dyspec"},
    {"method": "ngram", "rule": "chain"},
    {**head("fspad"), "tree": "dyspec"},
    {**head("eagle3"), "tree": "chain", "rule": "block"},
    {**head("eagle"), "tree": "branching", "rule": "multiround-iid", "num_chains": 2},
    {**head("medusa"), "tree": "topk", "num_speculative_tokens": 8},
    {**head("hydra"), "tree": "sequoia", "acceptance": [0.5, 0.2]},
    {**head("parallel"), "tree": "branching", "rule": "kseq", "num_chains": 2},
    {**head("ctc"), "rule": "multiround"},
    {**head("fspad-lookup"), "tree": "chain", "lookup_min_match": 2},
    {**head("ctc-lookup"), "num_speculative_tokens": 8},
]
DEFAULT = (0, 7)
"""Audited in the default suite."""


@pytest.mark.parametrize(
    "config",
    [pytest.param(config, marks=[] if i in DEFAULT else [pytest.mark.slow]) for i, config in enumerate(EXACT)],
    ids=lambda config: f"{config['method']}-{config.get('tree', 'own')}",
)
def test_exact_rules_pass(config: dict[str, Any]) -> None:
    audit = audited(config)
    assert audit.reasons == []
    assert audit.enumerated_error < 1e-12
    assert audit.num_greedy == len(PROMPTS)
    assert not audit.divergences
    assert audit.sampled is not None
    assert audit.control is not None
    assert audit.control.deviates
    assert audit.sampled.num_tokens == len(PROMPTS) * 3 * 60


@pytest.mark.slow
@pytest.mark.parametrize("config", [{**LM, "tree": "dyspec"}, {**head("hydra"), "tree": "dyspec"}, head("ctc")])
def test_greedy_only(config: dict[str, Any]) -> None:
    audit = audited(config, temperature=0.0)
    assert audit.is_lossless
    assert audit.sampled is None
    assert audit.control is None


# --- What must fail


@pytest.mark.slow
@pytest.mark.parametrize("rule", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    ("drafter", "samples"),
    [(LM, 6), (head("fspad"), 6), (head("parallel"), 20)],  # what is accepted less often shows a fault less often
    ids=["lm", "fspad", "parallel"],
)
def test_planted_faults_fail(rule: Any, drafter: dict[str, Any], samples: int) -> None:
    audit = audited({**drafter, "tree": "chain", "rule": "chain"}, rule=rule, samples=samples, tokens=80)
    assert not audit.is_lossless
    assert audit.enumerated_error > 1e-3
    assert audit.sampled is not None
    assert audit.sampled.deviates, "found by enumeration only"


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"rule": "typical"}, {"rule": "uno", "epsilon": 0.0}, {"rule": "tolerance", "epsilon": 0.2}])
def test_lossy_rules_fail(rule: dict[str, Any]) -> None:
    audit = audited({**LM, "tree": "chain", **rule}, samples=8, tokens=80)
    assert not audit.is_lossless
    assert audit.reasons[0].startswith("the rule is lossy")
    assert audit.sampled is not None
    assert audit.sampled.deviates
    assert audit.control is None
    assert "# Audit: LOSSY" in markdown(audit)
    assert audit.tv_bound_max > 0


@pytest.mark.slow
def test_the_bound_of_tolerance_holds_and_is_0_at_0() -> None:
    lossless = audited({**LM, "tree": "chain", "rule": "tolerance", "epsilon": 0.0})
    assert lossless.is_lossless
    assert lossless.control is not None
    assert lossless.tv_bound_max < 1e-6
    some = audited({**LM, "tree": "chain", "rule": "tolerance", "epsilon": 0.1}, samples=6)
    assert some.sampled is not None
    noise = some.sampled.detectable
    assert some.sampled.drift_measured < some.tv_bound_mean + noise
    assert some.tv_bound_mean < some.tv_bound_max <= 1


# --- What was drafted


def test_drafted_is_the_law_of_draws_and_the_set_of_choices() -> None:
    tree = DraftTree(
        tokens=np.array([9, 4, 7, 7, 2]),
        parents=np.array([-1, 0, 0, 1, 3]),
        drawn=np.array([int(Drawn.IID), 0, 0, 0, 0]),
        draft_row=np.array([0, -1, -1, -1, -1]),
        draft_probs=torch.tensor([[0.0, 0.25, 0.75]]),
        draft_ids=torch.tensor([[1, 4, 7]]),
        vocab_size=10,
    )
    found = [Drafted.after(tree, node) for node in range(5)]
    laws = [None if one is None else one.over(10).tolist() for one in found]
    assert laws[0] == [0, 0, 0, 0, 0.25, 0, 0, 0.75, 0, 0]
    assert laws[1] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert laws[3] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert laws[2] is laws[4] is None


@pytest.mark.parametrize("method", ["lm", "fspad", "fspad-lookup", "ctc"])
def test_every_drafted_token_has_its_law(method: str) -> None:
    """A drafted token that was accepted had some probability there, and whatever is accepted or recovered was drafted for."""
    config = {**(LM if method == "lm" else head(method)), "num_speculative_tokens": 4}
    llm = LLM(TARGET, {**config, **({"tree": "dyspec"} if not DRAFTERS[method].makes_own else {})}, dtype="float64")
    sampling = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    auditor = Auditor(llm, [llm.tokenizer(PROMPTS[0])["input_ids"]], sampling, 2)
    [request] = auditor._run(sampling, 2, Draws)
    seen = {"accepted": 0, "recovered": 0, "bonus": 0}  # a step whose tree has no room is plain
    for one in request.sequences:
        for token, kind, drafted in zip(one.output_ids, one.kinds, auditor._drafted[one], strict=True):
            if kind != "plain":
                seen[kind] += 1
            assert (drafted is None) == (kind in ("bonus", "plain"))
            if drafted is not None:
                assert drafted.over(llm.target.vocab_size).sum() >= 1 - 1e-9
                assert kind != "accepted" or token in drafted.token_ids
    assert min(seen.values()) > 0


# --- The tests themselves


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Tokens of the law itself: 150 audits of 150 tokens at 1e-3 have three or more alarms with probability 5e-4."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(150):
        evidence = Evidence()
        for _ in range(150):
            law, draft = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
            evidence.see(int(rng.choice(6, p=law)), law, draft, float(rng.random()))
        alarms += evidence.deviates
    assert alarms <= 2


def test_the_stated_bias_is_found_as_often_as_stated() -> None:
    """Laws shifted towards the draft by the detectable bias: at least 32 of 40 runs find it (38 expected; fewer with 1e-3)."""
    rng, found = np.random.default_rng(1), 0
    size, tokens = 5, 800
    law, draft = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
    over = draft > law
    blank = Evidence()
    for _ in range(tokens):
        blank.see(int(rng.choice(size, p=law)), law, draft, float(rng.random()))
    bias = blank.detectable
    shifted = law + bias * (np.where(over, draft, 0) / draft[over].sum() - np.where(over, 0, law) / law[~over].sum())
    for _ in range(40):
        evidence = Evidence()
        for token in rng.choice(size, p=shifted, size=tokens):
            evidence.see(int(token), law, draft, float(rng.random()))
        found += evidence.deviates
    assert found >= 32


def test_an_impossible_token_is_a_fault() -> None:
    evidence = Evidence()
    evidence.see(1, np.array([1.0, 0.0]), None, 0.5)
    assert evidence.deviates
    assert evidence.impossible == 1


def test_holm_stops_at_the_first_that_holds() -> None:
    results = holm([("a", 0.0, 0.9), ("b", 5.0, 1e-9), ("c", 4.0, 4e-4)])
    assert [one.name for one in results] == ["b", "c", "a"]
    assert [one.deviates for one in results] == [True, True, False]
    assert results[0].threshold == pytest.approx(FALSE_ALARM / 3)
    assert not any(one.deviates for one in holm([("a", 0.0, 0.02), ("b", 0.0, 0.5)]))


# --- The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["audit", *arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


SHORT = ("--limit", "4", "--samples", "2", "--max-tokens", "40", "--budget", "4")


@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, *SHORT, "--tree", "chain", "--limit", "8", "--json", "--output", str(tmp_path / "out"))
    found = json.loads(out)
    assert (code, found["lossless"], found["reasons"]) == (0, True, [])
    assert found == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (tmp_path / "out" / "audit.md").read_text().startswith("# Audit: lossless within the stated power")
    assert found["control"]["deviates"]
    code, out, _ = run(capsys, *SHORT, "--tree", "chain", "--rule", "tolerance", "--epsilon", "0.2")
    assert code == 1
    assert out.startswith("# Audit: LOSSY")
    assert out.splitlines()[2].startswith("- the rule is lossy")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--rule", "tolerance", "--epsilon", "-1"), "epsilon must be 0 (lossless) or more, got -1"),
        (("--epsilon", "0.1"), "'epsilon'"),
        (("--method", "ar"), "there is nothing to audit"),
        (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert says in err


def test_the_usual_tree_is_audited_with_drafters_that_grow_trees() -> None:
    assert with_usual_tree({"method": "fspad"}) == {"method": "fspad", "tree": "dyspec"}
    for config in ({"method": "ctc"}, {"method": "fspad", "rule": "block"}, {"method": "lm", "tree": "topk"}, {"method": "x"}):
        assert with_usual_tree(config) == config


@pytest.mark.slow
def test_command_with_a_head(capsys: pytest.CaptureFixture[str]) -> None:
    """Its method need not be named."""
    given = ("--model", TARGET, "--draft-model", str(DATA / "heads" / "fspad"), "--dtype", "float64")
    code, out, err = run(capsys, *SHORT, *given, "--limit", "8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["setting"]["method"], found["setting"]["tree"], found["lossless"]) == ("fspad", "dyspec", True)
    assert found["greedy"]["faults"] == found["greedy"]["float_ties"] == 0


def test_as_dict_is_json() -> None:
    audit = Audit({"method": "lm"}, "exact in distribution")
    assert json.loads(json.dumps(as_dict(audit)))["lossless"]
