"""Measures the trade-off of Yin et al. on the bundled pair, for the rules `tolerance` ("Decoding-OPT") and `uno`.

    python benchmarks/dial.py --prompts build/eval24.jsonl --output benchmarks/results/dial.jsonl --plot docs/figures/dial.png

The trade-off is rejections against distance, for chains of 4 at temperature 1. The distance is measured in two ways:

- `bound` is the total variation distance of a token's distribution. It is computed exactly from the draft and the target
  distribution at each decision, and averaged over tokens.
- `drift` uses only the emitted tokens. It is the share of tokens with a higher probability under the drafter than under the
  target, minus the share expected under the target. It is a lower bound of the mean distance, given with its standard error.

The quality of an answer is the log-likelihood per token under the target, paired over prompts and samples. Plain decoding
gives the reference.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measuring import arguments, report, rounded

from foredraft import LLM, SamplingParams
from foredraft.audit.hypotheses import Evidence
from foredraft.bench import tasks
from foredraft.core.plots import new_figure
from foredraft.core.progress import progress_bar
from foredraft.drafters.along import AskedAlong
from foredraft.theory.predict import laws_of

EPSILONS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
NAMES = {"tolerance": "OPT", "uno": "UNO"}
COLUMNS = (
    *("rule", "epsilon", "tokens", "rejections_per_100", "tokens_per_step", "bound", "drift", "drift_error"),
    *("log_likelihood", "against_plain", "against_plain_low", "against_plain_high"),
    *("opt_minus_uno", "opt_minus_uno_low", "opt_minus_uno_high", "opt_wins"),
)


class Answers(NamedTuple):
    """Answers of one rule: the row of results, and the log-likelihood per token of every answer."""

    row: dict[str, Any]
    likelihoods: np.ndarray


def answers(llm: LLM, drafting: LLM, prompts: list[list[int]], sampling: SamplingParams) -> Answers:
    """Generates answers with `llm`, and scores them with both models of `drafting`."""
    evidence, likelihoods, rejections, steps, tokens, bounds = Evidence(), [], 0, 0, 0, 0.0
    drafter = AskedAlong(drafting.target, drafting.drafter_grown_by)
    rng = np.random.default_rng(0)
    for result in llm.generate(prompts, [replace(sampling, seed=i) for i in range(len(prompts))]):
        for output in result.outputs:
            p, q = laws_of(drafter, result.prompt_token_ids, output.token_ids, sampling)
            for i, token in enumerate(output.token_ids):
                evidence.see(token, q[i], p[i], float(rng.random()))
            likelihoods.append(float(np.log(q[np.arange(len(q)), output.token_ids]).mean()))
            rejections += sum(record.kind == "recovered" for record in output.records)
            steps, tokens = steps + len(output.records), tokens + len(output.token_ids)
            bounds += sum(sum(record.tv_bounds) for record in output.records)
    drift = evidence.drift
    row = {
        "tokens": tokens,
        "rejections_per_100": 100 * rejections / tokens,
        "tokens_per_step": tokens / steps,
        "bound": bounds / tokens,
        "drift": sum(drift.values) / len(drift.values),
        "drift_error": sum(drift.variances) ** 0.5 / len(drift.values),
        "log_likelihood": float(np.mean(likelihoods)),
    }
    return Answers(row, np.array(likelihoods))


def paired(name: str, one: np.ndarray, other: np.ndarray, num_prompts: int) -> dict[str, float]:
    """Computes the mean difference with a 95 % bootstrap interval over prompts."""
    by_prompt = (one - other).reshape(num_prompts, -1).mean(1)
    draws = np.random.default_rng(0).choice(by_prompt, (10000, len(by_prompt))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {name: float(by_prompt.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots both distances against the rejections."""
    figure = new_figure(9.0, 4.0)
    for axes, key in zip(figure.subplots(1, 2), ("bound", "drift"), strict=True):
        for rule, name in NAMES.items():
            of_rule = [row for row in rows if row["rule"] == rule]
            error = [3 * row["drift_error"] for row in of_rule] if key == "drift" else None
            places = [row["rejections_per_100"] for row in of_rule]
            axes.errorbar(places, [row[key] for row in of_rule], yerr=error, marker="o", label=name)
            for row in of_rule:
                axes.annotate(f"{row['epsilon']:g}", (row["rejections_per_100"], row[key]), fontsize="x-small")
        label = "distance of a token's distribution (exact)" if key == "bound" else "drift of emitted tokens, 3 s.e."
        axes.set(xlabel="rejections in 100 tokens", ylabel=label)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts")
    parser.add_argument("--samples", type=int, default=8, help="number of answers per prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="number of tokens of an answer")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    args = parser.parse_args()
    plain = LLM(None, {"method": "ar"}, dtype=args.dtype, device=args.device, max_num_seqs=args.samples)
    prompts = tasks.encode(plain, tasks.read_prompts(args.prompts), raw=False)
    sampling = SamplingParams(temperature=1.0, max_tokens=args.max_tokens, n=args.samples, ignore_eos=True)
    config = {"method": "lm", "tree": "chain", "num_speculative_tokens": 4}
    base, rows = answers(plain, plain.with_speculation(config), prompts, sampling), []
    with progress_bar("turning the dial", 2 * len(EPSILONS)) as advance:
        for epsilon in EPSILONS:
            found = {}
            for rule in NAMES:
                llm = plain.with_speculation({**config, "rule": rule, "epsilon": epsilon})
                found[rule] = answers(llm, llm, prompts, sampling)
                advance(1)
            opt, uno = (found[rule].likelihoods for rule in NAMES)
            both = {**paired("opt_minus_uno", opt, uno, len(prompts)), "opt_wins": float((opt > uno).mean())}
            for rule, written in found.items():
                against = paired("against_plain", written.likelihoods, base.likelihoods, len(prompts))
                rows.append(rounded({"rule": rule, "epsilon": epsilon, **written.row, **against, **both}))
    report(args.output, [rounded({"rule": "plain", **base.row}), *rows], COLUMNS, device=plain.target.device, dtype=args.dtype)
    if args.plot is not None:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
