"""Which code runs: ``FOREDRAFT_KERNELS``, and what happens without the compiled kernels. On every processor."""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.core.folders import BUNDLED_LM
from foredraft.kernels import build, sets, structures
from foredraft.kernels.layouts import TYPES
from foredraft.models.llama import LlamaTarget
from foredraft.models.loading import load_target
from foredraft.plan.build import MEMORY
from foredraft.plan.measure import facts_of
from instruction_sets import NAMES, code_of, is_native

TARGET = Path(__file__).parent / "data" / "babyllama-105"


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Which code runs is decided anew, before and after."""
    monkeypatch.delenv("FOREDRAFT_KERNELS", raising=False)
    caches = sets._loaded, sets.code_of, sets.library
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def none_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installation without compiled kernels."""
    monkeypatch.setattr(sets, "LIBRARY", tmp_path / "none.so")


def test_the_kernels_are_built() -> None:
    """Where there is a compiler, the installation has built them, the scalar set at least; and auto takes the first."""
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    names = sets.sets_here()
    assert names[-1] == "scalar"
    assert sets.library() is None or sets.library().name == names[0]
    assert (sets.library() is None) == (names == ["scalar"])


@pytest.mark.parametrize("name", sets.SETS)
def test_a_set_is_forced_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_KERNELS", name)
    here = sets.sets_here()
    if name in here:
        assert sets.library().name == name
        return
    with pytest.raises(
        ValueError, match=rf"is {name!r}, but this machine has {', '.join([*here, 'torch'])}\. Give one of these"
    ):
        sets.library()


@pytest.mark.parametrize("features", [0, 1, 3, 7, 15, 31, 32, 64 + 15, 64 + 31])
def test_auto_takes_the_fastest_set(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the processor has; on Intel's without tiles, pairs of bfloat16 are slower than single numbers."""

    class Loaded:
        def __getattr__(self, name: str) -> object:
            if name == "foredraft_features":
                return lambda: features
            if name.startswith("foredraft_"):
                return lambda: None
            raise AttributeError(name)

    monkeypatch.setattr(sets, "_loaded", Loaded)
    best = {
        0: "scalar",
        1: "avx2",
        3: "avx512",
        7: "avx512_vnni",
        15: "avx512_bf16",
        31: "amx",
        32: "neon",
        79: "avx512_vnni",
        95: "amx",
    }
    assert sets.sets_here()[0] == best[features]


def test_torch_switches_compiled_code_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """For the decoder, laws and draws; and no word is said of a choice that the user made."""
    monkeypatch.setenv("FOREDRAFT_KERNELS", "torch")
    with caplog.at_level(logging.INFO, "foredraft"):
        assert sets.library() is None
        assert isinstance(load_target(BUNDLED_LM, device="cpu"), LlamaTarget)
        llm = LLM(TARGET, {"method": "suffix", "num_speculative_tokens": 4}, dtype="float32")
        assert llm.generate("Once", SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8))[0].outputs[0].token_ids
    assert not [record for record in caplog.records if record.name != MEMORY]


@pytest.mark.parametrize("given", ["compiled", "Torch", "torch ", "0"])
def test_unknown_kernels_are_refused(given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no compiled code would run: in float64."""
    monkeypatch.setenv("FOREDRAFT_KERNELS", given)
    said = f"FOREDRAFT_KERNELS must be {', '.join(sets.KERNELS[:-1])} or scalar, got {given!r}"
    for dtype in ("float64", "bfloat16"):
        with pytest.raises(ValueError, match=re.escape(said)):
            LLM(TARGET, {"method": "ar"}, dtype=dtype)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "Once", "--model", str(TARGET), "--method", "ar", "--dtype", dtype])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (1, "")
        assert err == f"error: {said}\nhint: give one of these, or unset the environment variable\n"


def test_without_the_kernels_torch_runs_and_says_so_once(none_built: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foredraft"):
        for _ in range(2):
            assert sets.library() is None
            assert isinstance(load_target(BUNDLED_LM, device="cpu"), LlamaTarget)
    assert [record.getMessage() for record in caplog.records] == [
        "no compiled kernels (there are none), so torch computes, which is slower. Install a C compiler and foredraft again"
    ]


def test_a_set_without_kernels_is_refused(none_built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_KERNELS", "scalar")
    with pytest.raises(ValueError, match="is 'scalar', but there are no compiled kernels, only torch"):
        sets.library()


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A structure of another size would be read at wrong places."""

    class Longer(ctypes.Structure):
        _fields_ = (("one", structures.CStep), ("more", ctypes.c_int64))

    monkeypatch.setattr(structures, "STRUCTURES", (*structures.STRUCTURES[:-1], Longer))
    if not sets.LIBRARY.exists():
        pytest.skip("there are no compiled kernels")
    with caplog.at_level(logging.WARNING, "foredraft"):
        assert sets.library() is None
    assert "were built from other sources" in caplog.text


def test_the_build_leaves_out_what_the_compiler_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; a compiler that is missing is an error that says so, and the command line goes on without kernels."""
    try:
        command = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    unknown = {"scalar": ("vector_scalar.h", ()), "new": ("vector_new.h", ("-mno-such-set",))}
    monkeypatch.setattr(build, "SETS", {"": unknown})
    assert build.build(tmp_path / "some.so", command, flags=("-O0",)) == ["new"]
    assert ctypes.CDLL(str(tmp_path / "some.so")).foredraft_forward_scalar
    monkeypatch.setenv("CC", "no-such-compiler -v")
    with pytest.raises(build.BuildError, match="there is no C compiler 'no-such-compiler -v'"):
        build.compiler()
    script = [sys.executable, str(Path(build.__file__))]
    ended = subprocess.run(script, env={"CC": "no-such-compiler", "PATH": ""}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("foredraft: no compiled kernels, so torch will compute")


def test_a_choice_belongs_to_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were timed on one instruction set say nothing of another."""
    target = load_target(BUNDLED_LM, device="cpu")
    told = set()
    for name in [*sets.sets_here(), "torch"]:
        monkeypatch.setenv("FOREDRAFT_KERNELS", name)
        sets.library.cache_clear()
        told.add(facts_of(target, [])["kernels"])
    assert told == {*sets.sets_here(), "torch"}


@pytest.mark.parametrize("name", [name for name in NAMES if is_native(name)])
def test_the_peak_counts_multiply_adds(name: str) -> None:
    """Twice the rounds are twice the multiply-adds, a multiple of the lanes; two threads make twice as many."""
    code = code_of(name)
    for number in TYPES.values():
        once = code.peak(number, 10, 1)
        assert once > 0 and once % 120 == 0
        assert code.peak(number, 20, 1) == 2 * once
        assert code.peak(number, 10, 2) in (once, 2 * once)
