"""Prints the Markdown tables of docs/performance/ and docs/drafters/measured/.

The input is the files that `foredraft bench --output` and benchmarks/heads.py wrote.

python benchmarks/tables.py benchmarks/results/350m-greedy.jsonl benchmarks/results/heads-350m-greedy.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from foredraft.bench.report import setting_of

SPLIT = ("draft_s", "verify_s", "rule_s", "cache_s", "other_s")
HEAD = (
    "method",
    "chosen",
    "ms a token",
    "speed-up (95 %)",
    "not looping",
    "tokens a step",
    "draft / verify / rest, ms a token",
)


def row_of(row: dict[str, Any]) -> list[str]:
    """Makes one line of the table."""
    cells = [f"`{row['name']}`", setting_of(row), f"{row['ms_per_token']:.2f}"]
    cells += [f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"]
    cells += [f"{row['speedup_not_looping']:.2f}" if "speedup_not_looping" in row else ""]
    if "other_s" not in row:
        return [*cells, "", ""]
    draft, verify, *rest = (1000 * row[name] / row["num_tokens"] for name in SPLIT)
    return [*cells, f"{row['acceptance_length']:.2f}", f"{draft:.2f} / {verify:.2f} / {sum(rest):.2f}"]


def of_heads(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Makes a table of benchmarks/heads.py: tokens per step in total and by family, and the cost of drafting."""
    families = list(rows[0]["families"])
    head = ["method", "parameters", "training, min", "tokens a step", "not looping", *families, "accepted at depth 1, 2, ..."]
    head += ["forwards, ms to draft (a forward / the target's)", "speed-up (95 %)", "not looping", "steps alone", "not looping"]
    over = list(rows[0].get("speedup_over", {}))
    head += [cell for name in over for cell in (f"over plain decoding by {name} (95 %)", "not looping")]
    lines = [head, ["---"] * len(head)]
    for row in rows[1:]:
        if row["name"] in over:
            continue
        lengths = [row["acceptance_length"], row["not_looping"], *row["families"].values()]
        made = [f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else "", f"{row.get('minutes', '')}"]
        lines.append(
            [
                f"`{shortened(row['name'])}`",
                *made,
                *(f"{length:.2f}" for length in lengths),
                " ".join(f"{rate:.2f}" for rate in row["joint_acceptance_rate"][:6]),
                *costs(row, 1000 * rows[0].get("verify_s", 0.0) / rows[0]["num_steps"]),
                *(gain(*interval) for name in over for interval in row["speedup_over"][name].values()),
            ]
        )
    return lines


def costs(row: dict[str, Any], target_ms: float) -> list[str]:
    """Formats the cost of drafting, also relative to the target's forward pass for one token, and the speed-ups.

    The cells are empty if no times were measured.
    """
    if "speedup" not in row:
        return [""] * 5
    gains = gain(row["speedup"], row["speedup_low"], row["speedup_high"])
    quiet = f"{row.get('speedup_not_looping', row['speedup']):.2f}"
    steps = [f"{row[name]:.2f}" if name in row else "" for name in ("speedup_steps", "speedup_steps_not_looping")]
    share = row["draft_ms"] / max(row["draft_forwards"], 1.0) / target_ms
    return [f"{row['draft_forwards']:.1f}, {row['draft_ms']:.2f} ({share:.2f})", gains, quiet, *steps]


def gain(ratio: float, low: float, high: float) -> str:
    """Formats a speed-up and its interval."""
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})"


