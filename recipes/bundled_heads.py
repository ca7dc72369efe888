"""Trains the draft heads for the bundled target, all on the same shards and with the same number of token passes.

    python recipes/bundled_heads.py --data ../shared/data --out build/heads --tokens 1500000 --seeds 0 1 2
    python recipes/bundled_heads.py --data ../shared/data --out build/shipped --only fspad-slim ctc-long eagle-slim \
        --tokens 2400000 --steps 1920 --batch-tokens 16384 --calibrate

The first command trains the heads to compare. It finishes each seed before the next, so the heads can be compared at any
time. The second command trains the shipped heads fspad, ctc and eagle, and measures the tokens per step of their trees.

An interrupted run continues where it stopped. `--no-keep-features` and other options are passed on to `foredraft train`.
The measured heads and the shipped heads were trained in this way on one GPU. A CPU generated the target's answers.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
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
"""Files of chats and questions. `other_prompts` makes questions from further files."""

VARIANTS = {
    "fspad": "--method fspad",
    "eagle": "--method eagle",
    "ctc": "--method ctc",
    "hydra": "--method hydra",
    "hydra-plain": "--method hydra --set prefix_attention=false --set num_layers=1",
    "medusa": "--method medusa",
    "fspad-sampling": "--method fspad --set partial_alignment=false",
    "fspad-alignment": "--method fspad --set feature_sampling=false",
    "ctc-whole": "--method ctc --set prefixes=false --set labels=5",
    "parallel": "--method parallel",
    "fspad-slim": "--method fspad --set intermediate=256 --set unroll=3 --set classification=1",
    "eagle-slim": "--method eagle --set intermediate=256 --set unroll=3 --set classification=1",
    "ctc-long": "--method ctc --set num_slots=8 --set labels=8",
    "eagle3": "--method eagle3 --set heads=3 --set kv_heads=3 --set feature_layers=[2,5,-1]",
}
"""Training options of the heads, by name.

The list holds the methods (`hydra` is Hydra++, `hydra-plain` is Hydra without the layer before its heads), their ablations
(FSPAD with one of its parts, CTC with its loss over whole answers, its layer with cross-entropy), and the shipped heads.
"""


def records(file: Path) -> Iterator[dict]:
    """Yields the records of a JSON Lines file."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def other_prompts(data: Path) -> Iterator[str]:
    """Yields prompts that ask for summaries, translations (FLORES, split dev) and programs (MBPP without its test split)."""
    for record in records(data / "train" / "scitldr_a.jsonl.gz"):
        yield "Summarize: " + " ".join(record["source"])
    for record in records(data / "eval" / "flores200_en_de_fr_es.jsonl"):
        if record["split"] == "dev":
            yield f"Translate German to English: {record['deu_Latn']}"
    for record in records(data / "eval" / "mbpp.jsonl"):
        if record["split"] != "test":
            yield record["text"]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the subfolders train and eval")
    parser.add_argument("--out", type=Path, required=True, help="folder for the heads and the shards (8 GB)")
    parser.add_argument("--shards", type=Path, help="folder of the shards; default: OUT/shards")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--tokens", type=int, default=1_000_000, help="number of answer tokens that the target generates")
    parser.add_argument("--steps", type=int, default=400, help="number of training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training runs")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the tokens per step of every tree, for the automatic choice"
    )
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    asked = args.out / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in other_prompts(args.data)))
    files = [args.data / "train" / f"{name}.jsonl.gz" for name in CHATS] + [asked]
    given = [part for file in files for part in ("--data", str(file))]
    for seed, name in itertools.product(args.seeds, args.only):
        out = args.out / f"{name}-{seed}"
        command = f"""{sys.executable} -m foredraft train {VARIANTS[name]} --out {out} --plot {out}.png
            --shards {args.shards or args.out / "shards"} --feature-layers 2,4,5 --tokens {args.tokens} --temperatures 0,0.7,1
            --max-len 512 --steps {args.steps} --seed {seed}"""
        subprocess.run([*command.split(), *given, *more], check=True)
        if args.calibrate:
            subprocess.run([sys.executable, "-m", "foredraft", "calibrate", "--draft-model", out], check=True)


if __name__ == "__main__":
    main()
