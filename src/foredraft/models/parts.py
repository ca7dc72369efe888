"""What one run loads: the target, its tokenizer and defaults, and the draft models that are used beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from foredraft.core.errors import ModelError, UserError, UserTypeError, unknown_name
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.models.files import ACTIVATIONS, FULL_INPUTS
from foredraft.models.generation import checked
from foredraft.models.loading import fingerprint_of, load_generation_config, load_target, load_tokenizer
from foredraft.models.rope import why_not_longer
from foredraft.models.tokenizer import refuse_misfit


@dataclass(frozen=True)
class ModelParts:
    """A target with everything that is read beside it.

    Attributes:
        target: the model, as a `Target`.
        tokenizer: a Transformers tokenizer, or a `QuickTokenizer`; None if the model has none.
        defaults: sampling parameters of ``generation_config.json``, without its end-of-sequence tokens.
        eos_ids: the end-of-sequence tokens.
        max_model_len: maximum length of prompt plus output, in tokens.
        fingerprint: fingerprint of the target's weights as they were read.
        is_bundled: whether the target is the bundled one, which has bundled drafters.
        draft_model: loads a draft model in the dtype and on the device of the target, each one once.
    """

    target: Any
    tokenizer: Any
    defaults: dict[str, Any]
    eos_ids: list[int]
    max_model_len: int
    fingerprint: str
    is_bundled: bool
    draft_model: Callable[[Any], Any]
    _fingerprint_of: Callable[[Any], str]

    def vocabulary(self, source: Any) -> dict[str, int] | None:
        """Returns the map from token to id of a draft model, or of the target for None. None if it has no tokenizer.

        Raises:
            ModelError: the tokenizer has tokens outside the draft model's vocabulary.
        """
        tokenizer = self.tokenizer if source is None else load_tokenizer(source)
        if source is not None:
            refuse_misfit(tokenizer, self.draft_model(source).vocab_size, "draft model")
        return None if tokenizer is None else tokenizer.get_vocab()

    def draft_fingerprint(self, source: Any) -> str | None:
        """Returns the fingerprint of a draft model's or a head's weights; None if there are none."""
        try:
            return None if source is None else self._fingerprint_of(source)
        except ModelError:  # building the drafter reports it
            return None


def load_parts(
    model: Any,
    tokenizer: Any,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    max_model_len: int | None,
    revision: str | None,
    *,
    generation_config: str | Path,
    activations: str = FULL_INPUTS,
) -> ModelParts:
    """Loads a target and what belongs to it. The arguments are those of `foredraft.llm.LLM`.

    Raises:
        ValueError: something cannot be loaded, or the parts do not fit together. The message says what to do.
        TypeError: `tokenizer` is not a tokenizer.
    """
    source = BUNDLED_TARGET if model is None else model
    if activations not in ACTIVATIONS:
        raise unknown_name("activations", str(activations), ACTIVATIONS)
    how = {"dtype": dtype, "device": device, "revision": revision}
    target: Any = load_target(source, **how, max_len=max_model_len, activations=activations)
    found = load_tokenizer(source, revision=revision) if tokenizer is None else _given_tokenizer(tokenizer)
    refuse_misfit(found, target.vocab_size)
    defaults = load_generation_config(source, revision, choice=generation_config, vocab_size=target.vocab_size)
    eos_ids = defaults.pop("eos_token_id")
    checked(defaults)
    length = _context(target, max_model_len)
    draft_model = cache(partial(load_target, dtype=target.dtype, device=target.device, max_len=length))
    read = fingerprint_of(source, revision)
    return ModelParts(target, found, defaults, eos_ids, length, read, model is None, draft_model, cache(fingerprint_of))


def _given_tokenizer(tokenizer: Any) -> Any:
    if isinstance(tokenizer, str | Path):
        found = load_tokenizer(tokenizer) if str(tokenizer) else None
        if found is None:
            raise UserError(f"{str(tokenizer)!r} holds no tokenizer", "Give a directory with a tokenizer.json or a Hub id")
        return found
    if not callable(tokenizer):
        raise UserTypeError(f"tokenizer must be a Transformers tokenizer, or its directory or Hub id, got {tokenizer!r}")
    return tokenizer


def _context(target: Any, max_model_len: int | None) -> int:
    if max_model_len is None:
        return target.max_len
    if max_model_len > target.max_len:
        why = why_not_longer(target.config)
        raise UserError(f"max_model_len {max_model_len} exceeds the model's context of {target.max_len}{why}")
    return max_model_len
