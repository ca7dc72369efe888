"""Folders: what comes with the package, and where it keeps its measurements of a machine."""

from __future__ import annotations

import os
from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_TARGET = BUNDLED / "chat-14m"
BUNDLED_LM = BUNDLED / "draft-lm"
BUNDLED_HEAD = BUNDLED / "fspad"
"""The drafter of the bundled target unless another is named."""


def cache_folder() -> Path:
    """``$FOREDRAFT_CACHE``, else ``foredraft`` in the user's cache folder."""
    given = os.environ.get("FOREDRAFT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foredraft"
