"""The audit passes what is exact and fails what is not: lossy rules, planted faults, and a control that it must find.

Statistical parts run on the two small story models. Their false-alarm rate is 1e-3 an audit, with fixed seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.audit.command import as_dict, markdown
from foredraft.audit.faults import FAULTS
from foredraft.audit.hypotheses import FALSE_ALARM, Evidence, holm
from foredraft.audit.run import Audit, Auditor

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


EXACT = [
    {**LM, "tree": "dyspec"},
    {"method": "suffix"},
    {**LM, "tree": "chain", "rule": "chain"},
    {**LM, "tree": "branching", "rule": "kseq", "num_chains": 2},
    {**LM, "tree": "topk"},
    {**LM, "method": "lm-lookup", "tree": "dyspec"},
    {"method": "ngram", "rule": "chain"},
]


@pytest.mark.parametrize(
    "config",
    [EXACT[0], *(pytest.param(config, marks=pytest.mark.slow) for config in EXACT[1:])],
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
def test_greedy_only() -> None:
    audit = audited({**LM, "tree": "dyspec"}, temperature=0.0)
    assert audit.is_lossless
    assert audit.sampled is None
    assert audit.control is None


# --- What must fail


@pytest.mark.slow
@pytest.mark.parametrize("rule", FAULTS.values(), ids=FAULTS)
def test_planted_faults_fail(rule: Any) -> None:
    audit = audited({**LM, "tree": "chain", "rule": "chain"}, rule=rule, samples=6, tokens=80)
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


def test_as_dict_is_json() -> None:
    audit = Audit({"method": "lm"}, "exact in distribution")
    assert json.loads(json.dumps(as_dict(audit)))["lossless"]
