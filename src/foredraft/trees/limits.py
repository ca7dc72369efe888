"""Limits of the numbers in a speculative config, checked before they are used. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from foredraft.core.errors import UserError, plain_scalar, shown
from foredraft.core.params import MAX_COUNT

MAX_SIBLINGS = 1024
"""Largest number of siblings, chains or list entries. A tree has no more nodes."""

MAX_NGRAM = 256
"""Most tokens of a pattern in prompt lookup. The index keeps every length up to it for every token."""

_MOST: dict[str, float] = {
    **dict.fromkeys(("num_chains", "topk", "width", "ctc_tokens", "expansion", "paths"), MAX_SIBLINGS),
    **dict.fromkeys(("prompt_lookup_max", "prompt_lookup_min", "lookup_min_match"), MAX_NGRAM),
    **dict.fromkeys(("num_speculative_tokens", "draft_depth", "suffix_decoding_max_tree_depth"), math.inf),  # checked elsewhere
    "draft_top_k": MAX_COUNT,
    "suffix_decoding_max_spec_factor": 1e6,
    "draft_temperature": 1e308,
}
"""Option -> the largest number that it may hold."""


def plain_values(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """Returns the config with numbers of numpy and torch converted to Python numbers."""
    return {key: value.tolist() if getattr(value, "ndim", 0) else plain_scalar(value) for key, value in config.items()}


def check_sizes(config: Mapping[Any, Any]) -> None:
    """Checks every number of a config, also in lists and mappings. Ignores values of other types.

    Raises:
        ValueError: a number is not finite or is too large, or a list is too long.
    """
    for key, value in config.items():
        most = _MOST.get(key, MAX_COUNT)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > MAX_SIBLINGS:
            raise UserError(f"{key} must have at most {MAX_SIBLINGS} entries, the most nodes of a tree, got {len(value)}")
        try:
            numbers = _numbers(value)
        except RecursionError:
            raise UserError(f"{key} is nested too deeply, got {shown(value)}") from None
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key} must be finite, got {shown(number)}")
            if number > most:
                what = "must hold numbers of" if isinstance(value, Sequence) else "must be"
                raise UserError(f"{key} {what} at most {most:.17g}, got {shown(number)}")


def _numbers(value: Any) -> list[Any]:
    """Returns all numbers in a JSON value."""
    if isinstance(value, Mapping):
        return [number for entry in value.values() for number in _numbers(entry)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, Real) and not isinstance(value, bool) else []
