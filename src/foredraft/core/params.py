"""`SamplingParams`: how a request is sampled. Imports neither torch nor numpy, so that a wrong value is reported at once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

from foredraft.core.arguments import class_takes_other_names
from foredraft.core.errors import UserError, UserTypeError, check_text, plain_scalar, shown
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.treatment import SAMPLE

RANDOM_SEED = -1
"""This value requests a seed from the operating system."""

MAX_SEED = 2**64 - 1
"""The random number generator takes seeds of 64 bits."""

_RANDOM_BITS = 53
"""Size of a random seed in bits. A JSON reader that stores numbers as floats still reads such a seed exactly."""

MAX_COUNT = 2**31 - 1
"""Largest number of tokens. No context and no vocabulary is larger, and compiled code cannot count further."""

MAX_N = 16384
"""Most outputs per prompt, as in vLLM. Every output is kept in memory until the last one ends."""

MAX_BIAS = 1e30
"""Largest bias, and largest factor by which a logit is multiplied or divided. Larger values overflow float32."""


def check_seed(seed: Any, name: str = "seed") -> int:
    """Checks a seed.

    Raises:
        ValueError: the number is neither a seed nor -1.
        TypeError: the value is not a whole number.
    """
    seed = plain_scalar(seed)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise UserTypeError(f"{name} must be {_SEED}, got {shown(seed)}")
    number = int(seed)
    if not RANDOM_SEED <= number <= MAX_SEED:
        raise UserError(f"{name} must be {_SEED}, got {shown(number)}")
    return number


def used_seed(seed: int) -> int:
    """Returns `seed`, or a seed from the operating system if `seed` is -1."""
    return secrets.randbits(_RANDOM_BITS) if seed == RANDOM_SEED else seed


_SEED = f"a whole number between 0 and 2**64 - 1 ({MAX_SEED}), or {RANDOM_SEED} for a random one"


@class_takes_other_names(SAMPLE)
@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled. Names and meanings follow vLLM. Numbers of numpy and torch are accepted too.

    Other names of vLLM and Transformers are accepted or refused; `foredraft.core.names` lists them. They are not fields:
    ``max_new_tokens``, for example, sets ``max_tokens``.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all. At most 2**31 - 1, like every number of tokens.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this value, in (0, 1].
        min_p: drop tokens whose probability is below this share of the largest probability, in [0, 1].
        repetition_penalty: divides positive logits and multiplies negative logits of tokens that occur in the prompt or
            the output, 1e-30 to 1e30.
        presence_penalty: subtracted once from the logit of every token that occurs in the output, in [-2, 2].
        frequency_penalty: subtracted for every occurrence of the token in the output, in [-2, 2].
        max_tokens: maximum number of tokens to generate. None generates up to the end of the context.
        min_tokens: the first `min_tokens` tokens contain no end of sequence, no stop token and complete no stop string.
        stop: strings that end the output. The text is cut exactly before the stop string.
        include_stop_str_in_output: keep the stop string in the text.
        stop_token_ids: token ids that end the output. They are kept in ``token_ids``, but not in the text.
        ignore_eos: continue after the end of sequence.
        seed: makes the request reproducible by itself, 0 to 2**64 - 1. -1 takes a new seed from the operating system for
            each request. `RequestOutput.seed` holds the seed in use, with which the request can be repeated.
        n: outputs per prompt, 1 to 16384.
        logprobs: return the log-probabilities of this many top tokens at each position (-1: all tokens), and that of the
            sampled token. They are computed before all transformations above, from the logits that decided the token.
        prompt_logprobs: the same for the tokens of the prompt.
        logit_bias: token id -> number added to its logit, -1e30 to 1e30. Minus infinity forbids the token.
        bad_words: strings that must not be generated. Within the output, the last token that would complete one is forbidden.
        allowed_token_ids: only these ids may be generated.
        skip_special_tokens: leave special tokens out of the text.
        speculative: how the request drafts. None is as the engine was set up. False drafts nothing. ``{"method": name,
            "num_speculative_tokens": n}`` chooses a method that the engine was given at the start, and optionally fixes the
            number of nodes.
        output_kind: what `Engine.step` and `AsyncLLM.generate` give while the request runs.

    Raises:
        ValueError: a value is out of range. The message says which values are allowed.
        TypeError: a value has the wrong type.
    """

    n: int = 1
    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int = 0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float | int] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    speculative: Mapping[str, Any] | Literal[False] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name in self.names():
            self._set(name, _plain(getattr(self, name)))
        for name, allowed, description in _RANGES:
            value, kind = getattr(self, name), Integral if "whole" in description else Real
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, kind):
                raise UserTypeError(f"{name} must be {description}, got {shown(value)}")
            self._set(name, _python_number(value))
            if not allowed(getattr(self, name)):
                most = f", at most {_MOST_TEMPERATURE:g}" if name == "temperature" and not value < 0 else ""
                raise UserError(f"{name} must be {description}{most}, got {shown(value)}")
        if self.seed is not None:
            self._set("seed", check_seed(self.seed))
        for name, fits, description in _KINDS:
            value = getattr(self, name)
            if (value is not None or name in _REQUIRED) and not fits(value):
                raise UserTypeError(f"{name} must be {description}, got {shown(getattr(self, name))}")
        self._check_lists()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_lists(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if any(not word for word in self.stop_strings):
            raise UserError("stop must not contain an empty string")
        for name, words in (("stop", self.stop_strings), ("bad_words", self.bad_words or ())):
            for word in words:
                check_text(name, word)
        if any(not word.strip() for word in self.bad_words or ()):
            raise UserError("bad_words must not contain an empty string")
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise UserError("allowed_token_ids must name at least one token")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                self._set(name, _python_ids(getattr(self, name)))
        if self.logit_bias is not None:
            biases = {int(token_id): _python_number(plain_scalar(bias)) for token_id, bias in self.logit_bias.items()}
            for token_id, bias in biases.items():
                if not (bias == -math.inf or -MAX_BIAS <= bias <= MAX_BIAS):
                    allowed = f"numbers below infinity, between {-MAX_BIAS:g} and {MAX_BIAS:g} (or -inf to forbid a token)"
                    raise UserError(f"logit_bias must be {allowed}, got {shown(bias)} for token id {shown(token_id)}")
            if not {*map(type, self.logit_bias), *map(type, self.logit_bias.values())} <= {int, float}:
                self._set("logit_bias", biases)

    def at_temperature(self, temperature: float | int) -> SamplingParams:
        """Returns the same parameters at another temperature, which is not checked again: a step asks for it."""
        if temperature == self.temperature:
            return self
        other = copy(self)
        other._set("temperature", temperature)
        return other

    def giving(self, kind: RequestOutputKind) -> SamplingParams:
        """Returns the same parameters with another `output_kind`."""
        other = copy(self)
        other._set("output_kind", kind)
        return other

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @classmethod
    def names(cls) -> list[str]:
        """Names of all parameters."""
        return [parameter.name for parameter in fields(cls)]


_MOST_TEMPERATURE = 1e308
"""Nearly the largest float. Much lower temperatures already make all tokens equally likely."""

_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("temperature", lambda x: 0 <= x <= _MOST_TEMPERATURE, "0 (greedy) or above"),
    ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    (
        "top_k",
        lambda x: -1 <= x <= MAX_COUNT,
        f"a whole number: 1 or above, or 0 (or -1) to keep all tokens, at most {MAX_COUNT}",
    ),
    ("min_p", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("repetition_penalty", lambda x: 1 / MAX_BIAS <= x <= MAX_BIAS, f"above 0, between {1 / MAX_BIAS:g} and {MAX_BIAS:g}"),
    ("presence_penalty", lambda x: -2 <= x <= 2, "between -2 and 2"),
    ("frequency_penalty", lambda x: -2 <= x <= 2, "between -2 and 2"),
    (
        "max_tokens",
        lambda x: 1 <= x <= MAX_COUNT,
        f"a whole number, at least 1 (or None for the rest of the context), at most {MAX_COUNT}",
    ),
    ("min_tokens", lambda x: 0 <= x <= MAX_COUNT, f"a whole number, at least 0, at most {MAX_COUNT}"),
    ("n", lambda x: 1 <= x <= MAX_N, f"a whole number, at least 1, at most {MAX_N} (every output is kept until the last ends)"),
    *[
        (
            name,
            lambda x: -1 <= x <= MAX_COUNT,
            f"a whole number, at least 0 (or -1 for the whole vocabulary), at most {MAX_COUNT}",
        )
        for name in ("logprobs", "prompt_logprobs")
    ],
]

_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs")


def _plain(value: Any) -> Any:
    """Converts a scalar or a one-dimensional array of numpy or torch to a Python number or list."""
    if getattr(value, "ndim", None) == 1 and callable(getattr(value, "tolist", None)):
        return value.tolist()
    return plain_scalar(value)


def _python_number(value: Any) -> float | int:
    """Converts a number to int or float; NaN if it is too large for a float."""
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:
        return math.nan


def _python_ids(ids: Collection[Any]) -> Collection[int]:
    """Converts token ids to Python ints. A sequence of ints is returned as it is, which is fast for a whole vocabulary."""
    is_plain = isinstance(ids, list | tuple | range) and set(map(type, ids)) <= {int}
    return ids if is_plain else [int(token_id) for token_id in ids]


def _many(kind: type, values: Any) -> bool:
    if isinstance(values, str) or not isinstance(values, Collection):
        return False
    types = set(map(type, values))  # fast for a list of the whole vocabulary
    return all(issubclass(value_type, kind) and value_type is not bool for value_type in types)


def _is_wish(wish: Any) -> bool:
    """Whether a value names a method, and optionally a number of nodes."""
    if not isinstance(wish, Mapping) or not isinstance(wish.get("method"), str):
        return False
    nodes = wish.get("num_speculative_tokens", 1)
    return (
        {*wish} <= {"method", "num_speculative_tokens"} and isinstance(nodes, int) and not isinstance(nodes, bool) and nodes > 0
    )


_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")

_REQUIRED = (*_FLAGS, "output_kind")
"""Parameters that cannot be None."""

_KINDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("stop", lambda x: isinstance(x, str) or _many(str, x), "a string or a list of strings"),
    ("bad_words", lambda x: _many(str, x), "a list of strings"),
    ("stop_token_ids", lambda x: _many(Integral, x), "a list of token ids"),
    ("allowed_token_ids", lambda x: _many(Integral, x), "a list of token ids"),
    (
        "logit_bias",
        lambda x: isinstance(x, Mapping) and _many(Integral, x) and _many(Real, x.values()),
        "a dictionary of token ids and numbers",
    ),
    *[(name, lambda x: isinstance(x, bool), "True or False") for name in _FLAGS],
    ("speculative", lambda x: x is False or _is_wish(x), "False or a dictionary with 'method' and 'num_speculative_tokens'"),
    ("output_kind", lambda x: isinstance(x, RequestOutputKind), "a RequestOutputKind"),
]
