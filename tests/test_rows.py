"""How many rows a step may run: from the time of a short prompt, which is measured once on a machine. The clock is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM
from foredraft.core.folders import cached_file
from foredraft.models.table import TableTarget, random_law
from foredraft.plan import build, rows
from foredraft.plan.rows import LEAST, MOST, STEP_S, rows_of_step

TARGET = str(Path(__file__).parent / "data" / "babyllama-105")
VOCAB = 5
CONFIG = {"method": "ar"}


class Timed(TableTarget):
    """A target whose clock goes on while it runs. Its first forward is slower, and one of the others is much faster."""

    def __init__(self, row_s: float, max_len: int = 1 << 20):
        super().__init__(random_law(VOCAB, 1), VOCAB, max_len)
        self.row_s, self.now, self.sizes = row_s, 0.0, list[int]()

    def forward(self, batch: Any, *given: Any, **options: Any) -> Any:
        self.sizes.append(batch[0].num_nodes)
        slow = {1: 50.0, 4: 1.0}.get(len(self.sizes), 1.7)  # neighbours take time of the processor
        self.now += slow * self.row_s * self.sizes[-1]
        return super().forward(batch, *given, **options)


@pytest.fixture(autouse=True)
def _nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Timed]]:
    """Gives the clock to the target in the list."""
    current: list[Timed] = []
    monkeypatch.setattr(rows, "perf_counter", lambda: current[-1].now)
    yield current


def rows_for(measured: list[Timed], row_s: float, weights: str = "a", **given: Any) -> int:
    measured.append(Timed(row_s, **given))
    return rows_of_step(measured[-1], [weights])


@pytest.mark.parametrize(
    ("row_s", "wanted"),
    [(1e-7, MOST), (STEP_S / 2070, MOST), (STEP_S / 1000, 896), (STEP_S / 300, 256), (STEP_S / 130, LEAST), (1.0, LEAST)],
)
def test_a_step_takes_about_a_second(row_s: float, wanted: int, measured: list[Timed]) -> None:
    """The fastest forward counts, because others may be disturbed; the first is a warm-up."""
    assert rows_for(measured, row_s) == wanted
    assert wanted % LEAST == 0 and LEAST <= wanted <= MOST
    assert len(measured[-1].sizes) == 6 and set(measured[-1].sizes) == {48}


def test_more_time_for_a_row_never_gives_more_rows(measured: list[Timed]) -> None:
    found = [rows_for(measured, STEP_S / count, str(count)) for count in range(3000, 20, -7)]
    assert found == sorted(found, reverse=True)
    assert {*found} == {*range(LEAST, MOST + 1, LEAST)}


def test_a_short_context(measured: list[Timed]) -> None:
    assert rows_for(measured, STEP_S / 300, max_len=7) == 256
    assert set(measured[-1].sizes) == {7}


def test_it_is_measured_once(measured: list[Timed]) -> None:
    """Other weights are measured for themselves. A file that cannot be read is measured again."""
    assert rows_for(measured, STEP_S / 300) == 256
    again = Timed(STEP_S / 1000)
    measured.append(again)
    assert rows_of_step(again, ["a"]) == 256 and not again.sizes
    assert rows_for(measured, STEP_S / 1000, "b") == 896
    stored = cached_file("x")
    assert stored is not None
    for file in stored.parent.glob("rows-*.json"):
        file.write_text("{")
    assert rows_for(measured, STEP_S / 1000) == 896


def test_it_is_the_default_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names `max_num_batched_tokens` has nothing measured."""
    calls: list[Any] = []

    def row_s(target: Any) -> float:
        calls.append(target)
        return STEP_S / 1000

    monkeypatch.setattr(build, "rows_of_step", rows_of_step)
    monkeypatch.setattr(rows, "_row_s", row_s)
    llm = LLM(TARGET, CONFIG, max_num_batched_tokens=77)
    assert (llm.engine.options.max_num_batched_tokens, llm.engine.scheduler._max_rows, calls) == (77, 77, [])
    llm = LLM(TARGET, CONFIG)
    assert (llm.engine.options.max_num_batched_tokens, llm.engine.scheduler._max_rows) == (896, 896)
    assert calls == [llm.target]
    assert LLM(TARGET, CONFIG).engine.options.max_num_batched_tokens == 896
    assert len(calls) == 1
