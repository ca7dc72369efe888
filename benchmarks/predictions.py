"""Predicts the rejections of two real pairs of models, and compares them with the counts of the engine.

    python benchmarks/predictions.py --prompts build/eval24.jsonl --output benchmarks/results/predictions.jsonl

The predictions are Theorems 1 and 3 of Yin et al. with a finite lookahead and a bonus token. The drafts are chains of 4 (M = 1)
and M chains of 4, at temperatures 0.6 and 1. The bundled pair answers the prompts. The two story models of tests/data continue
the openings of stories.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, report, rounded

from foredraft.theory.predict import predict
from foredraft.theory.texts import Texts

DATA = Path(__file__).parents[1] / "tests" / "data"
STORIES = (
    *("Once upon a time", "The cat sat on", "One day a girl named", "There was a", "In the morning", "My dog is"),
    *("It was a sunny day", "The old man", "A little bird", "Tom and Sue", "In a big forest", "Mom said that"),
)
COLUMNS = (
    *("pair", "temperature", "drafts", "predicted", "counted", "ratio", "z", "plain_theorem"),
    *("predicted_length", "counted_length", "distance", "first_acceptance", "optimum"),
)


def texts_of(pair: str, temperature: float, args: Any, stories: Path) -> Texts:
    """Makes the texts of a pair."""
    if pair == "bundled":
        return Texts(args.prompts, temperature=temperature, repeats=args.repeats)
    models = {"model": str(DATA / "babyllama-105"), "draft_model": str(DATA / "babyllama-105-b")}
    return Texts(stories, **models, temperature=temperature, repeats=2 * args.repeats, dtype="float32", raw=True)


def main() -> None:
    """Runs the command line."""
    parser = arguments(__doc__, models=False)
    parser.add_argument("--prompts", type=Path, required=True, help="file of prompts")
    parser.add_argument("--repeats", type=int, default=4, help="number of texts per prompt")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        stories = Path(folder) / "stories.txt"
        stories.write_text("\n".join(STORIES) + "\n")
        for pair in ("bundled", "story models"):
            for temperature in (0.6, 1.0):
                found = predict(texts_of(pair, temperature, args, stories), lookahead=4, drafts=(1, 2, 4, 8))
                shared = {key: value for key, value in found._asdict().items() if key != "compared"}
                for row in found.compared:
                    z = (row.counted - row.predicted) / row.standard_error
                    extra = {"pair": pair, "ratio": row.counted / row.predicted, "z": z}
                    rows.append(rounded({**shared, **row._asdict(), **extra}))
    report(args.output, rows, COLUMNS, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
