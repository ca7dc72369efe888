"""Draws the speed of drafting and the chosen sizes of trees by the number of running requests, from a file of `running.py`.

    python benchmarks/running_figure.py benchmarks/results/running-350m.jsonl --output docs/figures/running-350m.svg

The upper panels show the ratio to plain decoding with its interval, and what costs and acceptance allow (dashed). The lower
panels show which share of the steps of requests had how many nodes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foredraft.core.plots import new_figure


def drawn(rows: list[dict[str, Any]]) -> Any:
    """Draws the figure, a column per temperature."""
    laws = sorted({row["temperature"] for row in rows})
    sizes = sorted({int(nodes) for row in rows for nodes in row["budgets"]})
    figure = new_figure(4.2 * len(laws), 5.0)
    panels = figure.subplots(2, len(laws), squeeze=False, sharex="col")
    for column, law in enumerate(laws):
        group = [row for row in rows if row["temperature"] == law]
        running, places = [str(row["running"]) for row in group], range(len(group))
        ratios = [row["ratio_median"] for row in group]
        upper, lower = panels[0][column], panels[1][column]
        below = [ratio - row["ratio_low"] for ratio, row in zip(ratios, group, strict=True)]
        above = [row["ratio_high"] - ratio for ratio, row in zip(ratios, group, strict=True)]
        upper.errorbar(places, ratios, yerr=[below, above], fmt="o-", color="C0", capsize=3, label="measured")
        upper.plot(places, [row["ratio_allowed"] for row in group], "--", color="C1", label="allowed by costs and acceptance")
        upper.axhline(1, color="black", linewidth=0.6)
        upper.set_title(f"temperature {law}", fontsize=9)
        upper.set_ylabel("tokens per second, relative to plain decoding", fontsize=8)
        upper.legend(fontsize=7)
        bottom = [0.0] * len(group)
        for number, nodes in enumerate(sizes):
            shares = [row["budgets"].get(str(nodes), 0.0) for row in group]
            shade = 0.9 - 0.8 * number / max(1, len(sizes) - 1)
            lower.bar(
                running, shares, bottom=bottom, color=str(shade), edgecolor="black", linewidth=0.3, label=f"{nodes} nodes"
            )
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        lower.set_xlabel("running requests", fontsize=8)
        lower.set_ylabel("share of steps", fontsize=8)
        lower.legend(fontsize=7)
    return figure


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("rows", type=Path, help="file that running.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="file for the figure")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    drawn([json.loads(line) for line in args.rows.read_text().splitlines()]).savefig(args.output)


if __name__ == "__main__":
    main()
