"""What a step gives of a running request."""

from __future__ import annotations

import enum


class RequestOutputKind(enum.Enum):
    """What a `RequestOutput` of a running request holds. Names and meanings are those of vLLM."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the previous one."""
    FINAL_ONLY = 2
    """Everything, and only when the request has ended."""
