"""The processes of a training run: one, or several started by ``accelerate launch -m foredraft train ...``.

Each process learns from its share of the batches of a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foredraft.core.errors import UserError


@dataclass(frozen=True)
class Workers:
    """The processes of a run.

    Attributes:
        count: number of processes.
        rank: number of this process, from 0. Process 0 writes the files.
        accelerator: Accelerate's `Accelerator`; None for a single process.
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
        """Device of this process; None for a single process, whose device the user chooses."""
        return None if self.accelerator is None else str(self.accelerator.device)

    def wait(self) -> None:
        """Waits until all processes have reached this call."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def one_first(self, work: Callable[[], Any]) -> Any:
        """Calls `work` in every process, first in the one that writes files, and returns its result."""
        if not self.writes:
            self.wait()
        result = work()
        if self.writes:
            self.wait()
        return result

    def share_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes."""
        if self.accelerator is None:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in trained]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for parameter, part in zip(trained, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = part.view_as(parameter)

    def total(self, count: int) -> int:
        """Sums a number over the processes."""
        if self.accelerator is None:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum"))


def find_workers() -> Workers:
    """Finds the processes that were launched together with this one.

    Raises:
        ValueError: there are several processes, but Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Workers()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise UserError("training with several processes needs Accelerate", "Install it: pip install accelerate") from None
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    return Workers(accelerator.num_processes, accelerator.process_index, accelerator)
