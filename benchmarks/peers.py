"""Compares plain decoding and prompts with other engines, on the same weights of 16 bits and with as many threads.

    python benchmarks/to_gguf.py --model DIR
    python benchmarks/peers.py --model DIR --llama-bench FILE --vllm-python FILE --output FILE
    python benchmarks/peers.py --model FILE.gguf --activations int8 --llama-bench FILE --output FILE

The engines take turns in every round, one request at a time, and those that wait are idle. foredraft takes a turn before each
other engine, so that the two turns of a ratio follow each other. A turn begins with a few tokens that are not counted.
*Decoding* is the time of 64 tokens after a prompt of 64 tokens. *Prompt* is the time of a prompt of 512 tokens up to its first
token. Prompts are random, and each is used once. The memory bandwidth is measured in every round.

Transformers runs in bfloat16 and in float32, and llama.cpp in bfloat16 and in float16. vLLM runs in bfloat16, and in float32 as
well where the processor has no products of bfloat16. `llama-bench` counts neither the choice of a token nor its text; the other
engines count both.

A ratio is above 1 where foredraft is faster. It is the median of the ratios of the rounds, with the interval that encloses the
median with a probability of 95 % (94 % for five rounds).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import torch
from engines import PROMPT, REST_S, Engine, Turn, engines
from measuring import arguments, interval, median, report, rotated, rounded, rounds

from foredraft.bench.bandwidth import read_bandwidth
from foredraft.kernels import cpu_flags

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""Features of a processor that are written beside the figures."""

FACTS = ("version", "instruction_set", "threads", "compiled", "openmp", "preloaded", "n_threads", "flash_attn", "system_info")
"""What the list below the table says of the engines."""


class Pair(NamedTuple):
    """A turn of ours, and the turn of another engine that follows it."""

    ours: Turn
    theirs: Turn


