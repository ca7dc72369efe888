"""Makes figures and tables from the results of `dyspec_experiments.py`.

    python benchmarks/dyspec_figures.py --rows benchmarks/results/dyspec-experiments.jsonl --output docs/figures

It writes dyspec-hypothesis.png, dyspec-length.png and dyspec-promise.png, and prints the tables of docs/dyspec-experiments.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foredraft.core.plots import new_figure

Rows = list[dict[str, Any]]

STYLES = {
    "dyspec": ("C0", "o-"),
    "dyspec, calibrated": ("C0", "s--"),
    "dyspec, draft at 0.6": ("C4", "v:"),
    "sequoia": ("C1", "^-"),
    "branching": ("C2", "D-"),
    "specinfer": ("C2", "x--"),
    "chain": ("C7", ".-"),
}

PROMISED = ("dyspec", "dyspec, calibrated", "dyspec, draft at 0.6", "sequoia")
"""Trees whose node values add up to the expected tokens. In other trees, siblings may be equal and then count only once."""
VARIANTS = ("dyspec", "dyspec, calibrated, reach only", "dyspec, calibrated, rank only", "dyspec, calibrated", "sequoia")


def hypothesis(rows: Rows) -> Any:
    """Draws the acceptance against the draft probability, with a panel for every way of drafting."""
    figure = new_figure(3.1 * len(rows), 3.2)
    for axes, row in zip(figure.subplots(1, len(rows), sharey=True), rows, strict=True):
        for part, colour in (("first", "C0"), ("later", "C3")):
            bins = [cell for cell in row[part]["bins"] if cell["tested"] >= 10]
            errors = [math.sqrt(cell["accepted"] * (1 - cell["accepted"]) / cell["tested"]) for cell in bins]
            x, y = [cell["prob"] for cell in bins], [cell["accepted"] for cell in bins]
            label = {"first": "first child", "later": "later siblings"}[part]
            axes.errorbar(x, y, errors, fmt="o-", color=colour, label=label, markersize=3.5, linewidth=1)
        axes.plot([0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="DySpec's estimate")
        axes.set_title(f"target at {row['temperature']:g}, draft at {row['draft_temperature']:g},\n{drafted(row)}", fontsize=9)
        axes.set_xlabel("draft probability")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share accepted when tested")
    figure.axes[0].legend(fontsize=8)
    return figure


def drafted(row: dict[str, Any]) -> str:
    """Says how the children of a row were chosen."""
    return "drawn" if row["sampled"] else "likeliest first"


def length(rows: Rows) -> Any:
    """Draws the tokens per step against the number of nodes, with a panel for every temperature."""
    temperatures = sorted({row["temperature"] for row in rows})
    figure = new_figure(4.0 * len(temperatures), 3.6)
    for axes, temperature in zip(figure.subplots(1, len(temperatures), sharey=True), temperatures, strict=True):
        for tree, (colour, line) in STYLES.items():
            sizes = sorted((row["nodes"], row) for row in rows if row["tree"] == tree and row["temperature"] == temperature)
            if sizes:
                y, errors = ([row[key] for _, row in sizes] for key in ("tokens_per_step", "standard_error"))
                x = [nodes for nodes, _ in sizes]
                axes.errorbar(x, y, errors, fmt=line, color=colour, label=tree, markersize=4.5, linewidth=1.2)
        axes.set(title=f"temperature {temperature:g}", xlabel="nodes", xscale="log")
        axes.set_xticks([4, 16, 64, 256, 768], ["4", "16", "64", "256", "768"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens a step")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.axes[1].legend(handles, labels, fontsize=7.5, loc="upper left")
    return figure


def promise(rows: Rows, nodes: int = 64) -> Any:
    """Draws the predicted and the accepted nodes by depth, for three trees of one size at temperatures 0 and 1.

    The draft distribution gives the prediction.
    """
    trees, temperatures = ("dyspec", "dyspec, calibrated", "sequoia"), (0.0, 1.0)
    figure = new_figure(10.0, 5.2)
    panels = figure.subplots(len(temperatures), len(trees), sharex=True, sharey="row")
    for line, temperature in zip(panels, temperatures, strict=True):
        for axes, tree in zip(line, trees, strict=True):
            depth = only(rows, tree, nodes, temperature)["by_depth"]
            for part, colour in (("", "C0"), ("_first", "C3")):
                what = "first children only" if part else "all nodes"
                axes.plot(range(1, 9), depth["accepted" + part], f"{colour}o-", markersize=4, label=f"accepted, {what}")
                axes.plot(range(1, 9), depth["promised" + part], f"{colour}x:", markersize=4, label=f"promised, {what}")
            axes.set_title(f"{tree}, temperature {temperature:g}", fontsize=9)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("depth")
    for line in panels:
        line[0].set_ylabel("nodes a step")
    panels[0][0].legend(fontsize=8)
    return figure


def only(rows: Rows, tree: str, nodes: int, temperature: float) -> dict[str, Any]:
    """Returns the only row of a tree, size and temperature."""
    [found] = [row for row in rows if (row["tree"], row["nodes"], row["temperature"]) == (tree, nodes, temperature)]
    return found


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Makes a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def hypothesis_table(rows: Rows) -> str:
    """Makes a table of the correlation, the mean acceptance and the mean draft probability."""
    head = ["target at", "draft at", "children", "tested", "correlation"]
    head += ["first child: accepted (draft probability)", "later siblings: accepted (draft probability)"]
    lines = []
    for row in rows:
        cells = [f"{row['temperature']:g}", f"{row['draft_temperature']:g}", drafted(row), str(row["all"]["tested"])]
        parts = [f"{row[part]['accepted']:.3f} ({row[part]['prob']:.3f})" for part in ("first", "later")]
        lines.append([*cells, f"{row['all']['correlation']:.2f}", *parts])
    return table(head, lines)


def pivot(rows: Rows, trees: Sequence[str], cell: Callable[[dict[str, Any]], str]) -> str:
    """Makes a table with a line for every tree and a column for every temperature and size."""
    rows = [row for row in rows if row["tree"] in trees]
    columns = sorted({(row["temperature"], row["nodes"]) for row in rows})
    cells = {(row["tree"], row["temperature"], row["nodes"]): cell(row) for row in rows}
    lines = [[tree, *(cells.get((tree, *column), "") for column in columns)] for tree in trees]
    return table(["tree", *(f"T={t:g}, {n}" for t, n in columns)], lines)


def tokens(row: dict[str, Any]) -> str:
    """Formats the tokens per step with their standard error."""
    return f"{row['tokens_per_step']:.2f} ± {row['standard_error']:.2f}"


def offload_table(rows: Rows) -> str:
    """Makes a table of the speed relative to plain decoding and to the best chain."""
    temperatures = sorted({row["temperature"] for row in rows})
    head = ["tree", "nodes", "draft passes a step", *(f"T={t:g}" for t in temperatures)]
    lines: dict[tuple[str, ...], dict[float, dict[str, Any]]] = {}
    for row in rows:
        if row["tree"] in ("dyspec", "sequoia", "branching", "dyspec, calibrated") and row["nodes"] > 16:
            name = row["tree"] + (f", {row['construction']}" if row["tree"] == "dyspec" else "")
            lines.setdefault((name, str(row["nodes"])), {})[row["temperature"]] = row
    printed = []
    for key, found in sorted(lines.items(), key=lambda line: int(line[0][1])):
        passes = " / ".join(f"{row['draft_passes']:.1f}" for _, row in sorted(found.items()))
        printed.append(
            [*key, passes, *(f"{row['over_plain']:.2f} ({row['over_chain']:.2f})" for _, row in sorted(found.items()))]
        )
    return table(head, printed)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="file that dyspec_experiments.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    parts = {name: [row for row in rows if row.get("experiment") == name] for name in ("hypothesis", "length", "offload")}
    args.output.mkdir(parents=True, exist_ok=True)
    hypothesis(parts["hypothesis"]).savefig(args.output / "dyspec-hypothesis.png", dpi=75)
    length(parts["length"]).savefig(args.output / "dyspec-length.png", dpi=75)
    promise(parts["length"]).savefig(args.output / "dyspec-promise.png", dpi=75)
    print(hypothesis_table(parts["hypothesis"]), end="\n\n")
    lengths = parts["length"]
    print(pivot(lengths, [tree for tree in STYLES if tree != "chain"], tokens), end="\n\n")
    print(pivot(lengths, ["chain"], tokens), end="\n\n")
    print(pivot(lengths, PROMISED, lambda row: f"{row['promised_per_step']:.2f} / {row['tokens_per_step']:.2f}"), end="\n\n")
    print(pivot([row for row in lengths if row["temperature"] == 1 and row["nodes"] < 256], VARIANTS, tokens), end="\n\n")
    print(offload_table(parts["offload"]), end="\n\n")
    print("chains:", {(r["temperature"], r["nodes"]): r["over_plain"] for r in parts["offload"] if r["tree"] == "chain"})


if __name__ == "__main__":
    main()
