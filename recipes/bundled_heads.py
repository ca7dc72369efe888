"""Trains the draft heads for the bundled target: prompts, the target's answers and features once, then every head on the same
shards.

    python recipes/bundled_heads.py --data ../shared/data --out build/heads

Every head learns from the same number of token passes. A run that was cut off goes on where it was. ``--only`` picks methods,
``--steps`` and ``--seed`` are for experiments; what ships is trained with the defaults.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHATS = (
    "dolly_15k",
    "gsm8k_train",
    "oasst_pythia12b_1k_prompts",
    "oasst_lottery250_open_models",
    "oasst_en_100_trees",
    "arena_bench_v1_open_models",
    "arena_hard_v2_sky_t1_32b",
    "gpteacher_codegen",
    "gpteacher_roleplay",
    "self_instruct_seed_tasks",
    "sgd_dialogues",
)
"""Files of chats and questions; what else there is becomes questions by `other_prompts`."""

METHODS = ("eagle", "fspad", "ctc", "hydra", "medusa", "parallel", "eagle3")


def records(file: Path) -> Iterator[dict]:
    """The records of a JSON Lines file."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def other_prompts(data: Path) -> Iterator[str]:
    """Summaries, translations (FLORES, split dev) and programs (MBPP without its test split), asked for in plain words."""
    for record in records(data / "train" / "scitldr_a.jsonl.gz"):
        yield "Summarize: " + " ".join(record["source"])
    for record in records(data / "eval" / "flores200_en_de_fr_es.jsonl"):
        if record["split"] == "dev":
            yield f"Translate German to English: {record['deu_Latn']}"
    for record in records(data / "eval" / "mbpp.jsonl"):
        if record["split"] != "test":
            yield record["text"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="gets a folder for each head, and the shards (8 GB)")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="answer tokens that the target writes")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="added to the folder's name")
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asked = args.out / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in other_prompts(args.data)))
    files = [args.data / "train" / f"{name}.jsonl.gz" for name in CHATS] + [asked]
    for method in args.only:
        command = f"""{sys.executable} -m foredraft train --method {method} --out {args.out / (method + args.name)}
            --shards {args.out / "shards"} --tokens {args.tokens} --temperatures 0,0.7,1 --max-len 512 --feature-layers 2,4,5
            --steps {args.steps} --seed {args.seed} --plot {args.out / (method + args.name)}.png"""
        given = [part for file in files for part in ("--data", str(file))]
        subprocess.run([*command.split(), *given, *more], check=True)


if __name__ == "__main__":
    main()
