"""What is said of long work off a terminal."""

import pytest

from foredraft.core import progress
from foredraft.core.progress import progress_bar


@pytest.fixture
def seconds(monkeypatch):
    """The clock, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_a_line_appears_every_half_minute(seconds, capsys):
    with progress_bar("steps", 10) as advance:
        for _ in range(10):
            seconds[0] += 11
            advance(1)
    assert capsys.readouterr() == ("", "steps: 3 of 10 after 33 s\nsteps: 6 of 10 after 66 s\nsteps: 9 of 10 after 99 s\n")


@pytest.mark.parametrize("shown", [True, False])
def test_short_or_hidden_work_says_nothing(seconds, capsys, shown):
    with progress_bar("steps", 2, shown=shown) as advance:
        seconds[0] += 29 if shown else 500
        advance(2)
    assert capsys.readouterr() == ("", "")
