"""C code, compiled once with the machine's own compiler and kept in the user's cache; where it cannot run, torch does."""

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

_log = logging.getLogger("foredraft")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot run: no AVX-512 BF16, or no C compiler (``$CC``, cc, gcc or clang).

    An empty ``$FOREDRAFT_CC`` forbids it; otherwise that is the compiler.
    """
    command = compiler()
    if "avx512_bf16" not in cpu_flags() or command is None or cache_folder() is None:
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
    """The C compiler's command."""
    if (given := os.environ.get("FOREDRAFT_CC")) is not None:
        return shlex.split(given) or None
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