def measure(every: Sequence[Engine], count: int, minutes: float) -> tuple[list[list[Pair]], list[float]]:
    """Measures the engines in turns. Ours, the first one, takes a turn before each of the others.

    Returns:
        The turns of each other engine, each with our turn before it, and the memory bandwidth of each round, in bytes a second.
    """
    ours, others = every[0], every[1:]
    pairs: list[list[Pair]] = [[] for _ in others]
    bandwidths, seeds = [], iter(range(1 << 62))
    for engine in every:  # the first turn compiles and allocates
        engine.turn(seeds)
    for number in rounds(count, minutes):
        sleep(REST_S)
        bandwidths.append(read_bandwidth(torch.device("cpu")))
        for place in rotated(range(len(others)), number):
            pair = []
            for engine in (ours, others[place]):
                sleep(REST_S)
                pair.append(engine.turn(seeds))
            pairs[place].append(Pair(*pair))
    return pairs, bandwidths


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Returns the median of how many times as fast mine is, and the ends of its interval over the rounds."""
    found = sorted(their / my for my, their in zip(mine, theirs, strict=True))
    low, high = interval(len(found))
    return median(found), found[low], found[high]


def speeds(engine: Engine, turns: Sequence[Turn]) -> dict[str, Any]:
    """Makes the columns of one engine alone."""
    tokens, prompts = [turn.token_s for turn in turns], [turn.prompt_s for turn in turns]
    return {
        "engine": engine.name,
        "weights": engine.dtype,
        "ms_per_token": 1e3 * median(tokens),
        "ms_fastest": 1e3 * min(tokens),
        "ms_slowest": 1e3 * max(tokens),
        "prompt_tokens_per_s": PROMPT / median(prompts),
        "prompt_fastest": PROMPT / min(prompts),
        "prompt_slowest": PROMPT / max(prompts),
        "turns": [list(turn) for turn in turns],
    }


def ratios(pairs: Sequence[Pair]) -> dict[str, float]:
    """Makes the columns that compare an engine with ours."""
    tokens = ratio([pair.ours.token_s for pair in pairs], [pair.theirs.token_s for pair in pairs])
    prompts = ratio([pair.ours.prompt_s for pair in pairs], [pair.theirs.prompt_s for pair in pairs])
    names = ("decoding_ratio", "decoding_low", "decoding_high", "prompt_ratio", "prompt_low", "prompt_high")
    return dict(zip(names, (*tokens, *prompts), strict=True))


def rows_of(model: Path, given: Any) -> list[dict[str, Any]]:
    """Measures one model, and makes a row for each engine."""
    every: list[Engine] = []
    try:
        every += engines(model, given)
        pairs, bandwidths = measure(every, given.rounds, given.minutes / len(given.model))
        found = [speeds(every[0], [pair.ours for group in pairs for pair in group])]
        found += [
            {**speeds(engine, [pair.theirs for pair in group]), **ratios(group)}
            for engine, group in zip(every[1:], pairs, strict=True)
        ]
        features = " ".join(name for name in FLAGS if name in cpu_flags())
        shared = {"bandwidth_gb_per_s": median(bandwidths) / 1e9, "rounds": len(bandwidths), "processor_features": features}
        return [
            {"model": model.name, **rounded({**row, **shared}), **engine.facts}
            for row, engine in zip(found, every, strict=True)
        ]
    finally:
        for engine in every:
            engine.close()
        every.clear()
        gc.collect()


def spelled(row: dict[str, Any]) -> dict[str, Any]:
    """Makes the cells of the printed table."""
    ours = row["engine"] == "foredraft"
    return {
        "model": row["model"],
        "engine": row["engine"],
        "weights": row["weights"],
        "ms a token": f"{row['ms_per_token']:.1f} ({row['ms_fastest']:.1f} to {row['ms_slowest']:.1f})",
        "prompt, tokens/s": f"{row['prompt_tokens_per_s']:.0f} ({row['prompt_slowest']:.0f} to {row['prompt_fastest']:.0f})",
        "decoding": None if ours else f"{row['decoding_ratio']:.2f} ({row['decoding_low']:.2f} to {row['decoding_high']:.2f})",
        "prompts": None if ours else f"{row['prompt_ratio']:.2f} ({row['prompt_low']:.2f} to {row['prompt_high']:.2f})",
    }


def conditions(rows: Sequence[dict[str, Any]]) -> str:
    """Describes in a list what ran: the processor, the bandwidth beside each model, and the facts of each engine."""
    lines = [f"- Processor features: {rows[0]['processor_features']}."]
    for row in rows:
        if row["engine"] == "foredraft":
            read = row["bandwidth_gb_per_s"]
            share = row["weight_bytes"] / row["ms_per_token"] / read / 1e6
            lines.append(f"- {row['model']}: read bandwidth {read:.0f} GB/s, of which foredraft reaches {share:.0%}.")
    for row in rows:
        if row["model"] == rows[0]["model"]:
            facts = ", ".join(f"{name} {row[name]}" for name in FACTS if row.get(name) not in (None, ""))
            lines.append(f"- {row['engine']}, {row['weights']}: {facts}.")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints."""
    parser = arguments(__doc__, models=False, minutes=8)
    parser.add_argument(
        "--model", type=Path, action="append", required=True, help="directory of a Llama-family model, or GGUF file"
    )
    parser.add_argument("--activations", default="bf16", help="bf16 or int8, for GGUF files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program of this name; without it llama.cpp is left out")
    parser.add_argument("--vllm-python", type=Path, help="Python that has vLLM installed; without it vLLM is left out")
    parser.add_argument("--vllm-preload", help="libraries that vLLM preloads, such as tcmalloc, separated by colons")
    given = parser.parse_args()
    try:
        rows = [row for model in given.model for row in rows_of(model, given)]
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    shown = [spelled(row) for row in rows]
    report(given.output, rows, list(shown[0]), device=torch.device("cpu"), shown=shown)
    print(conditions(rows))


if __name__ == "__main__":
    main()
