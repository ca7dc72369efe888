"""The engine: requests in, batched steps, outputs back. Requests are admitted in waves of `max_num_seqs` outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from foredraft.decode import Continuation, Logprob, Steps, autoregressive, hand_over, paced, speculative
from foredraft.draws import Draws, hash_seed
from foredraft.errors import shown
from foredraft.metrics import Metrics, StepRecord, summarize
from foredraft.params import SamplingParams, used_seed
from foredraft.processors import prefix_processors
from foredraft.protocols import AcceptanceRule, Budget, Drafter, Target
from foredraft.text import TextStream, bad_word_ids
from foredraft.tree import DraftTree


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    Attributes:
        token_ids: generated ids, the one that ended the output included.
        finish_reason: ``stop``, ``length`` or ``error``; None while it is running.
        stop_reason: the stop string or stop token id that ended it; None at an end of sequence or at the length limit.
        error: why it ended with ``error``: its parameters left no token that could follow, or the model's logits were not
            numbers. The tokens before stand. None for every other end. Other outputs of the batch are not affected.
        logprobs: per token, the asked number of likeliest tokens and the token itself.
        kinds: per token ``accepted``, ``recovered``, ``bonus`` or ``plain``.
        records: what its steps did; `metrics` sums them up.
        last_tree, last_path: the tree of the latest step and its accepted nodes, to be shown; None where nothing is drafted.
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
    error: str | None = None

    @cached_property
    def metrics(self) -> Metrics:
        """What its steps did; computed when asked, since a stream gives an output a step."""
        return summarize(self.records)


@dataclass(frozen=True)
class RequestOutput:
    """All outputs of one prompt.

    Attributes:
        prompt: as given, if it was text.
        seed: of its random numbers: `SamplingParams.seed`, or what was taken in its place where that is None or -1. A request
            with this seed gives the same outputs.
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
        """Over the steps of all outputs."""
        return summarize([record for one in self.outputs for record in one.records])


@dataclass(eq=False)
class Request:
    """A prompt on its way: its outputs, `n` of them."""

    number: int
    prompt: str | None
    prompt_ids: list[int]
    sampling: SamplingParams
    continuations: list[Continuation] = field(default_factory=list)
    seed: int = 0

    def output(self) -> RequestOutput:
        """What there is so far."""
        return RequestOutput(
            request_id=str(self.number),
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            prompt_logprobs=self.continuations[0].prompt_logprobs,
            outputs=[_completion(index, one) for index, one in enumerate(self.continuations)],
            finished=all(one.finish_reason is not None for one in self.continuations),
            seed=self.seed,
        )


def _completion(index: int, one: Continuation) -> CompletionOutput:
    scored = one.sampling.logprobs is not None
    return CompletionOutput(
        index=index,
        text=one.text.text if one.finish_reason else one.text.settled,
        token_ids=one.output_ids,
        finish_reason=one.finish_reason,
        stop_reason=one.stop_reason,
        logprobs=list(one.logprobs) if scored else None,
        cumulative_logprob=one.cumulative_logprob if scored else None,
        kinds=list(one.kinds),
        records=list(one.records),
        last_tree=one.last_tree,
        last_path=list(one.last_path),
        error=one.error,
    )


def require_whole(results: Sequence[RequestOutput]) -> None:
    """Checks that every output came to its end, where figures are made of them.

    Raises:
        ValueError: one ended with an error.
    """
    for out in (out for result in results for out in result.outputs):
        if out.error is not None:
            raise ValueError(out.error)


