"""Audits every exact rule with every drafter of a target. Audits lossy rules and planted faults too, which must fail.

    python benchmarks/audits.py --output benchmarks/results/audits.jsonl
    python benchmarks/audits.py --model DIR --drafter HEAD HEAD2 --only fspad fspad-lookup --output build/audits.jsonl

Without --drafter the bundled drafters are audited. Each combination of tree and rule is enumerated once, for all temperatures.
The exit status is 1 if an audit has the wrong result.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from measuring import arguments, read_prompts, report, rounded

from foredraft import DRAFTERS, GROWERS, LLM, RULES, SamplingParams
from foredraft.audit.faults import FAULTS
from foredraft.audit.run import Audit, Auditor
from foredraft.core.progress import progress_bar
from foredraft.heads.folder import method_of
from foredraft.plan.config import bundled_drafter
from foredraft.plan.speculation import fitting_rules, trees_of

COLUMNS = (
    *("drafter", "tree", "rule", "fault", "temperature", "must_pass", "lossless", "enumerated_error"),
    *("greedy_ties", "greedy_faults", "sampled_deviates", "control_deviates", "tokens", "detectable_bias", "seconds"),
)
TREES = {"multiround": "dyspec", "multiround-iid": "branching", "kseq": "branching", "deterministic": "topk"}
"""Tree with which a rule is audited. Other rules are audited with the first tree for which they are exact."""

LOSSY: dict[str, dict[str, Any]] = {"typical": {}, "uno": {"epsilon": 0.0}, "tolerance": {"epsilon": 0.2}}


class Case(NamedTuple):
    """A case to audit: a speculative config, a temperature, and a planted fault or None."""

    config: dict[str, Any]
    temperature: float
    fault: str | None = None

    @property
    def must_pass(self) -> bool:
        """Whether the case is exact, so that its audit must pass."""
        claim = RULES[self.config["rule"]].claim(self.config)
        return self.fault is None and not claim.startswith("lossy")


def weights_of(folders: Sequence[Path], *, bundled: bool) -> dict[str, Path]:
    """Maps drafters to the directories of their weights: the given ones or, if none is given, the bundled ones."""
    if folders:
        return {method_of(folder) or "lm": folder for folder in folders}
    names = [name for name, row in DRAFTERS.items() if row.weights is not None and row.asks is None] if bundled else []
    return {name: folder for name in names if (folder := bundled_drafter(name)) is not None}


def exact(weights: Mapping[str, Path], only: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the configs of every exact rule with every drafter for which it is exact."""
    found = []
    for drafter, row in DRAFTERS.items():
        folder = weights.get(row.asks or drafter)
        if (row.weights is not None and folder is None) or (only and drafter not in only):
            continue
        config = {"method": drafter} | ({"model": str(folder)} if folder is not None else {})
        trees = [name for name in trees_of(row) if name]
        for rule in (name for name, row_of_rule in RULES.items() if not row_of_rule.guarantee.startswith("lossy")):
            fitting = [name for name in trees if rule in fitting_rules(GROWERS[name])]
            if fitting:
                tree = TREES[rule] if TREES.get(rule) in fitting else fitting[0]
                found.append({**config, "tree": tree, "rule": rule})
            if row.makes_own and rule in fitting_rules(row):
                found.append({**config, "rule": rule})
    return found


def cases(configs: Sequence[dict[str, Any]], temperatures: list[float]) -> list[Case]:
    """Returns all cases. The cases that must fail use the first drafter that grows chains."""
    chains = [{**config, "rule": "chain"} for config in configs if config.get("tree") == "chain"][:1]
    failing = [({**chain, "rule": rule, **options}, None) for chain in chains for rule, options in LOSSY.items()]
    failing += [(chain, fault) for chain in chains for fault in FAULTS]
    sampled = [temperature for temperature in temperatures if temperature > 0]
    lossless = [{**chain, "rule": "tolerance", "epsilon": 0.0} for chain in chains]
    return [
        *(Case(config, temperature) for config in configs for temperature in temperatures),
        *(Case(config, temperature) for config in lossless for temperature in sampled),
        *(Case(config, temperature, fault) for config, fault in failing for temperature in sampled),
    ]


def row(case: Case, audit: Audit, seconds: float) -> dict[str, Any]:
    """Makes a row from the result of an audit."""
    sampled, control = audit.sampled, audit.control
    faults = sum(not divergence.is_tie for divergence in audit.divergences)
    return rounded(
        {
            "drafter": case.config["method"],
            "tree": case.config.get("tree"),
            "rule": case.config["rule"] + (f" {case.config['epsilon']:g}" if "epsilon" in case.config else ""),
            "fault": case.fault,
            "temperature": case.temperature,
            "must_pass": case.must_pass,
            "lossless": audit.is_lossless,
            "reasons": audit.reasons,
            "greedy_outputs": audit.num_greedy,
            "greedy_ties": len(audit.divergences) - faults,
            "greedy_faults": faults,
            "sampled_deviates": sampled and sampled.deviates,
            "control_deviates": control and control.deviates,
            "tokens": sampled and sampled.num_tokens,
            "measured_drift": sampled and sampled.drift_measured,
            "detectable_bias": sampled and sampled.detectable,
            "tv_bound_mean": audit.tv_bound_mean,
            "seconds": seconds,
        }
    ) | {"enumerated_error": audit.enumerated_error}


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--model", help="directory of the target; default: the bundled one")
    parser.add_argument("--drafter", type=Path, nargs="+", default=[], help="directories of heads, or of a draft model")
    parser.add_argument("--only", nargs="+", choices=DRAFTERS, default=[], metavar="NAME", help="drafters; default: all")
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts")
    parser.add_argument("--samples", type=int, default=4, help="number of sampled outputs per prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--top-p", type=float, default=0.9)
    args = parser.parse_args()
    plain = LLM(args.model, {"method": "ar"}, dtype=args.dtype, device=args.device, max_num_seqs=args.samples)
    configs = exact(weights_of(args.drafter, bundled=args.model is None), args.only)
    prompts = [ids for ids in read_prompts(plain, args.prompts) if len(ids) + args.max_tokens <= plain.max_model_len]
    if not prompts or not configs:
        parser.error("nothing to audit: give drafters of the target, and a --max-tokens that fits in its context")
    every, rows = cases(configs, args.temperatures), []
    known: dict[Any, float] = {}
    with progress_bar("auditing", len(every)) as advance:
        for case in every:
            began, key = perf_counter(), (*case.config.items(), case.fault)
            sampling = SamplingParams(temperature=case.temperature, top_p=args.top_p, max_tokens=args.max_tokens)
            llm = plain.with_speculation({**case.config, "num_speculative_tokens": 8})
            rule = FAULTS[case.fault] if case.fault else None
            audit = Auditor(llm, prompts, sampling, args.samples, rule, enumerated_error=known.get(key)).run()
            known[key] = audit.enumerated_error
            rows.append(row(case, audit, perf_counter() - began))
            advance(1)
    report(args.output, rows, COLUMNS, device=plain.target.device, dtype=args.dtype)
    wrong = [result for result in rows if result["lossless"] != result["must_pass"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} audits have the right result")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
