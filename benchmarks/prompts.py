"""Writes the evaluation prompts of the committed benchmarks, from GSM8K test, MT-bench (first turns) and HumanEval.

python benchmarks/prompts.py --data ../shared/data/eval --output build/eval24.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SETS = (("gsm8k_test.jsonl", "question"), ("mt_bench.jsonl", "turns"), ("humaneval.jsonl", "prompt"))


def read(data: Path, each: int, first: int) -> list[dict[str, str]]:
    """Reads `each` prompts of every set, from number `first` on."""
    prompts = []
    for name, key in SETS:
        rows = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()[first : first + each]]
        prompts += [{"set": name, "prompt": row[key] if isinstance(row[key], str) else row[key][0]} for row in rows]
    return prompts


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation prompts")
    parser.add_argument("--each", type=int, default=8, help="number of prompts of each set")
    parser.add_argument("--first", type=int, default=8, help="number of the first prompt in each set, from 0")
    parser.add_argument("--output", type=Path, required=True, help="file for the prompts")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row) + "\n" for row in read(args.data, args.each, args.first)))


if __name__ == "__main__":
    main()
