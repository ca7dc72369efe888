"""Kernels: the arithmetic of the fast paths, in C for several instruction sets, each beside a plain version.

OPERATIONS lists them. The linear layers and norms of the torch decoder are in `foredraft.kernels.linear`, its rotary
positions and attention in `foredraft.kernels.attention`. The compiled decoder (`c/decoder.h`) runs a whole forward; its plain
version is `foredraft.models.llama`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foredraft.kernels import acceptance, laws, prefixes, race, uniforms
from foredraft.kernels.sets import Code as Code
from foredraft.kernels.sets import cpu_flags as cpu_flags
from foredraft.kernels.sets import instruction_set as instruction_set
from foredraft.kernels.sets import kernels as kernels
from foredraft.kernels.sets import library as library


class Operation(NamedTuple):
    """One operation.

    Attributes:
        plain: the version in torch, on every device and in every dtype, or in Python.
        compiled: the compiled version. Its first argument is the `Code` that runs it. Tensors must be float32 on a CPU.
    """

    plain: Callable[..., Any]
    compiled: Callable[..., Any]


OPERATIONS = {
    "warp": Operation(laws.warp, laws.warp_compiled),
    "largest": Operation(laws.largest, laws.largest_compiled),
    "categorical": Operation(laws.categorical, laws.categorical_compiled),
    "subtract": Operation(laws.subtract, laws.subtract_compiled),
    "without": Operation(laws.without, laws.without_compiled),
    "accept": Operation(acceptance.accept, acceptance.accept_compiled),
    "uniforms": Operation(uniforms.uniforms, uniforms.uniforms_compiled),
    "race": Operation(race.race, race.race_compiled),
    "prefixes": Operation(prefixes.prefixes, prefixes.prefixes_compiled),
}


def run(name: str, *numbers: Any, **options: Any) -> Any:
    """Runs an operation of OPERATIONS, compiled if it can be: float32 on a CPU, where compiled code runs."""
    operation, code = OPERATIONS[name], compiled_for(*numbers)
    return operation.plain(*numbers, **options) if code is None else operation.compiled(code, *numbers, **options)


def compiled_for(*numbers: Any) -> Code | None:
    """Returns the compiled functions if they run and all tensors are float32 on a CPU, else None."""
    for number in numbers:
        if isinstance(number, Tensor) and not (number.dtype == torch.float32 and number.is_cpu):
            return None
    return library()
