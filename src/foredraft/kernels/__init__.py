"""Compiles C code once with the local compiler and keeps it in the user's cache. Where it cannot run, torch code runs instead.

The environment variable ``FOREDRAFT_KERNELS`` is ``auto`` (the default) or ``torch``, which disables compiled code.
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

from foredraft.core.folders import cache_folder, cached_file

SOURCES = tuple(Path(__file__).with_name(name) for name in ("decoder.c", "draws.c", "laws.c", "prefixes.c"))
_HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
"""Compiler flags. Contraction and fast math are off, so equal rows give equal bits, however the compiler unrolls loops."""

KERNELS = ("auto", "torch")
"""Allowed values of ``FOREDRAFT_KERNELS``."""

_log = logging.getLogger("foredraft")


def kernels() -> str:
    """Returns the value of ``FOREDRAFT_KERNELS``, or ``auto`` if it is unset or empty.

    Raises:
        ValueError: the value is not one of `KERNELS`.
    """
    given = os.environ.get("FOREDRAFT_KERNELS") or "auto"
    if given not in KERNELS:
        allowed = " or ".join(KERNELS)
        raise ValueError(
            f"FOREDRAFT_KERNELS must be {allowed}, got {given!r}; give one of these, or unset the environment variable"
        )
    return given


@cache
def library() -> ctypes.CDLL | None:
    """Returns the compiled code. The first call builds it.

    Returns:
        The library, or None if it cannot run: with ``FOREDRAFT_KERNELS=torch``, without AVX-512 BF16, without a C compiler, or
        without a cache folder.

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
        reason = getattr(error, "stderr", None) or str(error)
        _log.warning("cannot compile the fast decoder (%s), so torch runs, which is slower", reason.strip().splitlines()[-1])
        return None
    code.foredraft_categorical.restype = code.foredraft_prefixes.restype = ctypes.c_int64
    code.foredraft_subtract.restype = code.foredraft_without.restype = ctypes.c_double
    return code


def compiled_for(*numbers: Tensor) -> ctypes.CDLL | None:
    """Returns the compiled code if all tensors are float32 on a CPU, else None."""
    return library() if all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in numbers) else None


def compiler() -> list[str] | None:
    """Returns the C compiler's command: ``$FOREDRAFT_CC`` if set, else the first that exists of ``$CC``, cc, gcc and clang."""
    if given := shlex.split(os.environ.get("FOREDRAFT_CC", "")):
        return given
    named = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((shlex.split(name) for name in named if name and shutil.which(shlex.split(name)[0])), None)


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the processor's feature flags, under their Linux names."""
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
