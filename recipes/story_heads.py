"""Trains the small heads of `tests/data/heads` for the story model of the tests, in a quarter of an hour on one core.

OMP_NUM_THREADS=1 python recipes/story_heads.py --out build/story-heads
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ["Tom", "Lily", "Sue", "Max", "Ben", "Mia", "Sam", "Anna", "Jack", "Lucy", "Tim", "Amy", "Bob", "Sara", "Leo"]
PLACES = ["the park", "the beach", "the forest", "the garden", "school", "the farm", "the zoo", "the shop", "the lake", "home"]
THINGS = ["a red ball", "a big dog", "a small cat", "a toy car", "a blue bird", "an apple", "a shiny stone", "a kite", "a book"]
OPENINGS = [
    "Once upon a time, there was a {kind} named {name}. {name} had {thing}.",
    "One day, {name} went to {place} with {thing}.",
    "{name} and {other} were playing in {place}.",
    "{name} wanted {thing}.",
    "{name} saw {thing} in {place}.",
    "There was a {kind} called {name} who lived near {place}.",
    '"Look, {other}!" said {name}. "I found {thing}!"',
]
MORE = {"eagle3": ["--set", "unroll=3", "--set", "feature_layers=[2,3,4]", "--set", "draft_vocab_size=80"]}


def openings(count: int) -> list[str]:
    """Makes `count` different openings of stories."""
    rng, found = random.Random(0), set()
    while len(found) < count:
        name, other = rng.sample(NAMES, 2)
        kind = rng.choice(["girl", "boy", "bunny", "bear"])
        words = {"kind": kind, "place": rng.choice(PLACES), "thing": rng.choice(THINGS), "name": name, "other": other}
        found.add(rng.choice(OPENINGS).format(**words))
    return sorted(found)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["eagle", "fspad", "eagle3", "medusa", "hydra", "parallel", "ctc"])
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "stories.jsonl"
    data.write_text("".join(json.dumps({"prompt": opening}) + "\n" for opening in openings(1200)))
    for method in args.methods:
        work = args.out / f"{method}-run"
        command = f"""{sys.executable} -m foredraft train --method {method} --model {ROOT}/tests/data/babyllama-105
            --data {data} --out {work} --shards {args.out}/shards --feature-layers 2,3,4 --tokens 80000 --max-len 192
            --steps {args.steps} --batch-tokens 2048 --evaluate-every 50 --lr 3e-3"""
        subprocess.run([*command.split(), *MORE.get(method, [])], check=True)
        (args.out / method).mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(work / name, args.out / method / name)


if __name__ == "__main__":
    main()
