"""What a request gives: its outputs so far, with their texts, tokens, log-probabilities and records of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from foredraft.core.errors import UserError
from foredraft.core.metrics import Metrics, StepRecord, summarize
from foredraft.core.tree import DraftTree


class Logprob(NamedTuple):
    """Natural log-probability of a token under the model, its rank (1 is the most likely token) and its text.

    The probability is that of the raw logits, before sampling parameters are applied.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    With `RequestOutputKind.DELTA`, text, token_ids, logprobs, kinds and records are those since the previous one.

    Attributes:
        token_ids: generated ids, including the id that ended the output.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None while the output is running.
        stop_reason: the stop string or stop token id that ended the output; None after an end of sequence or at the limit.
        error: why the output ended with ``error``, else None. For example, the sampling parameters forbade every token, or the
            model's logits were NaN or infinite. The tokens before remain valid, and other outputs are not affected.
        logprobs: per token, the requested number of most likely tokens and the token itself.
        kinds: per token ``accepted``, ``recovered``, ``bonus`` or ``plain``.
        records: one record per step; `metrics` summarizes them.
        last_tree: the tree of the latest step; None if nothing is drafted.
        last_path: the accepted nodes of `last_tree`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None
    kinds: list[str]
    records: list[StepRecord] = field(repr=False)
    last_tree: DraftTree | None = field(default=None, repr=False)
    last_path: list[int] = field(default_factory=list)
    error: UserError | None = None

    @cached_property
    def metrics(self) -> Metrics:
        """Summary of `records`. Computed on demand, because a stream creates a new output in every step."""
        return summarize(self.records)


@dataclass(frozen=True)
class RequestOutput:
    """All outputs of one prompt.

    Attributes:
        prompt: the text of the prompt; None if token ids were given.
        finished: whether all outputs have ended.
        seed: seed of the random numbers: `SamplingParams.seed`, or the seed used in its place if that is None or -1. A
            request with this seed gives the same outputs.
        num_cached_tokens: number of tokens of the prompt whose keys and values were in the prefix cache when the request began.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    seed: int = 0
    num_cached_tokens: int = 0

    @cached_property
    def metrics(self) -> Metrics:
        """Summary over the steps of all outputs."""
        return summarize([record for completion in self.outputs for record in completion.records])


def joined(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """Joins two successive outputs of a request with `RequestOutputKind.DELTA` into one. Neither is changed."""
    outputs = [
        replace(
            new,
            text=old.text + new.text,
            token_ids=old.token_ids + new.token_ids,
            logprobs=None if old.logprobs is None or new.logprobs is None else old.logprobs + new.logprobs,
            kinds=old.kinds + new.kinds,
            records=old.records + new.records,
        )
        for old, new in zip(earlier.outputs, later.outputs, strict=True)
    ]
    return replace(later, outputs=outputs)


def require_whole(results: Sequence[RequestOutput]) -> None:
    """Checks that no output ended with an error. Call this before computing statistics over the outputs.

    Raises:
        ValueError: an output ended with an error.
    """
    for completion in (completion for result in results for completion in result.outputs):
        if completion.error is not None:
            raise completion.error
