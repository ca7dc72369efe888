"""Counts the draft passes and evaluated nodes of DySpec's tree, by its size. The paper's heap makes one draft call per node.

    python benchmarks/dyspec_passes.py --data ../shared/data/train --output benchmarks/results/dyspec-passes.jsonl

The bundled drafter grows trees in the middle of answers of GSM8K's training part, at temperature 1. The width is the number of
nodes that a pass expands. The last line of each size expands whole levels: all frontier nodes of the tree in each pass.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.folders import BUNDLED_LM, BUNDLED_TARGET
from foredraft.core.params import SamplingParams
from foredraft.core.progress import progress_bar
from foredraft.drafters.lm import LMDrafter
from foredraft.models.loading import load_target, load_tokenizer
from foredraft.trees.dyspec import DySpec

LEVELS = 1 << 20


class CountingDrafter(LMDrafter):
    """A drafter that counts its passes and the nodes that they evaluate."""

    passes = 0
    evaluated = 0

    def expand(self, states: Any, partial: Any, node_ids: Any) -> Any:
        """Expands nodes as in `LMDrafter`, and counts them."""
        self.passes += 1
        self.evaluated += len(node_ids)
        return super().expand(states, partial, node_ids)


def count(model: Any, prompts: list[list[int]], nodes: int, width: int) -> dict[str, Any]:
    """Measures one size and width, and returns means over the prompts."""
    drafter = CountingDrafter(model, DySpec(width=width), model.vocab_size, 1)
    sampling = [SamplingParams(temperature=1.0)]
    depths = []
    for number, prompt in enumerate(prompts):
        state = drafter.start(prompt, None)
        batch = drafter.propose(Work([state], [prompt[-1]], [Budget(nodes, 64)], sampling, [Draws(number)]))
        depths.append(int(batch[0].depths.max()))
        drafter.finish(state)
    return {
        "nodes": nodes,
        "width": "whole levels" if width == LEVELS else width,
        "passes": drafter.passes / len(prompts),
        "evaluated": drafter.evaluated / len(prompts),
        "depth": float(np.mean(depths)),
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of training text")
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts")
    parser.add_argument("--output", type=Path, required=True, help="file for the results")
    args = parser.parse_args()
    model, tokenizer = load_target(BUNDLED_LM), load_tokenizer(BUNDLED_TARGET)
    with gzip.open(args.data / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(args.prompts)]
    halves = [row["answer"][: len(row["answer"]) // 2] for row in rows]
    texts = [f"<|user|>\n{row['question']}\n<|assistant|>\n{half}" for row, half in zip(rows, halves, strict=True)]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    plan = [(nodes, width) for nodes in (16, 64, 256, 768) for width in (1, 8, 16, LEVELS)]
    results = []
    with progress_bar("growing", len(plan)) as advance:
        for nodes, width in plan:
            results.append(count(model, prompts, nodes, width))
            advance(1)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in results))
    print("| nodes | width | passes | evaluated nodes | depth |\n|---|---|---|---|---|")
    for row in results:
        print(f"| {row['nodes']} | {row['width']} | {row['passes']:.1f} | {row['evaluated']:.1f} | {row['depth']:.1f} |")


if __name__ == "__main__":
    main()
