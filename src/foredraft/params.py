"""`SamplingParams`: how a request is sampled. Loads neither torch nor numpy, so that a wrong value is reported at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from foredraft.arguments import class_takes_other_names
from foredraft.names import SAMPLE


@class_takes_other_names(SAMPLE)
@dataclass(frozen=True)
class SamplingParams:
    """How a request is sampled; names and meanings are vLLM's.

    Other names of vLLM and Transformers are accepted or refused as `foredraft.names` says, and are no fields:
    ``max_new_tokens`` is ``max_tokens``.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of likely tokens with this mass, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        repetition_penalty: divides (multiplies, if negative) the logits of tokens seen in prompt or output, > 0.
        presence_penalty, frequency_penalty: subtracted for tokens of the output, once and per occurrence, in [-2, 2].
        max_tokens: most tokens to generate; None is to the end of the context.
        min_tokens: no end of sequence, stop token or stop string among this many first tokens.
        stop: strings that end the output, cut exactly there.
        include_stop_str_in_output: keep the stop string in the text.
        stop_token_ids: token ids that end the output (they are kept in ``token_ids``, not in the text).
        ignore_eos: go on after the end of sequence.
        seed: makes the request reproducible by itself.
        n: outputs per prompt.
        logprobs: give the log-probability of this many top tokens at each position (-1: of all), and of the one sampled.
            Raw: before any of the transformations above, from the logits that the token itself was decided on.
        prompt_logprobs: the same for the prompt.
        logit_bias: token id -> number added to its logit.
        bad_words: strings that must not be generated: not the last token that completes one within the output.
        allowed_token_ids: only these ids may be generated.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValueError: a value is out of range; the message says which values are allowed.
        TypeError: a value is of another type.
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

    def __post_init__(self) -> None:
        for name, allowed, said in _RANGES:
            value, kinds = getattr(self, name), int if "whole" in said else (int, float)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{name} must be {said}, got {value!r}")
            if not allowed(value):
                raise ValueError(f"{name} must be {said}, got {value}")
        for name, fits, said in _KINDS:
            if getattr(self, name) is not None and not fits(getattr(self, name)):
                raise TypeError(f"{name} must be {said}, got {getattr(self, name)!r}")
        self._check_lists()

    def _check_lists(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if any(not word for word in self.stop_strings):
            raise ValueError("stop must not contain an empty string")
        if any(not word.strip() for word in self.bad_words or ()):
            raise ValueError("bad_words must not contain an empty string")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must name at least one token")
        for token_id, bias in (self.logit_bias or {}).items():
            if not bias < math.inf:
                raise ValueError(f"logit_bias must be numbers below infinity, got {bias} for token id {token_id}")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @classmethod
    def names(cls) -> list[str]:
        """Names of all parameters."""
        return [one.name for one in fields(cls)]


_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("temperature", lambda x: x >= 0 and math.isfinite(x), "0 (greedy) or above"),
    ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
    ("top_k", lambda x: x >= -1, "a whole number: 1 or above, or 0 (or -1) to keep all tokens"),
    ("min_p", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("repetition_penalty", lambda x: x > 0 and math.isfinite(x), "above 0"),
    ("presence_penalty", lambda x: -2 <= x <= 2, "between -2 and 2"),
    ("frequency_penalty", lambda x: -2 <= x <= 2, "between -2 and 2"),
    ("max_tokens", lambda x: x >= 1, "a whole number, at least 1 (or None for the rest of the context)"),
    ("min_tokens", lambda x: x >= 0, "a whole number, at least 0"),
    ("n", lambda x: x >= 1, "a whole number, at least 1"),
    ("logprobs", lambda x: x >= -1, "a whole number, at least 0 (or -1 for the whole vocabulary)"),
    ("prompt_logprobs", lambda x: x >= -1, "a whole number, at least 0 (or -1 for the whole vocabulary)"),
    ("seed", lambda x: True, "a whole number"),
]

_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed")


def _many(kind: type, values: Any) -> bool:
    if isinstance(values, str) or not isinstance(values, Collection):
        return False
    return all(issubclass(one, kind) and one is not bool for one in set(map(type, values)))  # fast for a list of all tokens


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
]
