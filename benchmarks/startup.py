"""Seconds until the command line answers, above the imports that nobody can avoid.

Commands and baselines take turns, as whole processes on a warm disk. A row has the median and the worst over the rounds of the
difference between a command and its baseline in the same round, and the budget that the product has set itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from measuring import arguments, median, report, rotated, rounded, rounds

from foredraft.kernels import cpu_flags

ROUNDS = 10
SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Instruction sets that are written beside the figures."""

BASELINES = {"typer, rich": ["-c", "import typer, rich"], "torch": ["-c", "import torch"]}


class Case(NamedTuple):
    """A command, what it is compared with, and the most seconds that it may take longer."""

    arguments: list[str]
    baseline: str
    budget_s: float
    environment: dict[str, str] | None = None


GENERATE = ["generate", "Once upon a time", "--max-tokens", "4"]
QUICK = {
    "help": ["--help"],
    "methods": ["methods"],
    "an option that does not exist": ["generate", "x", "--nonsense"],
    "a tree that does not exist": ["generate", "x", "--tree", "dyspek"],
    "a method that does not exist": ["generate", "x", "--method", "eagel"],
    "an unknown key": ["generate", "x", "--speculative-config", '{"no_such_key": 1}'],
}


def cases(nowhere: str) -> dict[str, Case]:
    """What is measured; `nowhere` cannot be written."""
    found = {name: Case(given, "typer, rich", 0.3) for name, given in QUICK.items()}
    found["generate"] = Case(GENERATE, "torch", 1.2)
    found["generate, plain decoding"] = Case([*GENERATE, "--method", "ar"], "torch", 1.2)
    found["generate, FSPAD"] = Case([*GENERATE, "--method", "fspad", "--tree", "dyspec", "--budget", "8"], "torch", 1.2)
    found["generate, cache folder not writable"] = Case(GENERATE, "generate", 1.0, {"FOREDRAFT_CACHE": nowhere})
    return found


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Wall-clock time of a process."""
    began = perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False)
    return perf_counter() - began


def measure(count: int, minutes: float) -> list[dict[str, Any]]:
    """Rows of all cases, after one round that is not counted: it fills the caches."""
    with tempfile.NamedTemporaryFile() as file:  # a file in the place of a folder cannot be written by anyone
        every = cases(str(Path(file.name) / "cache"))
        run: dict[str, tuple[list[str], dict[str, str]]] = {name: (given, {}) for name, given in BASELINES.items()}
        run |= {name: (["-m", "foredraft", *case.arguments], case.environment or {}) for name, case in every.items()}
        found: dict[str, list[float]] = {name: [] for name in run}
        for number in rounds(count + 1, minutes):
            for name, (given, environment) in rotated(list(run.items()), number):
                taken = seconds([sys.executable, *given], environment)
                found[name] += [taken] if number else []
    rows = []
    for name, case in every.items():
        above = [mine - base for mine, base in zip(found[name], found[case.baseline], strict=True)]
        row = {"case": name, "baseline": case.baseline, "budget_s": case.budget_s, "rounds": len(above)}
        row |= {"median_s": median(found[name]), "baseline_s": median(found[case.baseline])}
        rows.append(rounded({**row, "median_above_s": median(above), "worst_above_s": max(above)}))
    return rows


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, models=False, minutes=20)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    sets = " ".join(name for name in SETS if name in cpu_flags())
    rows = [{**row, "instruction_sets": sets} for row in measure(given.rounds, given.minutes)]
    columns = ["case", "baseline", "median_s", "median_above_s", "worst_above_s", "budget_s"]
    report(given.output, rows, columns, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
