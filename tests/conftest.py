"""What every test needs to run alike on every machine: one thread a process, a cache of its own, and measurements that are
given."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any

import jaxtyping
import pytest
import torch

import light_types
from foredraft.core.costs import Costs

jaxtyping.jaxtyped = light_types.jaxtyped  # before anything of the package is imported
torch.set_num_threads(1)
_CACHE = tempfile.TemporaryDirectory(prefix="foredraft-tests-", ignore_cleanup_errors=True)  # removed when the process ends
os.environ["FOREDRAFT_CACHE"] = _CACHE.name  # nothing measured by a test outlives it


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says which instruction sets were tested, and how: on the machine itself or against stand-ins."""
    reports = [one for kind in ("passed", "failed") for one in terminalreporter.stats.get(kind, [])]
    ids = [one.nodeid for one in reports if "test_instruction_sets" in one.nodeid]
    if ids:
        from instruction_sets import NAMES, is_native

        ran = [name for name in NAMES if any(re.search(rf"[\[-]{name}[-\]]", one) for one in ids)]
        how = {"native": [name for name in ran if is_native(name)], "stand-ins": [name for name in ran if not is_native(name)]}
        parts = [f"{', '.join(names)}: {way}" for way, names in how.items() if names]
        terminalreporter.write_line(f"instruction sets: {'; '.join(parts)}")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process: exit code, standard output, standard error."""
    from foredraft.__main__ import main

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return call


FLAT = Costs(((1.0, 1.0), (128.0, 1.0)), ((0.0, 0.0, 0.0), (64.0, 0.0, 0.0)), ((1.0, 1.5), (64.0, 3.0)))
"""Costs at which the largest tree always pays."""


@pytest.fixture(autouse=True)
def _measurements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice is the same on every machine: a step that drafts 4 nodes takes 1.2 plain steps.

    A test marked `timed` times a few steps on the machine, and neither reads nor leaves a choice for others.
    """
    from foredraft.plan import build, measure
    from foredraft.plan import choose as auto

    monkeypatch.setattr(build, "rows_of_step", lambda *_: 512)
    monkeypatch.setattr(auto, "SIZES", (4,))
    monkeypatch.setattr(auto, "TRIED_TREES", 1)
    recalled = auto.recalled
    if request.node.get_closest_marker("timed"):
        monkeypatch.setattr(measure, "_LEAST_STEPS", 2)
        monkeypatch.setattr(measure, "_MOST_STEPS", 2)
        source = request.node.nodeid
    else:
        monkeypatch.setattr(auto, "announce", lambda: None)
        monkeypatch.setattr(auto, "slowdown_of", lambda timed, plain: 1 + timed.nodes / 20)
        monkeypatch.setattr(auto, "forward_costs", lambda *_: FLAT.forward)
        monkeypatch.setattr(auto, "costs_of", lambda *_: FLAT)
        source = "given"
    monkeypatch.setattr(auto, "recalled", lambda kind, facts, *rest, **more: recalled(kind, [source, facts], *rest, **more))


@pytest.fixture(autouse=True)
def _types(request: pytest.FixtureRequest) -> Iterator[None]:
    """Types are checked at run time, but not in tests that call what others check a hundred thousand times."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("unchecked") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
