"""Logit processors for sampling parameters that depend on the prefix. Their effect differs between the nodes of a tree."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foredraft.core.law import PrefixProcessor
from foredraft.core.params import SamplingParams


def prefix_processors(
    sampling: SamplingParams, num_prompt: int, end_ids: Iterable[int], bad_word_ids: Sequence[Sequence[int]] = ()
) -> list[PrefixProcessor]:
    """Returns the processors that `sampling` requires.

    Args:
        num_prompt: number of prompt tokens, which separates prompt from output.
        end_ids: tokens that end the output; they are forbidden before `min_tokens`.
        bad_word_ids: all spellings of the forbidden words, as token ids.
    """
    processors: list[PrefixProcessor] = []
    if sampling.allowed_token_ids is not None:
        processors.append(_allow(list(sampling.allowed_token_ids)))
    if bad_word_ids:
        processors.append(_forbid_words(bad_word_ids, num_prompt))
    if sampling.min_tokens > 0:
        processors.append(_forbid_early(sorted(set(end_ids)), num_prompt + sampling.min_tokens))
    if sampling.logit_bias:
        processors.append(_bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        processors.append(_penalise_repetition(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_penalise_output(sampling, num_prompt))
    return processors


def _allow(token_ids: list[int]) -> PrefixProcessor:
    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        allowed = torch.full_like(logits, -math.inf)
        allowed[token_ids] = logits[token_ids]
        return allowed

    return process


def _forbid_words(words: Sequence[Sequence[int]], num_prompt: int) -> PrefixProcessor:
    longest = max(len(word) for word in words)

    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        tail = [*committed_ids[max(num_prompt, len(committed_ids) - longest) :], *path_ids]
        last = [word[-1] for word in words if len(word) == 1 or tail[1 - len(word) :] == list(word[:-1])]
        if last:
            logits = logits.clone()
            logits[last] = -math.inf
        return logits

    return process


def _forbid_early(end_ids: list[int], first_len: int) -> PrefixProcessor:
    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        if end_ids and len(committed_ids) + len(path_ids) < first_len:
            logits = logits.clone()
            logits[end_ids] = -math.inf
        return logits

    return process


def _bias(bias: dict[int, float | int]) -> PrefixProcessor:
    token_ids = list(bias)

    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[token_ids] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
        return logits

    return process


def _penalise_repetition(penalty: float | int) -> PrefixProcessor:
    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        seen = torch.tensor(sorted({*committed_ids, *path_ids}), device=logits.device)
        logits = logits.clone()
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        return logits

    return process


def _penalise_output(sampling: SamplingParams, num_prompt: int) -> PrefixProcessor:
    def process(committed_ids: Sequence[int], path_ids: Sequence[int], logits: Tensor) -> Tensor:
        output = torch.tensor([*committed_ids[num_prompt:], *path_ids], dtype=torch.long, device=logits.device)
        if not len(output):
            return logits
        seen, counts = output.unique(return_counts=True)
        logits = logits.clone()
        logits[seen] -= sampling.frequency_penalty * counts.to(logits.dtype) + sampling.presence_penalty
        return logits

    return process
