"""What every test needs: one thread per process, so that tests run alike on every machine, and a cache of their own."""

import os
import tempfile
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
os.environ["FOREDRAFT_CACHE"] = tempfile.mkdtemp(prefix="foredraft-tests-")  # nothing measured by a test outlives it


@pytest.fixture(autouse=True)
def _few_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice times few steps: what it chooses does not matter to a test, and checked types make steps slow."""
    from foredraft import auto

    monkeypatch.setattr(auto, "SIZES", (4,))
    monkeypatch.setattr(auto, "_LEAST_STEPS", 2)
    monkeypatch.setattr(auto, "_MOST_STEPS", 2)
    monkeypatch.setattr(auto, "TRIED_TREES", 1)


@pytest.fixture(autouse=True)
def _types(request: pytest.FixtureRequest) -> Iterator[None]:
    """Types are checked at run time, but not in tests that call what others check a hundred thousand times."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("unchecked") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
