"""Distils the bundled draft language model from the bundled target, in an estimated hour and a half on one core.

The student learns the target's full next-token distribution at every position. The texts are answers that the target generates
(at temperatures 0 to 1) and training texts.

    documents -> prompts -> answers and the target's features (shards) -> student -> held-out metrics -> acceptance by rank

Finished shards stay in ``--work``, and a run that was interrupted reuses them. ``--smoke`` runs everything in a minute or two.

    OMP_NUM_THREADS=1 python recipes/distill_draft_lm.py --data ../shared/data/train --out build/draft-lm
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from distill.batches import load_rows
from distill.capture import WINDOW, capture, plan_texts
from distill.corpus import encode, read_documents
from distill.save import provenance, save, write_json
from distill.student import evaluate, new_student
from distill.train import train
from foredraft import LLM
from foredraft.bench.calibrate import CalibrateChoice, calibrate
from foredraft.core.folders import BUNDLED_TARGET


class Size(NamedTuple):
    """Size of a run.

    Attributes:
        documents: number of documents to read; None: all.
        tokens: number of answer tokens.
        steps: number of training steps.
        prompts: number of prompts on which the acceptance is measured.
    """

    documents: int | None
    tokens: int
    steps: int
    prompts: int


FULL = Size(documents=None, tokens=1_500_000, steps=1123, prompts=40)
SMOKE = Size(documents=150, tokens=10_000, steps=4, prompts=4)


def distill(target: Path, data: Path, out: Path, work: Path, size: Size, seed: int) -> None:
    """Runs the recipe: captures the texts, trains the student, saves it, and measures it."""
    llm = LLM(target, {"method": "ar"}, device="cpu", max_model_len=WINDOW, max_num_seqs=160, seed=seed)
    examples = [encode(turns, llm.tokenizer) for turns in read_documents(data, seed)[: size.documents]]
    capture(llm, plan_texts(examples), work, size.tokens)
    rows = load_rows(work)

    torch.manual_seed(seed)
    student = new_student(llm.target)
    training = train(student, llm.target, [row for row in rows if not row.held_out], size.steps, seed)

    saved = save(student, out)
    held_out = evaluate(saved, llm.target, [row for row in rows if row.held_out])
    about = provenance(target, student, rows, size.steps, training)
    write_json(out / "provenance.json", about | {"held_out": held_out, "seed": seed})
    calibrate(CalibrateChoice(model=str(target), draft_model=str(out), limit=size.prompts))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=BUNDLED_TARGET, help="folder of the target; default: the bundled one")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training text (.jsonl.gz)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft model")
    parser.add_argument("--work", type=Path, default=Path("build/distill"), help="folder for the shards (2 GB)")
    parser.add_argument("--smoke", action="store_true", help="use tiny sizes, to check that everything works")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size, work = (SMOKE, args.work / "smoke") if args.smoke else (FULL, args.work / "full")
    distill(args.target, args.data, args.out, work, size, args.seed)


if __name__ == "__main__":
    main()