class Engine:
    """Runs requests on one target with one drafter, or none.

    Args:
        tokenizer: for texts and stop strings; None where only token ids are used.
        drafter, rule, budget: None for plain decoding.
        max_nodes: for a request, most nodes of its trees, where that is less than the budget; None is the budget.
        max_model_len: longest prompt and output together.
        max_num_seqs: outputs decoded at once.
        seed: of requests that have none of their own.
        eos_ids: tokens that end an output.
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
        self._eos_ids = frozenset(one for one in eos_ids if 0 <= one < target.vocab_size)
        self._pool = target.new_pool(max_num_seqs, max_model_len)
        self._num_requests = 0

    def add(self, prompt: str | None, prompt_ids: Sequence[int], sampling: SamplingParams) -> Request:
        """A new request, checked; it does not run yet.

        Raises:
            ValueError: the prompt is empty, too long or holds unknown ids, or the parameters need a tokenizer.
        """
        self._check(prompt_ids, sampling)
        seed = hash_seed(self._seed, self._num_requests) if sampling.seed is None else used_seed(sampling.seed)
        request = Request(self._num_requests, prompt, list(prompt_ids), sampling, seed=seed)
        self._num_requests += 1
        request.continuations = [self._continuation(request, hash_seed(seed, i)) for i in range(sampling.n)]
        return request

    def run(self, requests: Sequence[Request]) -> Iterator[list[Continuation]]:
        """Runs requests to their end; yields the outputs that took part after every step. Closing it early frees all."""
        every = [one for request in requests for one in request.continuations]
        try:
            for first in range(0, len(every), self.max_num_seqs):
                wave, next_wave = every[first:][: self.max_num_seqs], every[first + self.max_num_seqs :][: self.max_num_seqs]
                yield from paced(self.target, self._steps(wave))
                hand_over(wave, next_wave)
                self._release(wave)
        finally:
            self._release(every)

    def _steps(self, wave: Sequence[Continuation]) -> Steps:
        # where nothing is drafted both loops give the same outputs, and the plain one sooner
        if self.drafter is None or all(one.max_nodes == 0 for one in wave):
            return autoregressive(self.target, self._pool, wave)
        assert self.rule is not None and self._budget is not None
        return speculative(self.target, self._pool, wave, self.drafter, self.rule, self._budget)

    def _release(self, continuations: Sequence[Continuation]) -> None:
        for one in continuations:
            if one.cache is not None:
                self._pool.free(one.cache)
            if one.draft_state is not None and self.drafter is not None:
                self.drafter.finish(one.draft_state)
            one.cache = one.draft_state = one.prompt_features = None

    def _continuation(self, request: Request, seed: int) -> Continuation:
        sampling, num_prompt = request.sampling, len(request.prompt_ids)
        room = self.max_model_len - num_prompt
        eos_ids = frozenset() if sampling.ignore_eos else self._eos_ids
        words = bad_word_ids(self.tokenizer, sampling.bad_words) if sampling.bad_words else []
        return Continuation(
            token_ids=list(request.prompt_ids),
            num_prompt=num_prompt,
            max_len=num_prompt + min(room, sampling.max_tokens or room),
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
            raise ValueError("the prompt is empty: give a text that makes at least one token")
        if len(prompt_ids) >= self.max_model_len:
            longest = self.target.max_len
            more = f", or raise max_model_len (at most {longest})" if self.max_model_len < longest else ""
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, but the context of {self.max_model_len} must also hold an output: "
                f"shorten the prompt{more}"
            )
        named = {
            "the prompt": prompt_ids,
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "logit_bias": sampling.logit_bias or (),
            "stop_token_ids": sampling.stop_token_ids or (),
        }
        for where, ids in named.items():
            wrong = [one for one in ids if not 0 <= one < vocab_size]
            if wrong:
                raise ValueError(f"token id {shown(wrong[0])} in {where} is outside the vocabulary (0 to {vocab_size - 1})")
        if self.tokenizer is None and (sampling.stop_strings or sampling.bad_words):
            raise ValueError(
                "stop strings and bad_words need a tokenizer, and this model has none: copy its files into the model's "
                "directory, or leave them out (stop_token_ids needs none)"
            )
        most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        if most > vocab_size:
            raise ValueError(f"logprobs and prompt_logprobs must be at most the vocabulary's size {vocab_size}, got {most}")
