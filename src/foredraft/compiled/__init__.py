"""C code, compiled once with the machine's own compiler and kept in the user's cache. Where it cannot run, torch does its work.

The environment variable ``FOREDRAFT_KERNELS`` chooses: ``auto`` (as without it) or ``torch``, which switches compiled code off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from foredraft.folders import cache_folder, cached_file

SOURCES = tuple(Path(__file__).with_name(name) for name in ("decoder.c", "draws.c", "laws.c", "prefixes.c"))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
"""No contraction and no fast math: equal rows must give equal bits, however the compiler unrolls."""

KERNELS = ("auto", "torch")
"""What ``FOREDRAFT_KERNELS`` may be."""

_log = logging.getLogger("foredraft")


def kernels() -> str:
    """Which code may run, by the environment variable ``FOREDRAFT_KERNELS``; ``auto`` where it is unset or empty.

    Raises:
        ValueError: it is not one of `KERNELS`.
    """
    given = os.environ.get("FOREDRAFT_KERNELS") or "auto"
    if given not in KERNELS:
        allowed = " or ".join(KERNELS)
        raise ValueError(
            f"FOREDRAFT_KERNELS must be {allowed}, got {given!r}; give one of these or unset the environment variable"
        )
    return given


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, built on the first call.

    Returns:
        None where it cannot run: with ``FOREDRAFT_KERNELS=torch``, without AVX-512 BF16, or without a C compiler.

    Raises:
        ValueError: ``FOREDRAFT_KERNELS`` has an unknown value.
    """
    if kernels() == "torch" or "avx512_bf16" not in cpu_flags():
        return None
    if (command := compiler()) is None or cache_folder() is None:
        return None
    try:
        code = ctypes.CDLL(str(_built(command)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        _log.warning("cannot compile the fast decoder (%s), so torch runs, which is slower", said.strip().splitlines()[-1])
        return None
    code.foredraft_categorical.restype = code.foredraft_prefixes.restype = ctypes.c_int64
    code.foredraft_subtract.restype = code.foredraft_without.restype = ctypes.c_double
    return code


def compiled_for(*numbers: Tensor) -> ctypes.CDLL | None:
    """The compiled code if it can work on all of `numbers`: float32 on a CPU."""
    return library() if all(one.dtype == torch.float32 and one.device.type == "cpu" for one in numbers) else None


def compiler() -> list[str] | None:
    """The C compiler's command: ``$FOREDRAFT_CC`` if it is set, else the first there is of ``$CC``, cc, gcc and clang."""
    if given := shlex.split(os.environ.get("FOREDRAFT_CC", "")):
        return given
    named = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((shlex.split(one) for one in named if one and shutil.which(shlex.split(one)[0])), None)


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, in Linux's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def _built(command: list[str]) -> Path:
    facts = [*(file.read_text() for file in (*SOURCES, *_HEADERS)), *command, *_FLAGS, *sorted(cpu_flags())]
    name = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]
    file = cached_file(f"compiled-{name}.so")
    assert file is not None
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}")
        command = [*command, *_FLAGS, *map(str, SOURCES), "-o", str(part), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        part.replace(file)
    return file
