"""The measurement of the methods.

After a warm-up, the methods take turns on every batch of prompts. The tokens of all methods are counted in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import torch

from foredraft.core.metrics import Metrics, StepRecord
from foredraft.core.outputs import require_whole
from foredraft.core.params import MAX_SEED, SamplingParams
from foredraft.llm import LLM


@dataclass(frozen=True)
class Outcome:
    """Result of one method on one batch.

    Attributes:
        seconds: time from the prompts to the last token, the pass over the prompts included.
        token_ids: token ids of every output.
        records: records of the steps of every output; empty for a peer.
        metrics: metrics of the longest output, which takes part in every step; empty for a peer.
        peak_bytes: peak memory in bytes, of the device on CUDA, else of the process; None for a peer.
    """

    seconds: float
    token_ids: list[list[int]]
    records: list[list[StepRecord]] = field(default_factory=list, repr=False)
    metrics: Metrics = field(default_factory=Metrics)
    peak_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens of all outputs."""
        return sum(map(len, self.token_ids))


@runtime_checkable
class Contender(Protocol):
    """A method that can be measured.

    Attributes:
        name: its name in the report.
        setting: its setting, as columns of the report.
    """

    name: str
    setting: dict[str, Any]

    def run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Outcome:
        """Generates for a batch of prompts (token ids), with the sampling parameters of each prompt."""
        ...


class Ours:
    """A method of this package. All such methods share their weights."""

    def __init__(self, name: str, llm: LLM, sampling: SamplingParams):
        self.name, self._llm = name, llm
        self.setting = llm.drafting(sampling)

    def run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> Outcome:
        """Generates for a batch, see `Contender`."""
        device = self._llm.target.device
        with peak_memory(device) as peak:
            began = perf_counter()
            results = self._llm.generate(list(prompts), list(sampling))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = perf_counter() - began
        require_whole(results)
        outputs = [result.outputs[0] for result in results]
        longest = max(outputs, key=lambda output: len(output.records))
        return Outcome(
            seconds,
            [output.token_ids for output in outputs],
            [output.records for output in outputs],
            longest.metrics,
            peak[0],
        )


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Measures the peak memory of a block, of the device on CUDA, else of the process.

    Yields:
        A list of one number, which is the peak memory in bytes after the block.
    """
    peak = [0]
    forget_peak(device)
    yield peak
    peak[0] = peak_bytes(device)


def forget_peak(device: torch.device) -> None:
    """Resets the peak that `peak_bytes` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark


def peak_bytes(device: torch.device) -> int:
    """Returns the peak memory in bytes since `forget_peak`, of the device on CUDA, else of the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    return next(int(row.split()[1]) * 1024 for row in status.read_text().splitlines() if row.startswith("VmHWM"))


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    *,
    batch_size: int,
    warm_up: Sequence[list[int]],
) -> Iterator[dict[str, Outcome]]:
    """Runs all contenders on every batch, after a warm-up. Their order rotates by one from batch to batch.

    Args:
        prompts: prompts, as token ids.
        sampling: sampling parameters of all prompts. Each prompt gets its own seed.
        batch_size: number of prompts in a batch.
        warm_up: prompts of the warm-up, which is not measured.

    Yields:
        For each batch, the outcome of every contender by its name.
    """
    for contender in contenders:
        contender.run(list(warm_up)[:batch_size], _seeded(sampling, 0, min(batch_size, len(warm_up))))
    for number, first in enumerate(range(0, len(prompts), batch_size)):
        batch = list(prompts[first : first + batch_size])
        turn = number % len(contenders)
        order = [*contenders[turn:], *contenders[:turn]]
        yield {contender.name: contender.run(batch, _seeded(sampling, first, len(batch))) for contender in order}


def _seeded(sampling: SamplingParams, first: int, count: int) -> list[SamplingParams]:
    """Gives each prompt its own seed, the same for every method."""
    seeds = [((sampling.seed or 0) + first + i) % (MAX_SEED + 1) for i in range(count)]
    return [replace(sampling, seed=seed) for seed in seeds]
