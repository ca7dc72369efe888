"""Checks a request against a model before it waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foredraft.core.contracts import Target
from foredraft.core.errors import UserError, shown
from foredraft.core.params import SamplingParams
from foredraft.models.rope import original_context


def check_request(
    prompt_ids: Sequence[int], sampling: SamplingParams, target: Target, tokenizer: Any, max_model_len: int
) -> None:
    """Checks the prompt and the parameters of a request.

    Raises:
        ValueError: the prompt is empty, too long or contains unknown ids, or the parameters need a tokenizer.
    """
    vocab_size = target.vocab_size
    if not prompt_ids:
        raise UserError("the prompt is empty", "give a text that makes at least one token")
    if len(prompt_ids) >= max_model_len:
        scaled = original_context(target.config) is not None  # a greater max_model_len chooses other factors
        longest = target.config.max_position_embeddings if scaled else target.max_len
        more = f", or raise max_model_len (at most {longest})" if max_model_len < longest else ""
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but the context of {max_model_len} must also fit an output",
            f"shorten the prompt{more}",
        )
    named = {
        "the prompt": prompt_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logit_bias": sampling.logit_bias or (),
        "stop_token_ids": sampling.stop_token_ids or (),
    }
    for where, ids in named.items():
        wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
        if wrong:
            raise UserError(f"token id {shown(wrong[0])} in {where} is outside the vocabulary (0 to {vocab_size - 1})")
    if tokenizer is None and (sampling.stop_strings or sampling.bad_words):
        raise UserError(
            "stop strings and bad_words need a tokenizer, and this model has none",
            "copy its tokenizer files into the model's directory, or use stop_token_ids, which needs no tokenizer",
        )
    most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
    if most > vocab_size:
        raise UserError(f"logprobs and prompt_logprobs must be at most the vocabulary size {vocab_size}, got {most}")
