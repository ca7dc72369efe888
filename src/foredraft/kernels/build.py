"""Builds the compiled kernels with the machine's C compiler: one object for each instruction set, all in one library.

It needs nothing but Python and a C compiler: setup.py and the tests run it without the package. ``CC`` names the compiler. Run
as a script, it builds the library in place, which `make` does when a C source changes::

    python src/foredraft/kernels/build.py
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "c"
LIBRARY = Path(__file__).with_name("_kernels.so")

Words = Sequence[str]

COMMON = (
    *("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra"),
)
"""Flags of every file. Contraction and fast math are off, so equal rows give equal bits, however the compiler unrolls loops."""

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
_VNNI = (*_AVX512, "-mavx512vnni", "-DUSE_VNNI")
_BF16 = (*_VNNI, "-mavx512bf16", "-DUSE_BF16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-bf16", "-DUSE_AMX")

SETS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "x86_64": {
        "scalar": ("vector_scalar.h", ()),
        "avx2": ("vector_avx2.h", ("-mavx2", "-mfma", "-mf16c")),
        "avx512": ("vector_avx512.h", _AVX512),
        "avx512_vnni": ("vector_avx512.h", _VNNI),
        "avx512_bf16": ("vector_avx512.h", _BF16),
        "amx": ("vector_avx512.h", _AMX),
    },
    "aarch64": {"scalar": ("vector_scalar.h", ()), "neon": ("vector_neon.h", ())},
    "": {"scalar": ("vector_scalar.h", ())},
}
SETS["arm64"] = SETS["aarch64"]  # Apple's name of it
"""For each architecture (the first part of the compiler's target, "" for any other): its instruction sets, the header of their
vectors and the compiler flags."""


class BuildError(Exception):
    """There is no compiler, or it reported an error."""


def compiler() -> list[str]:
    """Returns the C compiler's command: ``$CC``, else the first that exists of cc, gcc and clang.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CC", "")
    for command in map(shlex.split, (given,) if given.strip() else ("cc", "gcc", "clang")):
        if shutil.which(command[0]):
            return command
    raise BuildError(f"there is no C compiler {given!r}" if given.strip() else "there is no C compiler: cc, gcc or clang")


def architecture(command: Words) -> str:
    """Returns the name of the architecture that a compiler builds for: the first part of its target."""
    return _run([*command, "-dumpmachine"]).split("-")[0]


def sets_of(command: Words, stand_ins: Path | None = None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns the instruction sets of the architecture that the compiler builds for; with `stand_ins`, those of all."""
    if stand_ins is None:
        return SETS.get(architecture(command), SETS[""])
    common, found = (
        (f"-I{stand_ins}", "-fno-strict-aliasing"),
        {name: row for rows in SETS.values() for name, row in rows.items()},
    )
    return {key: (header, (*common, *(flag for flag in own if flag[:2] == "-D"))) for key, (header, own) in found.items()}


def build(out: Path, command: Words = (), *, names: Words = (), flags: Words = (), stand_ins: Path | None = None) -> list[str]:
    """Builds the library. Returns the sets that were left out, because the compiler does not know their flags.

    Args:
        out: file of the library.
        command: the compiler; empty for `compiler`.
        names: the sets to build; empty for all.
        flags: further flags for every file.
        stand_ins: folder of the headers ``immintrin.h`` and ``arm_neon.h`` that replace the compiler's. The sets of all
            architectures are then built for any, without the flags of their instructions.

    Raises:
        BuildError: there is no compiler, or it reported an error.
    """
    command = command or compiler()
    sets = {name: entry for name, entry in sets_of(command, stand_ins).items() if not names or name in names}
    left_out = [name for name, (_, own) in sets.items() if not _knows(command, own)]
    units: dict[str, tuple[tuple[str, ...], str]] = {name: ((), f"{name}.c") for name in ("machine", "prefixes", "team")}
    for name, (header, own) in sets.items():
        if name not in left_out:
            units[name] = (*own, f"-DSET={name}", f'-DVECTORS_OF="{header}"'), "set.c"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {name: str(Path(folder) / f"{name}.o") for name in units}
        every = [*command, *COMMON, *flags]
        commands = ([*every, *own, "-c", str(SOURCES / file), "-o", objects[name]] for name, (own, file) in units.items())
        list(pool.map(_run, commands))  # the list raises the first error
        part = out.with_suffix(f".{os.getpid()}")
        _run([*command, "-shared", "-pthread", *flags, *objects.values(), "-o", str(part), "-lm"])
    part.replace(out)  # a running process keeps the old file
    return left_out


def _knows(command: Words, flags: Words) -> bool:
    try:
        _run([*command, "-Werror", *flags, "-fsyntax-only", "-x", "c", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: Words) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr.strip()}") from None
    except OSError as error:
        raise BuildError(f"{command[0]} cannot run: {error}") from None


def main() -> int:
    """Builds the library in place. Says what was left out; without a compiler, that torch will compute."""
    try:
        left_out = build(LIBRARY)
    except BuildError as error:
        print(f"foredraft: no compiled kernels, so torch will compute, which is slower: {error}", file=sys.stderr)
        return 1
    if left_out:
        print(f"foredraft: kernels left out, because the compiler does not know them: {', '.join(left_out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
