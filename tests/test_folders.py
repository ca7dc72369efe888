"""Where measurements are kept: the user's folder, else a private temporary one, else nowhere."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM, SamplingParams
from foredraft.core import folders
from foredraft.core.folders import cache_folder, cached_file, keep
from foredraft.plan import choose as auto
from foredraft.plan import measure
from foredraft.plan.store import recalled

NOWHERE = "/proc/no/such/folder"
GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for temporary folders, and a cache folder that cannot be written."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FOREDRAFT_CACHE", NOWHERE)
    folders._writable.cache_clear()
    yield tmp_path  # type: ignore[misc]
    folders._writable.cache_clear()


def test_a_folder_that_can_be_written_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    keep("x.json", "1")
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["x.json"]


def test_else_a_private_one_is_made_and_said_once(temporary: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "foredraft"):
        found = [cache_folder() for _ in range(3)]
    assert found == [temporary / f"foredraft-{os.getuid()}"] * 3
    assert found[0] is not None and found[0].stat().st_mode & 0o777 == 0o700
    [line] = [one.getMessage() for one in caplog.records]
    assert NOWHERE in line and str(found[0]) in line and "FOREDRAFT_CACHE" in line


@pytest.mark.parametrize("spoilt", ["open to others", "a link", "a file", "of somebody else"])
def test_a_folder_that_others_could_write_is_not_used(spoilt: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / f"foredraft-{os.getuid()}"
    if spoilt == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif spoilt == "a link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(temporary / "elsewhere")
    elif spoilt == "a file":
        folder.write_text("")
    else:
        (temporary / "foredraft-12345").mkdir(mode=0o700)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    if spoilt == "of somebody else" and (temporary / "foredraft-12345").stat().st_uid == 12345:
        pytest.skip("this user is 12345")
    assert cache_folder() is None


def test_what_is_measured_is_kept_in_the_private_folder(temporary: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"x": len(calls)}

    assert [recalled("kind", {"a": 1}, measure) for _ in range(2)] == [{"x": 1}] * 2
    assert recalled("kind", {"a": 1}, measure, anew=True) == {"x": 2} == recalled("kind", {"a": 1}, measure)


def test_what_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    keep("there.json", "1")
    monkeypatch.setattr(folders, "_writable", lambda wanted: None)
    assert cached_file("there.json") == tmp_path / "there.json"
    assert cached_file("other.json") is None


def test_without_any_folder_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "cache_folder", lambda: None)
    monkeypatch.setattr(auto, "slowdown_of", lambda *_: pytest.fail("timed"))
    llm = LLM()
    [output] = llm.generate("Once", GREEDY)
    assert output.outputs[0].kinds == ["plain"] * 4
    assert llm.drafting(GREEDY)["reason"] == "drafting: off (nothing was timed)"


def test_other_machines_threads_weights_and_versions_are_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def remember(kind: str, facts: Any, measure: Any, **more: Any) -> Any:
        asked.append(repr(facts))
        return {kind: auto.Choice(auto.Way("suffix", None), 4, 2.0, 1.0, 2.0, "2026-01-01") for kind in auto.KINDS}

    monkeypatch.setattr(auto, "recalled", remember)
    llm = LLM()
    reason = "drafting: suffix 4 nodes (expected 2.0x; timed here on 2026-01-01)"
    assert llm.drafting(GREEDY)["reason"] == reason
    assert llm.drafting(GREEDY)["expected_speedup"] == 2.0
    llm.with_speculation(None)
    monkeypatch.setattr(measure.platform, "node", lambda: "elsewhere")
    llm.with_speculation(None)
    monkeypatch.setattr(measure.torch, "get_num_threads", lambda: 77)
    llm.with_speculation(None)
    monkeypatch.setattr(measure.foredraft, "__version__", "0.0.0")
    llm.with_speculation(None)
    monkeypatch.setattr(llm, "_parts", replace(llm._parts, fingerprint="other weights"))
    llm.with_speculation(None)
    assert len(asked) == 6 and len(set(asked)) == 5 and asked[0] == asked[1]


def test_retime_measures_anew_and_belongs_to_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[bool] = []

    def remember(kind: str, facts: Any, measure: Any, *, anew: bool = False) -> Any:
        timed.append(anew)
        return {kind: auto.Choice(auto.Way("suffix", None), 4, 2.0, 1.0, 2.0, "2026-01-01") for kind in auto.KINDS}

    monkeypatch.setattr(auto, "recalled", remember)
    llm = LLM(speculative_config={"method": "auto", "retime": True})
    llm.with_speculation({"method": "suffix", "retime": False})
    assert timed == [True, False]
    with pytest.raises(ValueError, match="leaves nothing open"):
        llm.with_speculation({"method": "suffix", "num_speculative_tokens": 4, "retime": True})
    with pytest.raises(TypeError, match="retime must be true or false, got 1"):
        llm.with_speculation({"method": "auto", "retime": 1})
