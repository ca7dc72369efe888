"""How a user's mistake is said: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any


def unknown_name(kind: str, given: object, allowed: Iterable[str]) -> ValueError:
    """An error for a name that is not among `allowed`, with the nearest one suggested."""
    names = list(allowed)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {given!r}.{meant} Allowed: {', '.join(names)}")


def shown(value: object) -> str:
    """A value as a message shows it: as Python writes it, shortened where that is long."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python itself refuses to write very long ones
        return f"{'-' if value < 0 else ''}10**{int((value.bit_length() - 1) * 0.30103)} or so"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_scalar(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own; everything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)) else value


def whole_number(name: str, value: Any, least: int, most: int, why: str = "") -> int:
    """Checks a whole number; one of numpy or torch is taken too.

    Args:
        why: reason of the limit, said where `value` exceeds it.

    Raises:
        ValueError: it is below `least` or above `most`.
        TypeError: it is no whole number.
    """
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number between {least} and {most}, got {shown(value)}")
    number = int(value)
    if not least <= number <= most:
        reason = f" ({why})" if why and number > most else ""
        raise ValueError(f"{name} must be between {least} and {most}{reason}, got {shown(number)}")
    return number


def check_text(name: str, text: str) -> None:
    """Checks that a text can be written in UTF-8, as every tokenizer needs it.

    Raises:
        ValueError: it holds half of a surrogate pair, or bytes that were read in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid text: character {error.start + 1} is the lone surrogate U+{ord(text[error.start]):04X}. "
            "Give it in UTF-8; on the command line set a UTF-8 locale (LC_ALL=C.UTF-8)"
        ) from None
