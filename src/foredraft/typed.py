"""Options as they are typed: NAME=VALUE."""

from __future__ import annotations

import json
from typing import Any


def option(text: str, taker: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``; the value is JSON where it can be read as such, else what stands there.

    Args:
        taker: who takes it, for the message.

    Raises:
        ValueError: there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{taker} takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
