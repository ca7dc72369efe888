"""Functions that the measurements share: options, prompts, rounds, and the report of results with their conditions."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
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
from foredraft.bench.machine import machine
from foredraft.bench.run import forget_peak, peak_bytes
from foredraft.core.folders import BUNDLED, BUNDLED_LM
from foredraft.llm import LLM

PROMPTS = BUNDLED / "calibration.jsonl"
"""Training prompts. Settings that are tuned on them are not tuned on the reported test prompts."""

LAWS = {
    "0": SamplingParams(temperature=0.0),
    "0.6": SamplingParams(temperature=0.6),
    "1": SamplingParams(temperature=1.0),
    "1, top_p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
}
"""Sampling parameters to measure, by name: the temperature and the truncation of the distribution."""

INSTRUCTIONS = ("FOREDRAFT_KERNELS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
"""Environment variables that choose the instructions of foredraft, torch and oneDNN. The engines under test inherit them."""


def arguments(doc: str | None, *, models: bool = True, minutes: float = 4.0) -> argparse.ArgumentParser:
    """Makes a parser with the options that every measurement has.

    Args:
        doc: docstring of the script, whose first paragraph describes it.
        models: whether the script has options for target and draft model.
        minutes: default of ``--minutes``.
    """
    parser = argparse.ArgumentParser(description=str(doc).split("\n\n")[0])
    if models:
        parser.add_argument("--model", help="directory of the target; default: the bundled one")
        parser.add_argument("--draft-model", default=str(BUNDLED_LM), help="directory of the draft model")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the models")
    parser.add_argument("--device", help="cpu or cuda; default: cuda if available")
    parser.add_argument("--minutes", type=float, default=minutes, help="time after which no further round starts")
    parser.add_argument("--output", type=Path, required=True, help="file for the results")
    return parser


def drafting(draft_model: Any, tree: str | None, nodes: int | str) -> dict[str, Any]:
    """Makes the speculative config of a draft model with a tree (None: chosen automatically)."""
    return {"method": "lm", "model": draft_model, "num_speculative_tokens": nodes} | ({"tree": tree} if tree else {})


def read_prompts(llm: LLM, count: int) -> list[list[int]]:
    """Reads the first `count` training prompts, as token ids.

    Raises:
        ValueError: there are fewer prompts.
    """
    prompts = tasks.encode(llm, tasks.read_prompts(PROMPTS), raw=False)[:count]
    if len(prompts) < count:
        raise ValueError(f"{PROMPTS.name} has only {len(prompts)} prompts, and {count} are needed. Take fewer prompts")
    return prompts


def rounds(count: int, minutes: float) -> Iterator[int]:
    """Yields the numbers of rounds, 0 to ``count - 1``. It stops after `minutes`, but never before the first round."""
    began = perf_counter()
    for number in range(count):
        if number and perf_counter() - began > 60 * minutes:
            return
        yield number


def rotated(items: Sequence[Any], number: int) -> list[Any]:
    """Rotates the items by `number`, so that an item does not follow the same other item in every round."""
    at = number % max(len(items), 1)
    return [*items[at:], *items[:at]]


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> float:
    """Returns the median; 0 if there are no values."""
    return statistics.median(values) if values else 0.0


def interval(count: int) -> tuple[int, int]:
    """Returns the two places in `count` sorted samples that enclose the median of their distribution with probability 95 %."""
    reach = 0.98 * math.sqrt(count)
    return max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))


def held_bytes(device: torch.device) -> int:
    """Returns the memory in bytes that is held now, after freeing unused memory, and resets the peak of `peak_bytes`.

    It is the memory of the device on CUDA, else of the process.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc: freed heap goes back to the system
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak(device)
    return peak_bytes(device)


def report(
    path: Path,
    rows: Sequence[dict[str, Any]],
    columns: Sequence[str],
    *,
    device: torch.device,
    dtype: str | None = None,
    shown: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Writes the rows with the conditions of the measurement, and prints some of their columns.

    The conditions are the command, the variables of `INSTRUCTIONS` that are set, the dtype, the machine and the versions.

    Args:
        shown: the rows to print, if they differ from the rows to write.
    """
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    variables = {name: os.environ[name] for name in INSTRUCTIONS if os.environ.get(name)}
    optional = {"environment": variables, "dtype": dtype}
    conditions = {"command": command, **{key: value for key, value in optional.items() if value}, **machine(device)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, **conditions}) + "\n" for row in rows))
    print(table(rows if shown is None else shown, columns))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Makes a Markdown table of some columns of the rows, with the names and units of the files."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(_spelled(row.get(name)) for name in columns) + " |" for row in rows])


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Rounds the floats of a row to five decimal places."""
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)
