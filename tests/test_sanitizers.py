"""The kernels touch no foreign memory, rely on no undefined behaviour and have no data race, say the compiler's sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foredraft.kernels import build

TESTS = Path(__file__).parent
SUBSET = {
    "address,undefined": "linear_layers or residual or activations or laws or what_else or prefix or (forwards and mistral) or "
    "one_call or verdicts",
    "thread": "what_else or residual or one_call or verdicts",
}
"""Sanitizers, and the tests of every `test_instruction_sets*.py` that run under them: those of threads for the last."""

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python leaks at its end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 report_signal_unsafe=0",  # Python and torch
}


def runtime_of(library: str) -> str:
    """Returns the file of a library of the compiler. Skips the test if there is none."""
    found = build._run([*build.compiler(), f"-print-file-name={library}"]).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {library}")
    return str(Path(found).resolve())


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SUBSET)
def test_kernels_are_clean(sanitizer: str) -> None:
    runtime = runtime_of("libasan.so" if sanitizer.startswith("address") else "libtsan.so")
    preloaded = f"{runtime} {runtime_of('libstdc++.so.6')}"  # exceptions of torch need the latter
    fixed = [path, platform.machine(), "-R"] if (path := shutil.which("setarch")) else []  # TSan wants fixed addresses
    tests = [*map(str, TESTS.glob("test_instruction_sets*.py")), str(TESTS / "test_chains.py"), "-k", SUBSET[sanitizer]]
    command = [*fixed, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preloaded, "FOREDRAFT_TEST_SANITIZER": sanitizer}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout
