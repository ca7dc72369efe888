"""The engine: takes requests, runs batched steps and returns outputs. Outputs run in waves of at most `max_num_seqs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from foredraft.cache.blocks import num_blocks
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Target
from foredraft.core.draws import Draws, hash_seed
from foredraft.core.errors import UserError, shown
from foredraft.core.metrics import Metrics, StepRecord, summarize
from foredraft.core.params import SamplingParams, used_seed
from foredraft.core.processors import prefix_processors
from foredraft.core.text import TextStream, bad_word_ids
from foredraft.core.tree import DraftTree
from foredraft.engine.continuation import Continuation, Logprob
from foredraft.engine.decode import Steps, autoregressive, hand_over, paced, speculative
from foredraft.models.rope import original_context

DEFAULT_NUM_SEQS = 8

_AHEAD = 64
"""Positions behind the context that a drafter may run, such as its slots."""

MAX_NUM_SEQS = 4096
"""Upper limit of `max_num_seqs`. Every cache reserves a slot for each of them from the start, even if it stays unused."""


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    Attributes:
        token_ids: generated ids, including the id that ended the output.
        finish_reason: ``stop``, ``length`` or ``error``; None while the output is running.
        stop_reason: the stop string or stop token id that ended the output; None after an end of sequence or at the limit.
        error: why the output ended with ``error``, else None. Either the sampling parameters forbade every token, or the
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
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    seed: int = 0

    @cached_property
    def metrics(self) -> Metrics:
        """Summary over the steps of all outputs."""
        return summarize([record for completion in self.outputs for record in completion.records])


@dataclass(eq=False)
class Request:
    """A prompt that is being processed, with its `n` outputs."""

    number: int
    prompt: str | None
    prompt_ids: list[int]
    sampling: SamplingParams
    continuations: list[Continuation] = field(default_factory=list)
    seed: int = 0

    def output(self) -> RequestOutput:
        """Returns the outputs so far."""
        return RequestOutput(
            request_id=str(self.number),
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.continuations[0].prompt_logprobs,
            outputs=[_completion(index, continuation) for index, continuation in enumerate(self.continuations)],
            finished=all(continuation.finish_reason is not None for continuation in self.continuations),
            seed=self.seed,
        )


def _completion(index: int, continuation: Continuation) -> CompletionOutput:
    scored = continuation.sampling.logprobs is not None
    text = continuation.text
    return CompletionOutput(
        index=index,
        text=text.text if continuation.finish_reason else text.settled,
        token_ids=continuation.output_ids,
        finish_reason=continuation.finish_reason,
        stop_reason=continuation.stop_reason,
        logprobs=list(continuation.logprobs) if scored else None,
        cumulative_logprob=continuation.cumulative_logprob if scored else None,
        kinds=list(continuation.kinds),
        records=list(continuation.records),
        last_tree=continuation.last_tree,
        last_path=list(continuation.last_path),
        error=continuation.error,
    )


def require_whole(results: Sequence[RequestOutput]) -> None:
    """Checks that no output ended with an error. Call this before computing statistics over the outputs.

    Raises:
        ValueError: an output ended with an error.
    """
    for completion in (completion for result in results for completion in result.outputs):
        if completion.error is not None:
            raise completion.error


class Engine:
    """Runs requests on one target, with at most one drafter.

    Args:
        tokenizer: decodes text and finds stop strings; None if only token ids are used.
        drafter, rule, budget: None for plain decoding.
        max_nodes: gives the maximum number of tree nodes of a request, within the budget; None uses the whole budget.
        max_model_len: maximum length of prompt plus output, in tokens.
        max_num_seqs: maximum number of outputs decoded at once.
        seed: seed for requests that set none.
        eos_ids: end-of-sequence tokens.
    """

    def __init__(
        self,
        target: Target,
        *,
        tokenizer: Any = None,
        drafter: Drafter | None = None,
        rule: AcceptanceRule | None = None,
        budget: Budget | None = None,
        max_nodes: Callable[[SamplingParams], int] | None = None,
        max_model_len: int,
        max_num_seqs: int,
        seed: int = 0,
        eos_ids: Sequence[int] = (),
    ):
        self.target, self.tokenizer, self.drafter = target, tokenizer, drafter
        self.max_model_len, self.max_num_seqs = max_model_len, max_num_seqs
        self.rule, self._budget, self._max_nodes, self._seed = rule, budget, max_nodes, seed
        self._eos_ids = frozenset(token_id for token_id in eos_ids if 0 <= token_id < target.vocab_size)
        longest = max_model_len + (budget.nodes if budget else 0) + _AHEAD
        self._pool = target.new_pool(num_blocks(longest, max_num_seqs))
        self._num_requests = 0

    def add(self, prompt: str | None, prompt_ids: Sequence[int], sampling: SamplingParams) -> Request:
        """Checks a prompt and its parameters, and returns a new request. `run` starts it.

        Raises:
            ValueError: the prompt is empty, too long or contains unknown ids, or the parameters need a tokenizer.
        """
        self._check(prompt_ids, sampling)
        seed = hash_seed(self._seed, self._num_requests) if sampling.seed is None else used_seed(sampling.seed)
        request = Request(self._num_requests, prompt, list(prompt_ids), sampling, seed=seed)
        self._num_requests += 1
        request.continuations = [self._continuation(request, hash_seed(seed, i)) for i in range(sampling.n)]
        return request

    def run(self, requests: Sequence[Request]) -> Iterator[list[Continuation]]:
        """Runs requests to their end. After every step, yields the outputs that took part in it.

        Closing the iterator early frees all caches.
        """
        every = [continuation for request in requests for continuation in request.continuations]
        try:
            for first in range(0, len(every), self.max_num_seqs):
                wave, next_wave = every[first:][: self.max_num_seqs], every[first + self.max_num_seqs :][: self.max_num_seqs]
                yield from paced(self.target, self._steps(wave))
                hand_over(wave, next_wave)
                self._release(wave)
        finally:
            self._release(every)

    def _steps(self, wave: Sequence[Continuation]) -> Steps:
        # if nothing is drafted, both loops give the same outputs, and the plain loop is faster
        if self.drafter is None or all(continuation.max_nodes == 0 for continuation in wave):
            return autoregressive(self.target, self._pool, wave)
        assert self.rule is not None and self._budget is not None
        return speculative(self.target, self._pool, wave, self.drafter, self.rule, self._budget)

    def _release(self, continuations: Sequence[Continuation]) -> None:
        for continuation in continuations:
            if continuation.cache is not None:
                self._pool.free(continuation.cache)
            if continuation.draft_state is not None and self.drafter is not None:
                self.drafter.finish(continuation.draft_state)
            continuation.cache = continuation.draft_state = continuation.prompt_features = None

    def _continuation(self, request: Request, seed: int) -> Continuation:
        sampling, num_prompt = request.sampling, len(request.prompt_ids)
        num_left = self.max_model_len - num_prompt
        eos_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        words = bad_word_ids(self.tokenizer, sampling.bad_words) if sampling.bad_words else []
        return Continuation(
            token_ids=list(request.prompt_ids),
            num_prompt=num_prompt,
            max_len=num_prompt + min(num_left, sampling.max_tokens or num_left),
            sampling=sampling,
            draws=Draws(seed),
            text=TextStream(
                self.tokenizer,
                sampling.stop_strings,
                prompt_ids=request.prompt_ids,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
            ),
            eos_ids=eos_ids,
            processors=prefix_processors(sampling, num_prompt, {*self._eos_ids, *(sampling.stop_token_ids or ())}, words),
            tokenizer=self.tokenizer,
            max_nodes=self._max_nodes(sampling) if self._max_nodes else None,
        )

    def _check(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        vocab_size = self.target.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty", "give a text that makes at least one token")
        if len(prompt_ids) >= self.max_model_len:
            scaled = original_context(self.target.config) is not None  # a greater max_model_len chooses other factors
            longest = self.target.config.max_position_embeddings if scaled else self.target.max_len
            more = f", or raise max_model_len (at most {longest})" if self.max_model_len < longest else ""
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens, but the context of {self.max_model_len} must also fit an output",
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
        if self.tokenizer is None and (sampling.stop_strings or sampling.bad_words):
            raise UserError(
                "stop strings and bad_words need a tokenizer, and this model has none",
                "copy its tokenizer files into the model's directory, or use stop_token_ids, which needs no tokenizer",
            )
        most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        if most > vocab_size:
            raise UserError(f"logprobs and prompt_logprobs must be at most the vocabulary size {vocab_size}, got {most}")
