"""Parses options and numbers from the command line: NAME=VALUE, and lists separated by commas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from foredraft.core.errors import UserError, shown


def option(text: str, taker: str) -> tuple[str, Any]:
    """Splits ``NAME=VALUE``. The value is parsed as JSON if possible, else it is kept as a string.

    Args:
        taker: name of the command-line option, for the message.

    Raises:
        ValueError: `text` contains no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{taker} takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def options(given: Sequence[str]) -> dict[str, Any]:
    """Parses the values of ``--set``."""
    return dict(option(text, "--set") for text in given)


def numbers(name: str, text: str, kind: type[float] | type[int] = float) -> list[Any]:
    """Parses numbers separated by commas.

    Args:
        name: name of the command-line option, for the message.
        kind: int for whole numbers.

    Raises:
        ValueError: a part is not a number of this kind.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        whole = "whole " if kind is int else ""
        raise UserError(f"{name} must be {whole}numbers separated by commas, got {shown(text)}") from None
