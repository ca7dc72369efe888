"""The stand-ins for intrinsics compute what the instructions compute: against the machine, an emulator of ARM, and SIMDe."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foredraft.kernels import build
from instruction_sets import STAND_INS, is_native

CHECK, CHECK_NEON, DRIVE = (STAND_INS / name for name in ("check.c", "check_neon.c", "drive.c"))
EXTENSIONS = {"avx2": (), "avx512": ("-DUSE_AVX512",), "avx512_vnni": ("-DUSE_AVX512",), "avx512_bf16": ("-DUSE_AVX512",)}
"""Sets, and the flag of `CHECK` that the flags of their build lack."""

NOT_AS_THE_MANUAL = {"cvtph_ps", "cvtph_ps_512", "mask_storeu"}
"""What SIMDe 0.8.2 gets wrong: signalling NaN stays so, and masked lanes are overwritten with zeros."""

ROUNDED_OTHERWISE = {"fmadd", "fnmadd", "fmsub", "fmadd_512", "fnmadd_512", "fmsub_512", "scalef", "dpbf16"}
"""What SIMDe rounds twice. It is compared where nothing is rounded."""

NEON_ROUNDED_OTHERWISE = {"fma", "fms"}
"""The same among the intrinsics of NEON."""

IS_ARM = platform.machine() in ("aarch64", "arm64")
ARM_COMPILER, ARM_ROOT = "aarch64-linux-gnu-gcc", "/usr/aarch64-linux-gnu"
"""Cross compiler for ARM, and the folder of its libraries."""


def digests(out: Path, *flags: str, source: Path = CHECK, compiler: str = "", emulator: Sequence[str] = ()) -> dict[str, str]:
    """Builds a program and returns the digest of everything that it prints."""
    command = [*([compiler] if compiler else build.compiler()), "-O1", "-w", "-std=gnu11", "-ffp-contract=off", "-pthread"]
    build._run([*command, str(source), *flags, "-o", str(out), "-lm"])
    lines = subprocess.run([*emulator, str(out)], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.rsplit(maxsplit=1) for line in lines)


def arm() -> dict[str, Any]:
    """Returns how programs for ARM are built and run. Skips the test if they cannot be."""
    if IS_ARM:
        return {}
    if not shutil.which(ARM_COMPILER) or not shutil.which("qemu-aarch64"):
        pytest.skip("there are no cross compiler and emulator for ARM")
    return {"compiler": ARM_COMPILER, "emulator": ("qemu-aarch64", "-L", ARM_ROOT)}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_they_compute_what_the_machine_computes(name: str, tmp_path: Path) -> None:
    if not is_native(name):
        pytest.skip(f"this machine has no {name}")
    flags = (*build.SETS["x86_64"][name][1], *EXTENSIONS[name])
    ours = digests(tmp_path / "ours", f"-I{STAND_INS}", *(flag for flag in flags if flag.startswith("-D")))
    assert ours == digests(tmp_path / "machine", *flags)
    assert len(ours) > 50


def test_they_compute_what_arm_computes(tmp_path: Path) -> None:
    ours = digests(tmp_path / "ours", f"-I{STAND_INS}", source=CHECK_NEON)
    assert ours == digests(tmp_path / "arm", source=CHECK_NEON, **arm())
    assert len(ours) > 50


@pytest.mark.slow
def test_neon_computes_what_the_scalar_set_computes_on_arm(tmp_path: Path) -> None:
    """The library as it is built for ARM, without Python: layers of all types, residual blocks, forwards and laws."""
    how = arm()
    library = tmp_path / "libkernels.so"
    assert build.build(library, [how["compiler"]] if how else ()) == []
    linked = f"-I{build.SOURCES}", "-DSETS=X(scalar) X(neon)", str(library), f"-Wl,-rpath,{tmp_path}"
    found = digests(tmp_path / "drive", *linked, source=DRIVE, **how)
    by_set = {name: {key.split()[0]: found[key] for key in found if key.endswith(f" {name}")} for name in ("scalar", "neon")}
    assert by_set["neon"] == by_set["scalar"]
    assert len(by_set["neon"]) == 13


def test_every_intrinsic_of_the_kernels_is_checked() -> None:
    """Those of tiles are compared as a whole, with the bits that the manual's order of additions gives."""
    kernels = "".join(file.read_text() for file in build.SOURCES.glob("*.h"))
    used = set(re.findall(r"\b_mm\d*_\w+", kernels))
    assert used - set(re.findall(r"\b_mm\d*_\w+", CHECK.read_text())) == set()
    assert len(used) > 90
    pattern = r"\bv[a-z]+[0-9]?q?(?:_[a-z]+)?_[fsu][0-9]+(?:_[fsu][0-9]+)?\b"
    of_neon = set(re.findall(pattern, (build.SOURCES / "vector_neon.h").read_text()))
    assert of_neon - set(re.findall(pattern, CHECK_NEON.read_text())) == set()
    assert len(of_neon) > 45


@pytest.fixture(scope="module")
def simde(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of SIMDe's headers: those of the system, or downloaded."""
    if Path("/usr/include/simde").exists():
        return Path("/usr/include")
    folder = tmp_path_factory.mktemp("simde")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "cmeel-simde"]
    if subprocess.run(download, capture_output=True).returncode:
        pytest.skip("SIMDe is not installed, and cannot be downloaded")
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    return next(folder.rglob("simde/x86")).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-DEXACT",)], ids=["any numbers", "exact"])
def test_they_compute_what_simde_computes(flags: tuple[str, ...], simde: Path, tmp_path: Path) -> None:
    flags = (*flags, "-DUSE_AVX512", "-DUSE_VNNI", "-DUSE_BF16")
    theirs = digests(tmp_path / "theirs", "-DUSE_SIMDE", f"-I{simde}", *flags)
    ours = digests(tmp_path / "ours", f"-I{STAND_INS}", *flags)
    left_out = NOT_AS_THE_MANUAL if "-DEXACT" in flags else NOT_AS_THE_MANUAL | ROUNDED_OTHERWISE
    assert {name for name, digest in theirs.items() if ours[name] != digest} <= left_out
    assert len(theirs) > 90


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-DEXACT",)], ids=["any numbers", "exact"])
def test_those_of_neon_compute_what_simde_computes(flags: tuple[str, ...], simde: Path, tmp_path: Path) -> None:
    theirs = digests(tmp_path / "theirs", "-DUSE_SIMDE", f"-I{simde}", *flags, source=CHECK_NEON)
    ours = digests(tmp_path / "ours", f"-I{STAND_INS}", *flags, source=CHECK_NEON)
    left_out = set() if "-DEXACT" in flags else NEON_ROUNDED_OTHERWISE
    assert {name for name, digest in theirs.items() if ours[name] != digest} <= left_out
    assert len(theirs) > 50
