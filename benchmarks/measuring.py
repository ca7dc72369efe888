"""What the measurements here share: where figures are written, with what they hang on, and as what table they are printed."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from foredraft import SamplingParams
from foredraft.bench import tasks
from foredraft.bench.command import machine
from foredraft.bench.run import forget_peak, peak_bytes
from foredraft.llm import BUNDLED, BUNDLED_LM, LLM

PROMPTS = BUNDLED / "calibration.jsonl"
"""Training prompts, so that nothing is tuned on what is reported."""

LAWS = {
    "0": SamplingParams(temperature=0.0),
    "0.6": SamplingParams(temperature=0.6),
    "1": SamplingParams(temperature=1.0),
    "1, top_p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
}
"""Samplings that are measured, by name: the temperature and what cuts the law off."""


def arguments(doc: str | None, *, models: bool = True, minutes: float = 4.0) -> argparse.ArgumentParser:
    """A parser with the options that every measurement has."""
    parser = argparse.ArgumentParser(description=str(doc).split("\n\n")[0])
    if models:
        parser.add_argument("--model", help="directory of the target; the bundled one if not given")
        parser.add_argument("--draft-model", default=str(BUNDLED_LM), help="directory of the draft model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", help="cpu or cuda; cuda where there is one if not given")
    parser.add_argument("--minutes", type=float, default=minutes, help="start no further round after so long")
    parser.add_argument("--output", type=Path, required=True)
    return parser


def drafting(draft_model: Any, tree: str | None, nodes: int | str) -> dict[str, Any]:
    """The speculative config of a draft model with a tree (None: chosen automatically)."""
    return {"method": "lm", "model": draft_model, "num_speculative_tokens": nodes} | ({"tree": tree} if tree else {})


def read_prompts(llm: LLM, count: int) -> list[list[int]]:
    """The first `count` training prompts as token ids."""
    prompts = tasks.encode(llm, tasks.read_prompts(PROMPTS), raw=False)[:count]
    if len(prompts) < count:
        raise ValueError(f"{PROMPTS.name} has {len(prompts)} prompts, {count} are asked for")
    return prompts


def rounds(count: int, minutes: float) -> Iterator[int]:
    """Numbers of rounds: 0 to ``count - 1``, fewer if the time is over, one at least."""
    began = perf_counter()
    for number in range(count):
        if number and perf_counter() - began > 60 * minutes:
            return
        yield number


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    """The items from number `number` on, the others behind: what takes turns does not always follow the same one."""
    at = number % max(len(items), 1)
    return [*items[at:], *items[:at]]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return statistics.median(values) if values else 0.0


def held_bytes(device: torch.device) -> int:
    """What the process (the device, on CUDA) holds now, after giving back what is free; starts `peak_bytes` anew."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc: freed heap goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak(device)
    return peak_bytes(device)


def report(
    path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str], *, device: torch.device, dtype: str | None = None
) -> None:
    """Writes the rows with what they hang on, and prints some of their columns."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    environment = {"command": command, **({"dtype": dtype} if dtype is not None else {}), **machine(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, **environment}) + "\n" for row in rows))
    print(table(rows, columns))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Some columns of the rows in Markdown; units and names as in the files."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_spelled(row.get(name)) for name in columns) + " |" for row in rows])


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its fractions to five places."""
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)
