"""Config keys of the drafters: type, default and allowed values. Does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from foredraft.core.errors import UserError
from foredraft.core.shape import MAX_DEPTH

WEIGHT_BITS = (4, 16)
"""Bits of a compiled layer's weights: `QUANTIZED` and `FULL` of `foredraft.kernels.layouts`."""


class Option(NamedTuple):
    """A config key.

    Attributes:
        kind: type of the value.
        default: value if the key is left out.
        allowed: whether a value of this type is allowed.
        said: the allowed values in words, for messages.
    """

    kind: Any
    default: Any
    allowed: Callable[[Any], bool]
    said: str


OPTIONS: dict[str, Option] = {
    "prompt_lookup_max": Option(int, 4, lambda x: x >= 1, "at least 1"),
    "prompt_lookup_min": Option(int, 1, lambda x: x >= 1, "at least 1"),
    "suffix_decoding_max_tree_depth": Option(int, 24, lambda x: 1 <= x <= MAX_DEPTH, f"between 1 and {MAX_DEPTH}"),
    "suffix_decoding_max_spec_factor": Option(float, 1.0, lambda x: x > 0, "above 0"),
    "suffix_decoding_min_token_prob": Option(float, 0.1, lambda x: 0 <= x <= 1, "between 0 and 1"),
    "lookup_min_match": Option(int, 4, lambda x: x >= 1, "at least 1"),
    "force": Option(bool, False, lambda x: True, "true or false"),
    "weight_bits": Option(int, WEIGHT_BITS[0], lambda x: x in WEIGHT_BITS, " or ".join(map(str, WEIGHT_BITS))),
    "ctc_tokens": Option(int | None, None, lambda x: x is None or x >= 1, "at least 1"),
}


def check_options(**given: Any) -> None:
    """Checks the values of options.

    Raises:
        ValueError: a value is not allowed. The message names the option, the value and the allowed values.
    """
    for name, value in given.items():
        if not OPTIONS[name].allowed(value):
            raise UserError(f"{name} must be {OPTIONS[name].said}, got {value}")
    least, most = (given.get(name, OPTIONS[name].default) for name in ("prompt_lookup_min", "prompt_lookup_max"))
    if {"prompt_lookup_min", "prompt_lookup_max"} & set(given) and least > most:
        raise UserError(f"prompt_lookup_min must be at most prompt_lookup_max, got {least} and {most}")
