"""What can be said of a tree before it has tokens: its largest size, and how its nodes are drawn. Loads no torch."""

from __future__ import annotations

import enum
from typing import NamedTuple

MAX_NODES = 1024
MAX_DEPTH = 64


class Drawn(enum.IntEnum):
    """How the children of one node were chosen; the exactness of a rule rests on it."""

    DETERMINISTIC = 0
    """A function of the draft law alone (the most likely tokens, a lookup): nothing was sampled."""
    IID = 1
    """Independent draws with replacement; equal siblings are kept, their number belongs to the law."""
    WITHOUT_REPLACEMENT = 2
    """Successive draws, each from the law renormalised over what is left; siblings stand in draw order."""


class Budget(NamedTuple):
    """The largest tree a request may get: `nodes` without the root, `depth` below the root."""

    nodes: int
    depth: int
