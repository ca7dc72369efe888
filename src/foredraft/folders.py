"""Where this package keeps what it finds out about a machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FOREDRAFT_CACHE``, else ``foredraft`` in the user's cache folder."""
    given = os.environ.get("FOREDRAFT_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foredraft"
