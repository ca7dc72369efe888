"""The dial of Yin et al. on the bundled pair: rejections against distance for rules `tolerance` ("Decoding-OPT") and `uno`.

    python benchmarks/dial.py --prompts build/eval24.jsonl --output benchmarks/dial.jsonl --plot docs/figures/dial.png

Chains of 4 at temperature 1. Distance is said in two ways: `bound` is the total variation distance of a token's law, computed
exactly from the two laws where the token was decided, and averaged over tokens; `drift` is measured on the emitted tokens
alone, the share of those that the drafter likes more than the target beyond what the target's law lets expect (a lower bound of
the mean distance, with its standard error). Answers are judged by the target's log-likelihood a token, paired over prompts and
samples; the answers of plain decoding say what the law itself reaches.
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
from foredraft.drafters.along import AskedAlong
from foredraft.plots import new_figure
from foredraft.progress import progress_bar
from foredraft.theory.predict import laws_of

EPSILONS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
NAMES = {"tolerance": "OPT", "uno": "UNO"}
COLUMNS = (
    *("rule", "epsilon", "tokens", "rejections_per_100", "tokens_per_step", "bound", "drift", "drift_error"),
    *("log_likelihood", "against_plain", "against_plain_low", "against_plain_high"),
    *("opt_minus_uno", "opt_minus_uno_low", "opt_minus_uno_high", "opt_wins"),
)


class Answers(NamedTuple):
    """What one rule wrote: its row, and the log-likelihood a token of every answer."""

    row: dict[str, Any]
    likelihoods: np.ndarray


def answers(llm: LLM, drafting: LLM, prompts: list[list[int]], sampling: SamplingParams) -> Answers:
    """Generates with `llm` and scores with both models of `drafting`."""
    evidence, likelihoods, rejections, steps, tokens, bounds = Evidence(), [], 0, 0, 0, 0.0
    drafter = AskedAlong(drafting.target, drafting.drafter_grown_by)
    rng = np.random.default_rng(0)
    for result in llm.generate(prompts, [replace(sampling, seed=i) for i in range(len(prompts))]):
        for one in result.outputs:
            p, q = laws_of(drafter, result.prompt_token_ids, one.token_ids, sampling)
            for i, token in enumerate(one.token_ids):
                evidence.see(token, q[i], p[i], float(rng.random()))
            likelihoods.append(float(np.log(q[np.arange(len(q)), one.token_ids]).mean()))
            rejections += sum(record.kind == "recovered" for record in one.records)
            steps, tokens = steps + len(one.records), tokens + len(one.token_ids)
            bounds += sum(sum(record.tv_bounds) for record in one.records)
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
    """Mean difference with a 95 % bootstrap interval over prompts."""
    by_prompt = (one - other).reshape(num_prompts, -1).mean(1)
    draws = np.random.default_rng(0).choice(by_prompt, (10000, len(by_prompt))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {name: float(by_prompt.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Rejections against both distances."""
    figure = new_figure(9.0, 4.0)
    for axes, key in zip(figure.subplots(1, 2), ("bound", "drift"), strict=True):
        for rule, name in NAMES.items():
            some = [row for row in rows if row["rule"] == rule]
            error = [3 * row["drift_error"] for row in some] if key == "drift" else None
            places = [row["rejections_per_100"] for row in some]
            axes.errorbar(places, [row[key] for row in some], yerr=error, marker="o", label=name)
            for row in some:
                axes.annotate(f"{row['epsilon']:g}", (row["rejections_per_100"], row[key]), fontsize="x-small")
        said = "distance of a token's law (exact)" if key == "bound" else "drift of emitted tokens, 3 s.e."
        axes.set(xlabel="rejections in 100 tokens", ylabel=said)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)


def main() -> None:
    """Command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8, help="answers a prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--plot", type=Path)
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
            for rule, one in found.items():
                against = paired("against_plain", one.likelihoods, base.likelihoods, len(prompts))
                rows.append(rounded({"rule": rule, "epsilon": epsilon, **one.row, **against, **both}))
    report(args.output, [rounded({"rule": "plain", **base.row}), *rows], COLUMNS, device=plain.target.device, dtype=args.dtype)
    if args.plot is not None:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