def of_seeds(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Makes a table of the methods with heads of several seeds, in the folders NAME-0, NAME-1, ...

    A line has the tokens per step of each seed, and their mean with its standard error. The table is empty if there is no such
    method.
    """
    head = ["method", "tokens a step of each seed", "mean", "not looping"]
    lines = [head, ["---"] * len(head)]
    for name, group in by_method(rows).items():
        if len(group) > 1:
            every, quiet = ([row[key] for row in group] for key in ("acceptance_length", "not_looping"))
            each = ", ".join(f"{length:.2f}" for length in every)
            means = (f"{fmean(lengths):.3f} ± {stdev(lengths) / len(lengths) ** 0.5:.3f}" for lengths in (every, quiet))
            lines.append([f"`{name}`", each, *means])
    return lines if len(lines) > 2 else []


def by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups the rows after the first by method. Heads that differ only in their seed are in one group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows[1:]:
        groups.setdefault(re.sub(r"=(.*?)-\d+(?=:|$)", r"=\1-*", shortened(row["name"])), []).append(row)
    return groups


def shortened(name: str) -> str:
    """Shortens a method by the folders of its head: ``fspad=build/heads/fs-s0:topk:8`` becomes ``fspad=fs-s0:topk:8``."""
    drafter, equals, rest = name.partition("=")
    folder, *more = rest.split(":")
    return drafter + equals + ":".join([Path(folder).name, *more])


MANY = 12
"""With more methods than this, the table has a line per tree and a column per budget, else a line per method."""


def full(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Makes a table with a line per method."""
    return [list(HEAD), ["---"] * len(HEAD), *map(row_of, rows)]


def by_budget(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Makes a table of tokens per step and speed-up of every tree at every budget, with the automatic choice last."""
    cells = {(row["method"], row["tree"], row["budget"]): row for row in rows if row["name"] not in ("ar", "auto")}
    budgets = sorted({budget for *_, budget in cells})
    lines = [["method", *(f"{budget} nodes" for budget in budgets)], ["---"] * (1 + len(budgets))]
    for method, tree in dict.fromkeys(key[:2] for key in cells):
        found = [cells.get((method, tree, budget)) for budget in budgets]
        values = [f"{row['acceptance_length']:.2f} / {row['speedup']:.2f}" if row else "" for row in found]
        lines.append([f"`{method}:{tree}`" if tree else f"`{method}`", *values])
    for row in rows:
        if row["name"] == "auto":
            interval = f"{row['speedup_low']:.2f} to {row['speedup_high']:.2f}"
            chosen = f"{row['method']} {setting_of(row)}"
            value = f"{row['acceptance_length']:.2f} / {row['speedup']:.2f} ({interval}): {chosen}"
            lines.append(["`auto`", value, *[""] * (len(budgets) - 1)])
    return lines


def main() -> None:
    """Prints every file's table under its command, and then the tables of heads of several seeds, over all files."""
    seeds: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for path in map(Path, sys.argv[1:]):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        plain = rows[0]
        print(f"\n`{plain['command']}` (`{path}`)\n")
        if "families" in plain:
            cut = ", ".join(f"{number} of {family}" for family, number in plain["cut"].items()) or "none"
            loops = f"{plain['looping_share']:.0%} of the plain outputs loop"
            print(f"{plain['num_prompts']} prompts, cut in the middle: {cut}; {loops}.\n")
            print(markdown(of_heads(rows)))
            seeds.setdefault((plain["temperature"], plain["weights_mb"]), [plain]).extend(rows[1:])
            continue
        print(f"{plain['num_prompts']} prompts, {plain['looping_share']:.0%} of the plain outputs loop.", end=" ")
        print("Plain decoding reads {weights_mb} MB a step at {read_gb_per_s} GB/s,".format_map(plain), end=" ")
        print("{bandwidth_share:.0%} of the measured {bandwidth_gb_per_s} GB/s.\n".format_map(plain))
        lines = full(rows) if len(rows) <= MANY else by_budget(rows)
        print(markdown(lines))
    for (temperature, size), rows in seeds.items():
        if lines := of_seeds(rows):
            print(f"\nHeads of several seeds, temperature {temperature}, a target of {size} MB:\n\n{markdown(lines)}")


def markdown(lines: list[list[str]]) -> str:
    """Makes a Markdown table of cells."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    main()
