"""Options as they are typed: NAME=VALUE."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


def options(given: Sequence[str]) -> dict[str, Any]:
    """Options of ``--set``."""
    return dict(option(one, "--set") for one in given)


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers with commas between.

    Raises:
        ValueError: one is none.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{name} takes numbers with commas between, got {text!r}") from None
