"""Properties of a tree that do not depend on tokens: its maximum size and how its nodes are drawn. Does not import torch."""

from __future__ import annotations

import enum
from typing import NamedTuple

MAX_NODES = 1024
MAX_DEPTH = 64


class Drawn(enum.IntEnum):
    """How the children of one node were chosen. Whether a rule is exact depends on it."""

    DETERMINISTIC = 0
    """A function of the draft law alone (the most likely tokens, a lookup): nothing was sampled."""
    IID = 1
    """Independent draws with replacement. Equal siblings are all kept, because their number is part of the law."""
    WITHOUT_REPLACEMENT = 2
    """Successive draws, each from the law renormalised over the remaining tokens. Siblings are stored in draw order."""


class Budget(NamedTuple):
    """The largest tree of a request: at most `nodes` nodes besides the root, at most `depth` levels below the root."""

    nodes: int
    depth: int
