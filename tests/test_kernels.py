"""Which code runs: ``FOREDRAFT_KERNELS``, and what happens without a compiler. On every processor."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from foredraft import LLM, SamplingParams
from foredraft import kernels as compiled
from foredraft.__main__ import main
from foredraft.core.folders import BUNDLED_LM
from foredraft.models.llama import LlamaTarget
from foredraft.models.loading import load_target

TARGET = Path(__file__).parent / "data" / "babyllama-105"


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor that can run the compiled code; which code runs is decided anew, before and after."""
    monkeypatch.setattr(compiled, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, capable: None) -> list[list[str]]:
    """The commands of the compilers that were asked to build; none of them builds anything."""
    commands: list[list[str]] = []

    def refuse(command: list[str]) -> Path:
        commands.append(command)
        raise OSError("nothing is built here")

    monkeypatch.setattr(compiled, "_built", refuse)
    return commands


@pytest.mark.parametrize(("given", "compiles"), [(None, True), ("", True), ("auto", True), ("torch", False)])
def test_torch_switches_compiled_code_off(
    given: str | None, compiles: bool, built: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOREDRAFT_KERNELS", raising=False)
    monkeypatch.setenv("FOREDRAFT_CC", "some-compiler -v")
    if given is not None:
        monkeypatch.setenv("FOREDRAFT_KERNELS", given)
    assert compiled.library() is None
    assert built == [["some-compiler", "-v"]] * compiles


def test_with_torch_nothing_compiled_is_asked(
    built: list[list[str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for the decoder nor for laws and draws, and no word is said of a choice that the user made."""
    monkeypatch.setenv("FOREDRAFT_KERNELS", "torch")
    with caplog.at_level(logging.INFO, "foredraft"):
        assert isinstance(load_target(BUNDLED_LM, device="cpu"), LlamaTarget)
        llm = LLM(TARGET, {"method": "suffix", "num_speculative_tokens": 4}, dtype="float32")
        assert llm.generate("Once", SamplingParams(temperature=1.0, top_p=0.9, max_tokens=8))[0].outputs[0].token_ids
    assert not built
    assert not caplog.records


@pytest.mark.parametrize("given", ["compiled", "Torch", "torch ", "0"])
def test_unknown_kernels_are_refused(given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where no compiled code would run: in float64, and in bfloat16 on a processor that cannot run it."""
    monkeypatch.setenv("FOREDRAFT_KERNELS", given)
    said = f"FOREDRAFT_KERNELS must be auto or torch, got {given!r}"
    for dtype in ("float64", "bfloat16"):
        with pytest.raises(ValueError, match=re.escape(said)):
            LLM(TARGET, {"method": "ar"}, dtype=dtype)
        with pytest.raises(SystemExit) as ended:
            main(["generate", "Once", "--model", str(TARGET), "--method", "ar", "--dtype", dtype])
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (1, "")
        assert err == f"error: {said}\nhint: give one of these, or unset the environment variable\n"


@pytest.mark.parametrize("command", ["false", "no-such-compiler -v"])
def test_without_a_compiler_torch_runs(
    command: str, capable: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("FOREDRAFT_KERNELS", raising=False)
    monkeypatch.setenv("FOREDRAFT_CC", command)
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "foredraft"):
        assert compiled.library() is None
        assert isinstance(load_target(BUNDLED_LM, device="cpu"), LlamaTarget)
    assert len(caplog.records) == 1
    assert not list(tmp_path.iterdir())


def test_the_compiler_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FOREDRAFT_CC`` before ``CC``; an empty one is as none."""
    monkeypatch.setenv("PATH", os.path.dirname(os.__file__))  # holds no compiler
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("FOREDRAFT_CC", "")
    assert compiled.compiler() is None
    monkeypatch.setenv("CC", "/bin/sh -c")
    assert compiled.compiler() == ["/bin/sh", "-c"]
    monkeypatch.setenv("FOREDRAFT_CC", "/opt/cc -m64")
    assert compiled.compiler() == ["/opt/cc", "-m64"]
