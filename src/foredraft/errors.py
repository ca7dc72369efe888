"""How a user's mistake is said: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelError(ValueError):
    """A model cannot be loaded; the message says what was given, what is allowed and what to do next."""


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> ValueError:
    """An error for a name that is not among `allowed`, with the nearest one suggested."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {given!r}.{meant} Allowed: {', '.join(names)}")
