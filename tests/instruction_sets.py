"""The instruction sets under test: each runs natively where the machine has it, else against the stand-ins of `stand_ins`."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foredraft.kernels import build, sets
from foredraft.kernels.sets import Code
from foredraft.kernels.structures import check_sizes

STAND_INS = Path(__file__).parent / "stand_ins"
NAMES = tuple(dict.fromkeys(name for names in build.SETS.values() for name in names))
"""All instruction sets, the scalar set first."""

PAIRED = ("avx512_bf16", "amx")
"""The sets that multiply bfloat16 numbers in pairs. The order of their additions is their own."""

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

every_set = pytest.mark.parametrize("name", NAMES[1:])
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

SANITIZER = os.environ.get("FOREDRAFT_TEST_SANITIZER", "")
"""Sanitizers of the compiler, as `test_sanitizers.py` sets them. With any, all sets run on stand-ins built with them."""

if SANITIZER:
    os.environ.pop("LD_PRELOAD", None)  # the compiler runs without the sanitizer

_SANITIZED = (f"-fsanitize={SANITIZER}", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer") if SANITIZER else ()
_FLAGS = ("-Og", "-w", *_SANITIZED)
"""Flags of the stand-ins. They are built in seconds and run in seconds, so neither is worth more optimisation."""

_BUILT = Path(__file__).parents[1] / "build" / "stand_ins"


def is_native(name: str) -> bool:
    """Returns whether the machine has an instruction set and the package was built with it."""
    return not SANITIZER and name in sets.sets_here()


@cache
def code_of(name: str) -> Code:
    """Returns an instruction set of `NAMES`, native if possible."""
    return sets.code_of(name) if is_native(name) else stand_ins_of(name)


@cache
def stand_ins_of(name: str) -> Code:
    """Returns an instruction set of `NAMES` that runs on the stand-ins."""
    return Code(_library(), name)


def check_bits(found: Tensor, wanted: Tensor) -> None:
    """Compares bit for bit. A NaN equals any NaN, because no set promises which it returns."""
    assert found.shape == wanted.shape
    same = found.view(BITS[found.dtype]) == wanted.view(BITS[found.dtype])
    if found.is_floating_point():
        same |= found.isnan() & wanted.isnan()
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"


def check_near(found: Tensor, wanted: Tensor, exact: Tensor, is_ordered: bool) -> None:
    """Compares several layers with the scalar set.

    Where the order of additions differs, an input may be rounded to the other of two bfloat16 neighbours. So the results
    differ, but their mean error against float64 is that of the scalar set, which rounds at the same places.
    """
    if is_ordered:
        check_bits(found, wanted)
    else:
        mine, theirs = ((one.double() - exact).pow(2).mean().sqrt() for one in (found, wanted))
        assert mine < 1.1 * theirs < 0.1 * exact.std()


@cache
def _library() -> ctypes.CDLL:
    """Loads the library of stand-ins. The first process that needs it builds it; it is built anew when a source changes."""
    _BUILT.mkdir(parents=True, exist_ok=True)
    with (_BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _BUILT / f"{SANITIZER or 'plain'}-{_digest()}.so"
        if not library.exists():
            for old in _BUILT.glob(f"{SANITIZER or 'plain'}-*.so"):
                old.unlink()
            build.build(library, flags=_FLAGS, stand_ins=STAND_INS)
    code = ctypes.CDLL(str(library))
    check_sizes(code)
    return code


def _digest() -> str:
    """Returns a digest of everything that the library of stand-ins is made of."""
    files = [Path(build.__file__), Path(__file__), *sorted(build.SOURCES.iterdir()), *sorted(STAND_INS.iterdir())]
    compiler = build._run([*build.compiler(), "--version"])
    return hashlib.sha256(compiler.encode() + b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
