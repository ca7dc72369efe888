"""Draws the tokens per step of heads, from files that `heads.py` wrote.

    python benchmarks/heads_figure.py benchmarks/results/heads-14m-*.jsonl --trees topk:8 --output docs/figures/heads-14m.svg

The figure has a panel per temperature and a bar per method, the longest on top. A dot marks every trained seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from tables import by_method

from foredraft.core.plots import new_figure


def panels(paths: list[Path], endings: list[str]) -> dict[float, dict[str, list[float]]]:
    """Reads the tokens per step of every head, by temperature and method. Methods must end with one of `endings`."""
    rows: dict[float, list[dict[str, Any]]] = {}
    for path in paths:
        every = [json.loads(line) for line in path.read_text().splitlines()]
        rows.setdefault(every[0]["temperature"], every[:1]).extend(every[1:])
    return {
        temperature: {
            name: [row["acceptance_length"] for row in group]
            for name, group in by_method(measured).items()
            if name.endswith(tuple(endings))
        }
        for temperature, measured in sorted(rows.items())
    }


def drawn(found: dict[float, dict[str, list[float]]]) -> Any:
    """Draws the figure."""
    most = max(len(methods) for methods in found.values())
    figure = new_figure(4.6 * len(found), 0.6 + 0.32 * most)
    for axes, (temperature, methods) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        order = sorted(methods, key=lambda name: fmean(methods[name]))
        axes.barh(order, [fmean(methods[name]) for name in order], color="C0", alpha=0.7)
        for place, name in enumerate(order):
            axes.plot(methods[name], [place] * len(methods[name]), ".", color="black", markersize=4)
        axes.set_title(f"temperature {temperature:g}", fontsize=9)
        axes.set_xlabel("tokens a step")
        axes.set_xlim(left=1)
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(axis="y", labelsize=8)
    return figure


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("rows", type=Path, nargs="+", help="files that heads.py wrote")
    parser.add_argument("--trees", nargs="+", default=[""], help="endings of the methods to draw, such as topk:8; default: all")
    parser.add_argument("--output", type=Path, required=True, help="file for the figure")
    args = parser.parse_args()
    found = panels(args.rows, args.trees)
    if not all(found.values()):
        parser.exit(1, f"error: no method of {', '.join(map(str, args.rows))} ends with {' or '.join(args.trees)}\n")
    drawn(found).savefig(args.output, bbox_inches="tight")


if __name__ == "__main__":
    main()
