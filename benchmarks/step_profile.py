"""Shows in which functions a step of the compiled decoder spends its time. It needs `perf` (Linux).

For each set and each number of rows, a process repeats one step while `perf record` samples it on all its threads. A share is
the part of all samples of the process. Functions below one percent are left out.

    python benchmarks/step_profile.py --model DIR --sets avx512_bf16 avx2 --output FILE
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from shutil import which

import torch
from measuring import report

LEAST_SHARE = 0.01


def repeat(model: str, rows: int) -> None:
    """Repeats a step of `rows` rows until the process is ended."""
    from steps import forwards

    from foredraft.models.loading import load_target

    target = load_target(Path(model), dtype="bfloat16", device="cpu")
    run = dict(forwards(target))[rows]
    run()
    print("ready", flush=True)
    while True:
        run()


def shares(model: Path, name: str, rows: int, seconds: float) -> dict[str, float]:
    """Returns the share of each function in the samples of a process that repeats one step."""
    command = [sys.executable, __file__, "--worker", str(model), str(rows)]
    environment = os.environ | {"FOREDRAFT_KERNELS": name}
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as worker:
        try:
            assert worker.stdout is not None
            if not worker.stdout.readline():
                raise SystemExit("error: the process that repeats a step ended")
            recorded = ["perf", "record", "-q", "-e", "cpu-clock", "-p", str(worker.pid), "-o", f"{folder}/data"]
            subprocess.run([*recorded, "--", "sleep", str(seconds)], check=True)
            asked = ["perf", "report", "--stdio", "--no-children", "--sort", "symbol", "-t", ";", "-i", f"{folder}/data"]
            lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
        finally:
            worker.kill()
    found = Counter[str]()
    for line in lines:
        match = re.match(r"\s*([\d.]+)%?\s*;\s*\[([.k])\]\s*(\S+)", line)
        if match:
            share, kind, symbol = match.groups()
            found["the kernel of the system" if kind == "k" else symbol.split(".")[0]] += float(share) / 100
    return dict(found.most_common())


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="numbers of rows that `steps.py` times")
    parser.add_argument("--sets", nargs="+", required=True, help="instruction sets")
    parser.add_argument("--seconds", type=float, default=8, help="time of each recording")
    parser.add_argument("--output", type=Path, required=True, help="file for the results")
    given = parser.parse_args()
    if which("perf") is None:
        parser.error("`perf` is missing: install the package linux-tools or linux-perf of your system")
    rows = [
        {"model": given.model.name, "set": name, "rows": count, "function": function, "share": round(share, 3)}
        for name in given.sets
        for count in given.rows
        for function, share in shares(given.model, name, count, given.seconds).items()
        if share >= LEAST_SHARE
    ]
    report(given.output, rows, ["set", "rows", "function", "share"], device=torch.device("cpu"), dtype="bfloat16")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        repeat(sys.argv[-2], int(sys.argv[-1]))
    else:
        main()
