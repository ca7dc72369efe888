"""Errors for mistakes of the user: what was given, what is allowed and what to do next. The command line shows both parts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any


class _Told(Exception):
    """An error in two parts. Its text is the message, and after it the hint as a sentence of its own.

    Attributes:
        message: what was given and what is allowed, without a full stop.
        hint: what to do next, or None.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint[:1].upper()}{self.hint[1:]}" if self.hint else self.message


class UserError(_Told, ValueError):
    """A value that the user gave cannot be used; `message` and `hint` say why and what to do."""


class UserTypeError(_Told, TypeError):
    """A value that the user gave has a wrong type; `message` and `hint` say why and what to do."""


class ModelError(UserError):
    """A model cannot be loaded."""


def told(error: Exception) -> tuple[str, str | None]:
    """Returns message and hint of an error. Errors of Python and of libraries have no hint."""
    hint = getattr(error, "hint", None)
    return (getattr(error, "message", ""), hint) if hint else (str(error), None)


def unknown_name(kind: str, given: object, allowed: Iterable[str], *, meant: str | None = None) -> UserError:
    """Returns an error for a name that is not in `allowed`. The hint suggests `meant`, or the most similar allowed name."""
    names = list(allowed)
    near = [meant] if meant else difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    advice = f"Did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {given!r}", f"{advice}Allowed: {', '.join(names)}")


def shown(value: object) -> str:
    """Formats a value for a message: its `repr`, shortened if it is long."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to format very long integers
        return f"{'-' if value < 0 else ''}10**{int((value.bit_length() - 1) * 0.30103)} or so"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_scalar(value: Any) -> Any:
    """Converts a scalar of numpy or torch to a Python number. Returns any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)) else value


def whole_number(name: str, value: Any, least: int, most: int, why: str = "") -> int:
    """Checks a whole number and returns it as an int. Scalars of numpy and torch are accepted.

    Args:
        why: reason of the upper limit; the message gives it if `value` exceeds the limit.

    Raises:
        ValueError: the number is below `least` or above `most`.
        TypeError: the value is not a whole number.
    """
    value = plain_scalar(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserTypeError(f"{name} must be a whole number between {least} and {most}, got {shown(value)}")
    number = int(value)
    if not least <= number <= most:
        reason = f" ({why})" if why and number > most else ""
        raise UserError(f"{name} must be between {least} and {most}{reason}, got {shown(number)}")
    return number


def check_count(name: str, value: Any, most: int, why: str) -> int | None:
    """Checks a number of things, at least 1, and returns it as an int. None stays None.

    Args:
        why: as for `whole_number`.

    Raises:
        ValueError: the value is not a whole number, or it is out of range.
    """
    value = plain_scalar(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} must be a whole number, at least 1, got {shown(value)}")
    return whole_number(name, value, 1, most, why)


def check_text(name: str, text: str) -> None:
    """Checks that a text can be encoded in UTF-8, which every tokenizer requires.

    Raises:
        ValueError: the text contains a lone surrogate. Python also makes one of a byte that was read in a wrong encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not valid text: character {error.start + 1} is the lone surrogate U+{ord(text[error.start]):04X}",
            "Give the text in UTF-8; on the command line, set a UTF-8 locale (LC_ALL=C.UTF-8)",
        ) from None


def speaks_unicode(stream: Any) -> bool:
    """Whether every character can be written to a stream as it is."""
    return str(getattr(stream, "encoding", None) or "").lower().startswith("utf")


def why_no_json(error: Exception) -> str:
    """Words the error of a JSON parser. Some messages of Python give advice that only code can follow."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number is too long" if "set_int_max_str_digits" in str(error) else str(error)
