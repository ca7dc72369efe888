"""``foredraft doctor`` without a directory: this machine, and what would make it faster."""

from __future__ import annotations

import json

import pytest
import torch

from foredraft.__main__ import main
from foredraft.bench import machine
from foredraft.kernels import sets


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and arithmetic are not measured, which would take a second."""
    monkeypatch.setattr("foredraft.bench.bandwidth.read_bandwidth", lambda device: 12.34e9)
    monkeypatch.setattr("foredraft.bench.bandwidth.arithmetic_peak", lambda dtype: 470e9 if dtype == torch.bfloat16 else 235e9)


def said(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *more])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_it_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys).splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["processor", "instruction set", "memory", "arithmetic", "versions"]
    assert f"instruction set: {sets.instruction_set()} (here: {', '.join([*sets.sets_here(), 'torch'])})" in lines
    assert "memory: 12.3 GB/s read" in lines
    assert "arithmetic: 470 GFLOPS in bfloat16, 235 GFLOPS in float32" in lines
    facts = json.loads(said(capsys, "--json"))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["sets"] == sets.sets_here()
    assert [f"{number}. {sentence}" for number, sentence in enumerate(facts["advice"], 1)] == lines[5:]


def test_it_says_what_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced set, a number of threads that is not that of the cores, missing sets and missing kernels."""
    monkeypatch.setattr(machine, "sets_here", lambda: ["avx512", "avx2", "scalar"])
    monkeypatch.setattr(machine, "sets_of_library", lambda: [*sets.SETS])
    monkeypatch.setattr(machine, "kernels", lambda: "auto")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {*range(torch.get_num_threads())}, raising=False)
    assert machine.advice() == []
    monkeypatch.setattr(machine, "kernels", lambda: "scalar")
    assert machine.advice() == ["FOREDRAFT_KERNELS is 'scalar', but this machine has avx512: unset the environment variable"]
    monkeypatch.setattr(machine, "kernels", lambda: "auto")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {*range(99)}, raising=False)
    assert machine.advice() == [f"{torch.get_num_threads()} threads run on 99 cores: set OMP_NUM_THREADS=99, or leave it unset"]
    monkeypatch.setattr(machine, "sets_of_library", lambda: ["avx512", "avx2", "scalar"])
    assert "built without amx, avx512_bf16, avx512_vnni: install" in machine.advice()[0]
    monkeypatch.setattr(machine, "sets_of_library", lambda: [])
    assert machine.advice()[0].startswith("there are no compiled kernels: install a C compiler")
