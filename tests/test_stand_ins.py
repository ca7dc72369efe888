"""The stand-ins for intrinsics compute what the instructions compute: against the machine, and against SIMDe."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from foredraft.kernels import build
from instruction_sets import STAND_INS, is_native

CHECK = STAND_INS / "check.c"
EXTENSIONS = {"avx2": (), "avx512": ("-DUSE_AVX512",), "avx512_vnni": ("-DUSE_AVX512",), "avx512_bf16": ("-DUSE_AVX512",)}
"""Sets, and the flag of `CHECK` that the flags of their build lack."""

NOT_AS_THE_MANUAL = {"cvtph_ps", "cvtph_ps_512", "mask_storeu"}
"""What SIMDe 0.8.2 gets wrong: signalling NaN stays so, and masked lanes are overwritten with zeros."""

ROUNDED_OTHERWISE = {"fmadd", "fnmadd", "fmsub", "fmadd_512", "fnmadd_512", "fmsub_512", "scalef", "dpbf16"}
"""What SIMDe rounds twice. It is compared where nothing is rounded."""


def digests(out: Path, *flags: str) -> dict[str, str]:
    """Builds `CHECK` and returns the digest of every intrinsic."""
    build._run([*build.compiler(), "-O1", "-w", "-std=gnu11", "-ffp-contract=off", *flags, str(CHECK), "-o", str(out), "-lm"])
    lines = subprocess.run([str(out)], check=True, capture_output=True, text=True).stdout.splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_they_compute_what_the_machine_computes(name: str, tmp_path: Path) -> None:
    if not is_native(name):
        pytest.skip(f"this machine has no {name}")
    flags = (*build.SETS["x86_64"][name][1], *EXTENSIONS[name])
    ours = digests(tmp_path / "ours", f"-I{STAND_INS}", *(flag for flag in flags if flag.startswith("-D")))
    assert ours == digests(tmp_path / "machine", *flags)
    assert len(ours) > 50


def test_every_intrinsic_of_the_kernels_is_checked() -> None:
    """Those of tiles are compared as a whole, with the bits that the manual's order of additions gives."""
    kernels = "".join(file.read_text() for file in build.SOURCES.glob("*.h"))
    used = set(re.findall(r"\b_mm\d*_\w+", kernels))
    assert used - set(re.findall(r"\b_mm\d*_\w+", CHECK.read_text())) == set()
    assert len(used) > 90


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
