"""One process, or those of ``accelerate launch -m foredraft train ...``: each learns from its share of a step's batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Workers:
    """The processes of a run.

    Attributes:
        count, rank: how many there are, and which this one is; number 0 writes files.
    """

    count: int = 1
    rank: int = 0
    accelerator: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """Where this process computes; None: the user decides."""
        return None if self.accelerator is None else str(self.accelerator.device)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def one_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, done by the process that writes files before all others."""
        if not self.writes:
            self.wait()
        found = work()
        if self.writes:
            self.wait()
        return found

    def share_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes."""
        if self.accelerator is None:
            return
        some = [one for one in parameters if one.requires_grad]
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in some]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for one, part in zip(some, flat.split([grad.numel() for grad in grads]), strict=True):
            one.grad = part.view_as(one)

    def total(self, count: int) -> int:
        """The sum of a number over the processes."""
        if self.accelerator is None:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum"))


def find_workers() -> Workers:
    """The processes that this one was launched with.

    Raises:
        ValueError: it was launched by Accelerate, which is not installed here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Workers()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ValueError("several processes need Accelerate: pip install accelerate") from None
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Workers(accelerator.num_processes, accelerator.process_index, accelerator)
