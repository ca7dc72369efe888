"""The wheel: its tags, what it links to, and that it generates text where there is no compiler. Nothing large is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from foredraft.kernels import build, sets

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ARM_COMPILER = "aarch64-linux-gnu-gcc"
GENERATE = """
import foredraft, sys
from foredraft.kernels import sets
config = {"method": "fspad", "tree": "dyspec", "num_speculative_tokens": 4}
for _ in range(2):
    outputs = foredraft.LLM(None, config).generate("Name a river.", foredraft.SamplingParams(temperature=0, max_tokens=12))
print(foredraft.__file__)
print(sets.instruction_set())
print(repr(outputs[0].outputs[0].text))
"""


def run(*command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the repository. It does not see the packages of this process."""
    given = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FOREDRAFT_KERNELS", "CC")}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=given | environment, cwd=ROOT.anchor, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def pip(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built, so that a build leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__"))
    return folder


def wheel_of(source: Path, out: Path, **environment: str) -> Path:
    """Builds a wheel with the setuptools of this process."""
    shutil.rmtree(source / "build", ignore_errors=True)
    pip("wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", out, **environment)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


def environment_with(wheel: Path, folder: Path) -> Path:
    """Makes an environment with a wheel and the torch of this process. Returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", "-q", "--no-deps", wheel)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # behind the packages of the environment
    return python


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("installed"))


def generated(python: Path, cache: Path, **environment: str) -> tuple[str, str, str, str]:
    """Generates text without a compiler. Returns the package's file, the instruction set, the text and what was said."""
    done = run(python, "-c", GENERATE, PATH=str(cache / "no programs"), FOREDRAFT_CACHE=str(cache), **environment)
    file, name, text = done.stdout.splitlines()
    return file, name, text, done.stderr


def test_its_tags_and_contents(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "foredraft/kernels/_kernels.so" in names
    assert any(name.startswith("foredraft/bundled/chat-14m/") for name in names)


@pytest.fixture(scope="module")
def auditwheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auditwheel")
    venv.create(folder, symlinks=True, with_pip=True)
    installed = subprocess.run([folder / "bin" / "pip", "install", "-q", "auditwheel"], capture_output=True)
    if installed.returncode:
        pytest.skip("auditwheel cannot be installed")
    return folder / "bin" / "auditwheel"


def test_auditwheel_passes(wheel: Path, auditwheel: Path) -> None:
    """The library needs nothing but the C library."""
    said = run(auditwheel, "show", wheel).stdout
    assert "manylinux_2_" in said, said


def test_it_generates_without_a_compiler(python: Path, tmp_path: Path) -> None:
    file, name, text, said = generated(python, tmp_path)
    assert Path(file).is_relative_to(python.parents[1])
    assert (name, said) == (sets.instruction_set(), "")
    assert len(text) > 20


@pytest.mark.parametrize("name", [*sets.sets_here(), "torch"])
def test_every_set_generates(name: str, python: Path, tmp_path: Path) -> None:
    _, used, text, said = generated(python, tmp_path, FOREDRAFT_KERNELS=name)
    assert (used, said) == (name, "")
    assert len(text) > 20


def test_without_compiler_and_wheel_torch_runs(source: Path, tmp_path: Path) -> None:
    """The sources are installed where no compiler can be found. Torch computes, and one line says so."""
    built = wheel_of(source, tmp_path / "built", CC="no-such-compiler", PATH=str(tmp_path / "no programs"))
    assert built.name.endswith("-py3-none-any.whl")
    python = environment_with(built, tmp_path / "env")
    file, name, text, said = generated(python, tmp_path)
    assert not (Path(file).parent / "kernels" / "_kernels.so").exists()
    assert name == "torch"
    assert len(text) > 20
    assert said.splitlines() == [
        "no compiled kernels (there are none), so torch computes, which is slower. Install a C compiler and foredraft again"
    ]


def test_a_wheel_for_arm(source: Path, tmp_path: Path, auditwheel: Path) -> None:
    """Built by a cross compiler, it has the tag of its library."""
    if not shutil.which(ARM_COMPILER):
        pytest.skip("there is no cross compiler for ARM")
    wheel = wheel_of(source, tmp_path, CC=ARM_COMPILER)
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    library = zipfile.ZipFile(wheel).read("foredraft/kernels/_kernels.so")
    assert int.from_bytes(library[18:20], "little") == 183  # the machine AArch64 in the header of ELF
    assert b"foredraft_forward_neon" in library
    said = run(auditwheel, "show", wheel).stdout
    assert "manylinux_2_" in said, said
    assert "aarch64" in said
