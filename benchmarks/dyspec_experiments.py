"""Runs the experiments of the DySpec paper on the bundled pair. `dyspec_figures.py` makes figures and tables from the results.

    python benchmarks/dyspec_experiments.py --data ../shared/data/eval --output benchmarks/results/dyspec-experiments.jsonl

The prompts are the same as in `acceptance.py`. The run takes minutes. Each row names its "experiment":

- `hypothesis`: acceptance of a tested child against its draft probability.
- `length`: tokens per step by tree, size and temperature, and the number that the draft distribution predicts.
- `offload`: tokens per time if a target step costs as much as 200 draft steps.

Source: Xiong et al., DySpec (arXiv 2410.11744), sections 4 and 5.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers
from acceptance import read_prompts
from dyspec_calibrated import Trials, Way, calibrated, own_way, rank_only, reach_only, table_of, trials
from dyspec_walk import walk

from foredraft import LLM, SamplingParams
from foredraft.bench import tasks
from foredraft.bench.calibrate import PROMPTS
from foredraft.core.folders import BUNDLED_LM
from foredraft.core.progress import progress_bar
from foredraft.models.loading import load_target
from foredraft.plan.store import read_calibration
from foredraft.rules import RULES
from foredraft.trees import Branching, Chain, DySpec, Options, Sequoia
from foredraft.trees.acceptance import PROB_EDGES, AcceptanceTable

TEMPERATURES = (0.0, 0.6, 1.0)
WAYS = (Way(0.0, 0.6, False), Way(0.0, 0.6, True), Way(0.6, 0.6, True), Way(1.0, 0.6, True), Way(1.0, 1.0, True))
SHAPES = {64: (8, 8), 256: (16, 16), 768: (32, 24)}
"""Number of chains and their length in SpecInfer's tree, by the number of nodes."""
CHAINS = (4, 8, 16, 24)
TARGET_STEP = 200.0
"""Cost of a target step, in draft passes. The paper's Tables 3 and 4 have 5 s and 25 ms."""


class Bench:
    """The pair of models, the prompts, and the measured acceptance."""

    def __init__(self, data: Path, each: int, max_tokens: int):
        self.llm = LLM(None, {"method": "ar"}, max_num_seqs=8)
        self.model = load_target(BUNDLED_LM)
        self.prompts = tasks.encode(self.llm, read_prompts(data, each), raw=False)
        self.max_tokens = max_tokens
        self.vector = read_calibration(BUNDLED_LM, self.llm.target, "lm")["acceptance"]

    def texts(self, prompts: list[list[int]], temperature: float) -> list[Any]:
        """Generates outputs of the target."""
        sampling = SamplingParams(temperature=temperature, max_tokens=64)
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)

    def trained(self, temperature: float) -> AcceptanceTable:
        """Measures the acceptance on training prompts."""
        way = own_way(temperature, DySpec())
        train = tasks.encode(self.llm, tasks.read_prompts(PROMPTS), raw=False)
        return table_of(trials(self.llm, self.model, self.texts(train, temperature), [way])[way])

    def length(self, name: str, grower: Options, nodes: int, temperature: float) -> dict[str, Any]:
        """Measures the tokens per step of one tree."""
        rule = "block" if name == "chain" else "multiround"
        max_tokens = self.max_tokens // 2 if nodes > 256 else self.max_tokens
        how = {"nodes": nodes, "temperature": temperature, "max_tokens": max_tokens}
        began = perf_counter()
        found = walk(self.llm, self.model, grower, RULES[rule].rule, self.prompts, **how)
        head = {"experiment": "length", "tree": name, **how, "rule": rule}
        return head | found.row() | {"seconds": round(perf_counter() - began, 1)}


def hypothesis(bench: Bench) -> list[dict[str, Any]]:
    """Measures the acceptance of tested children in bins of their draft probability."""
    rows = []
    for temperature in TEMPERATURES:
        ways = [way for way in WAYS if way.temperature == temperature]
        found = trials(bench.llm, bench.model, bench.texts(bench.prompts, temperature), ways)
        for way, tested in found.items():
            row = {"experiment": "hypothesis", **way._asdict()}
            for part, chosen in (("all", tested.ranks >= 0), ("first", tested.ranks == 0), ("later", tested.ranks > 0)):
                row[part] = binned(Trials(*(values[chosen] for values in tested)))
            rows.append(row)
    return rows


