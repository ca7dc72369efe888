"""Loads the compiled kernels and chooses an instruction set. Where they cannot run, torch code runs instead.

The environment variable ``FOREDRAFT_KERNELS`` is ``auto`` (the default), ``torch``, which disables compiled code, or the name
of an instruction set, which forces that set.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from foredraft.kernels.structures import FUNCTIONS, SHARED_FUNCTIONS, check_sizes

LIBRARY = Path(__file__).with_name("_kernels.so")
"""The compiled kernels. The build of the package makes this file if there is a C compiler."""

SETS = {"amx": 16, "avx512_bf16": 8, "avx512_vnni": 4, "avx512": 2, "avx2": 1, "neon": 32, "scalar": 0}
"""The instruction sets, the fastest first, and the bit of ``foredraft_features`` that tells that the machine has it."""

_INTEL = 64
"""Bit of ``foredraft_features`` for Intel's processors. They multiply twice as many single numbers as pairs at a time."""

KERNELS = ("auto", "torch", *SETS)
"""Allowed values of ``FOREDRAFT_KERNELS``."""

_log = logging.getLogger("foredraft")


class SetError(ValueError):
    """``FOREDRAFT_KERNELS`` names no instruction set that can run.

    Attributes:
        message: what was given and what is allowed.
        hint: what to do next.
    """

    hint = "give one of these, or unset the environment variable"

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return f"{self.message}. {self.hint.capitalize()}"


class Code:
    """The compiled functions of one instruction set, see `foredraft.kernels.structures.FUNCTIONS`.

    Attributes:
        name: name of the set.
    """

    def __init__(self, code: ctypes.CDLL, name: str):
        self.name = name
        for functions, end in ((FUNCTIONS, f"_{name}"), (SHARED_FUNCTIONS, "")):
            for function, (result, arguments) in functions.items():
                found = getattr(code, f"foredraft_{function}{end}")
                found.restype, found.argtypes = result, arguments
                setattr(self, function, found)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def kernels() -> str:
    """Returns the value of ``FOREDRAFT_KERNELS``, or ``auto`` if it is unset or empty.

    Raises:
        ValueError: the value is not one of `KERNELS`.
    """
    given = os.environ.get("FOREDRAFT_KERNELS") or "auto"
    if given not in KERNELS:
        raise SetError(f"FOREDRAFT_KERNELS must be {', '.join(KERNELS[:-1])} or {KERNELS[-1]}, got {given!r}")
    return given


@cache
def _loaded() -> ctypes.CDLL | None:
    """Loads the library. Returns None and warns if there is none."""
    try:
        code = ctypes.CDLL(str(LIBRARY))
        check_sizes(code)
        Code(code, "scalar")  # an AttributeError if a function is missing
        return code
    except (OSError, AttributeError) as error:
        reason = "there are none" if not LIBRARY.exists() else str(error)
        _log.warning(
            "no compiled kernels (%s), so torch computes, which is slower. Install a C compiler and foredraft again", reason
        )
        return None


def sets_of_library() -> list[str]:
    """Returns the instruction sets that the library was built with. A set that its compiler did not know is missing."""
    code = _loaded()
    return [] if code is None else [name for name in SETS if hasattr(code, f"foredraft_forward_{name}")]


def sets_here() -> list[str]:
    """Returns the instruction sets that this machine has and the library was built with, the fastest first."""
    code = _loaded()
    if code is None:
        return []
    features = code.foredraft_features()
    names = [name for name in sets_of_library() if features & SETS[name] == SETS[name]]
    if features & _INTEL and "amx" not in names and "avx512_vnni" in names:
        names.sort(key=lambda name: name == "avx512_bf16")
    return names


@cache
def code_of(name: str) -> Code:
    """Returns the functions of an instruction set of `sets_here`."""
    code = _loaded()
    assert code is not None
    return Code(code, name)


_forced: list[Code] = []
"""The functions that `using` forces; the last counts."""


@cache
def library() -> Code | None:
    """Returns the compiled functions, or None if torch runs instead.

    The instruction set is the fastest of `sets_here`, unless ``FOREDRAFT_KERNELS`` names one. The scalar set must be named,
    because torch is faster.

    Raises:
        ValueError: ``FOREDRAFT_KERNELS`` has an unknown value, or names a set that this machine does not have.
    """
    if _forced:
        return _forced[-1]
    given = kernels()
    if given == "torch":
        return None
    names = sets_here()
    if given == "auto":
        return code_of(names[0]) if names and names[0] != "scalar" else None
    if given not in names:
        here = f"this machine has {', '.join([*names, 'torch'])}" if names else "there are no compiled kernels, only torch"
        raise SetError(f"FOREDRAFT_KERNELS is {given!r}, but {here}")
    return code_of(given)


@contextmanager
def using(code: Code) -> Iterator[None]:
    """Makes `library` return `code` inside the block, in all threads. Tests and benchmarks compare instruction sets with it."""
    _forced.append(code)
    library.cache_clear()
    try:
        yield
    finally:
        _forced.pop()
        library.cache_clear()


def instruction_set() -> str:
    """Returns the name of the instruction set whose kernels run, or ``torch``."""
    code = library()
    return "torch" if code is None else code.name


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the processor's feature flags, under their Linux names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
