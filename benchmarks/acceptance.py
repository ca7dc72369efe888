"""Measures the acceptance length (tokens per step) of every drafter with every tree that it can grow.

    python benchmarks/acceptance.py --data ../shared/data/eval --output benchmarks/results/acceptance-bundled.jsonl

The prompts are the first 8 each of GSM8K test, MT-bench (first turns) and HumanEval, through the chat template. Times are not
measured. The script prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from foredraft import DRAFTERS, LLM, SamplingParams
from foredraft.core.progress import progress_bar
from foredraft.plan.config import bundled_drafter
from foredraft.plan.speculation import trees_of

SETS = (("gsm8k_test.jsonl", "question"), ("mt_bench.jsonl", "turns"), ("humaneval.jsonl", "prompt"))


def read_prompts(data: Path, each: int) -> list[str]:
    """Reads the first `each` prompts of every set."""
    prompts = []
    for name, key in SETS:
        rows = [json.loads(line)[key] for line in (data / name).read_text(encoding="utf-8").splitlines()[:each]]
        prompts += [row if isinstance(row, str) else row[0] for row in rows]
    return prompts


def combinations() -> list[tuple[str, str | None]]:
    """Returns every drafter with every tree that it can grow."""
    return [
        (drafter, tree)
        for drafter, row in DRAFTERS.items()
        if row.weights is None or bundled_drafter(drafter) is not None
        for tree in trees_of(row)
    ]


def run(drafter: str, tree: str | None, nodes: int, temperature: float, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    """Decodes all prompts as a batch with one drafter and tree, and returns a row of results."""
    config = {"method": drafter, "num_speculative_tokens": nodes} | ({"tree": tree} if tree else {})
    llm = LLM(None, config, max_num_seqs=8)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], sampling)
    metrics = [output.metrics for output in outputs]
    steps, accepted = sum(m.num_steps for m in metrics), sum(m.num_accepted_tokens for m in metrics)
    drafted = sum(m.num_draft_tokens for m in metrics)
    return {
        "drafter": drafter,
        "tree": tree or "own",
        "nodes": nodes,
        "rule": llm.drafting(sampling)["rule"],
        "temperature": temperature,
        "num_prompts": len(prompts),
        "num_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "steps": steps,
        "acceptance_length": round(1 + accepted / steps, 4),
        "acceptance_rate": round(accepted / drafted, 4) if drafted else 0.0,
        "branched_rate": round(sum(m.branched_rate * m.num_steps for m in metrics) / steps, 4),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Makes a Markdown table: acceptance length by drafter and tree, a column per temperature and number of nodes."""
    columns = sorted({(row["temperature"], row["nodes"]) for row in rows})
    lines = [
        "| drafter | tree | " + " | ".join(f"T={t:g}, {n} nodes" for t, n in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    cells = {(row["drafter"], row["tree"], row["temperature"], row["nodes"]): row["acceptance_length"] for row in rows}
    for drafter, tree in dict.fromkeys((row["drafter"], row["tree"]) for row in rows):
        values = [f"{cells[drafter, tree, t, n]:.2f}" for t, n in columns]
        lines.append(f"| {drafter} | {tree} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation prompts")
    parser.add_argument("--each", type=int, default=8, help="number of prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    prompts = read_prompts(args.data, args.each)
    plan = [(*pair, n, t) for pair in combinations() for n in args.nodes for t in args.temperatures]
    rows = []
    with progress_bar("measuring", len(plan)) as advance:
        for drafter, tree, nodes, temperature in plan:
            rows.append(run(drafter, tree, nodes, temperature, prompts, args.max_tokens))
            advance(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    head = {"command": f"python benchmarks/acceptance.py --each {args.each} --max-tokens {args.max_tokens}", **versions}
    args.output.write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    print(table(rows))


if __name__ == "__main__":
    main()