def binned(found: Trials) -> dict[str, Any]:
    """Computes count, accepted share and mean probability in every bin, and the correlation over all children."""
    place = np.searchsorted(PROB_EDGES, found.probs, side="right") - 1
    counts = np.bincount(place, minlength=len(PROB_EDGES))
    sums = [np.bincount(place, weights=values, minlength=len(PROB_EDGES)) for values in (found.accepted, found.probs)]
    shares, means = (np.divide(total, counts, out=np.zeros(len(counts)), where=counts > 0) for total in sums)
    return {
        "tested": len(found.probs),
        "accepted": round(float(found.accepted.mean()), 4),
        "prob": round(float(found.probs.mean()), 4),
        "correlation": round(float(np.corrcoef(found.probs, found.accepted)[0, 1]), 4),
        "bins": [
            {"from": float(low), "tested": int(n), "accepted": round(float(share), 4), "prob": round(float(prob), 4)}
            for low, n, share, prob in zip(PROB_EDGES, counts, shares, means, strict=True)
            if n
        ],
    }


def plan(bench: Bench) -> list[tuple[str, Options, int, float]]:
    """Returns the trees to measure, small ones first, as (name, grower, nodes, temperature).

    The width changes the number of DySpec's passes, but not its tree.
    """
    runs: list[tuple[str, Options, int, float]] = []
    for temperature in TEMPERATURES:
        acceptance = bench.trained(temperature)
        for nodes in (16, *SHAPES):
            width = max(8, nodes // 8)
            runs.append(("dyspec", DySpec(width=width), nodes, temperature))
            if nodes < (256 if temperature == 0 else 768):
                runs.append(("dyspec, calibrated", calibrated(acceptance, width), nodes, temperature))
            runs.append(("sequoia", Sequoia(acceptance=bench.vector), nodes, temperature))
        if temperature == 1:
            runs += [("dyspec, draft at 0.6", DySpec(draft_temperature=0.6), n, temperature) for n in (16, 64)]
            for name, part in (("reach", reach_only(acceptance)), ("rank", rank_only(acceptance))):
                runs += [(f"dyspec, calibrated, {name} only", calibrated(part), n, temperature) for n in (16, 64)]
        for nodes, (chains, depth) in SHAPES.items():
            runs.append(("branching", Branching(num_chains=chains, draft_depth=depth), nodes, temperature))
            if nodes < 768:
                runs.append(("specinfer", Branching(num_chains=chains, draft_depth=depth, merge=True), nodes, temperature))
        runs += [("chain", Chain(), length, temperature) for length in CHAINS]
    return sorted(runs, key=lambda run: run[2])


def offload(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Computes tokens per time if a target step costs `TARGET_STEP` draft passes for every size of tree."""
    lengths = [row for row in rows if row.get("experiment") == "length"]
    found = []
    for row in lengths:
        chains = [other for other in lengths if other["tree"] == "chain" and other["temperature"] == row["temperature"]]
        best = max(chains, key=lambda chain: speedup(chain, chain["draft_passes"]))
        passes = {"batched": row["draft_passes"]}
        if row["tree"] == "dyspec":
            passes |= {"a call for every inner node": row["inner_nodes"], "a call for every node": row["nodes_per_step"]}
        for how, number in passes.items():
            gain, chain = speedup(row, number), speedup(best, best["draft_passes"])
            head = {key: row[key] for key in ("tree", "nodes", "temperature", "tokens_per_step", "evaluated_nodes")}
            found.append(
                {"experiment": "offload", **head, "construction": how, "draft_passes": number}
                | {"over_plain": round(gain, 3), "over_chain": round(gain / chain, 3), "chain": best["nodes"]}
            )
    return found


def speedup(row: dict[str, Any], passes: float) -> float:
    """Computes tokens per time, relative to plain decoding."""
    return row["tokens_per_step"] * TARGET_STEP / (TARGET_STEP + passes)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation prompts")
    parser.add_argument("--each", type=int, default=8, help="number of prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of an output; half of it with more than 256 nodes")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args.data, args.each, args.max_tokens)
    target: Any = bench.llm.target
    head = {
        "command": f"python benchmarks/dyspec_experiments.py --each {args.each} --max-tokens {args.max_tokens}",
        "device": f"{target.device} ({platform.machine()}, {torch.get_num_threads()} threads)",
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_prompts": len(bench.prompts),
    }
    rows = [head, *hypothesis(bench)]
    runs = plan(bench)
    with progress_bar("decoding", len(runs)) as advance:
        for run in runs:
            rows.append(bench.length(*run))
            write(args.output, rows)
            advance(1)
    write(args.output, rows + offload(rows))


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows as JSON lines."""
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
