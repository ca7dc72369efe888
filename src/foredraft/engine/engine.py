"""The engine: requests join, leave and wait; each `step` adds tokens to those that run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from contextlib import nullcontext
from itertools import count
from typing import Any

from foredraft.cache.blocks import BLOCK
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Target
from foredraft.core.draws import Draws, hash_seed
from foredraft.core.errors import UserError
from foredraft.core.output_kind import RequestOutputKind
from foredraft.core.outputs import RequestOutput
from foredraft.core.params import SamplingParams, used_seed
from foredraft.core.processors import prefix_processors
from foredraft.core.prompts import Prompt, encode, salt_of
from foredraft.core.text import TextStream, bad_word_ids
from foredraft.engine.checks import check_request
from foredraft.engine.drafting import Drafting, drafted_by
from foredraft.engine.one_thread import one_thread
from foredraft.engine.options import MAX_ROWS, EngineOptions, memory_of
from foredraft.engine.request import Request, Sequence
from foredraft.engine.scheduler import Scheduler
from foredraft.engine.step import step


class QueueFullError(RuntimeError):
    """As many requests wait as `max_waiting` allows."""


class Engine:
    """Runs requests on one target, with at most one drafter. Its methods may be called from several threads.

    Args:
        tokenizer: decodes text and finds stop strings; None if only token ids are used.
        drafter, rule, budget: None for plain decoding.
        others: further ways of drafting, which requests choose by name.
        max_model_len: maximum length of prompt plus output, in tokens.
        options: memory, load and waiting; None uses the defaults.
        num_kv_blocks: number of blocks of 32 tokens for keys and values; None derives it from `options`.
        seed: seed for requests that set none.
        eos_ids: end-of-sequence tokens.
        drafting: further arguments of `Drafting`.
    """

    def __init__(
        self,
        target: Target,
        *,
        tokenizer: Any = None,
        drafter: Drafter | None = None,
        rule: AcceptanceRule | None = None,
        budget: Budget | None = None,
        others: Items[Drafting] = (),
        max_model_len: int,
        options: EngineOptions | None = None,
        num_kv_blocks: int | None = None,
        seed: int = 0,
        eos_ids: Items[int] = (),
        **drafting: Any,
    ):
        self.target, self.tokenizer = target, tokenizer
        self.max_model_len, self.options = max_model_len, (options := options or EngineOptions())
        self._drafting: Drafting | None = None
        if drafter is not None:
            assert rule is not None and budget is not None
            self._drafting = Drafting(drafter, rule, budget, **drafting)
        self._draftings = [*([self._drafting] if self._drafting else []), *others]
        self._seed = seed
        self._eos_ids = frozenset(token_id for token_id in eos_ids if 0 <= token_id < target.vocab_size)
        ahead = 1 + max([0, *(max(way.most.nodes, way.drafter.ahead) for way in self._draftings)])
        drafted_bytes = sum(way.drafter.bytes_per_token for way in self._draftings)
        self.memory = memory_of(options, target, drafted_bytes, max_model_len, ahead)
        self.scheduler = Scheduler(
            target.new_pool(self.memory.num_blocks if num_kv_blocks is None else num_kv_blocks),
            max_num_seqs=options.num_seqs,
            max_rows=options.max_num_batched_tokens or MAX_ROWS,
            caching=options.enable_prefix_caching,
        )
        self._requests: dict[str, Request] = {}
        self._num_requests = 0
        self._aborted: dict[str, None] = {}
        self._ready: list[tuple[Request, RequestOutput]] = []
        self.num_aborted = 0  # who waits for a request notices by this number that somebody else aborted it
        self._is_stepping = False
        self.lock = threading.RLock()

    @property
    def drafter(self) -> Drafter | None:
        """The drafter; None for plain decoding."""
        return None if self._drafting is None else self._drafting.drafter

    @property
    def rule(self) -> AcceptanceRule | None:
        """The rule; None for plain decoding. It may be exchanged between steps."""
        return None if self._drafting is None else self._drafting.rule

    @rule.setter
    def rule(self, rule: AcceptanceRule | None) -> None:
        """Exchanges the rule. Does nothing for plain decoding."""
        if self._drafting is not None and rule is not None:
            self._drafting.rule = rule

    def add_request(
        self,
        request_id: str | None,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> Request:
        """Checks a request and puts it into the queue. Later steps run it.

        Args:
            request_id: name of the request in its outputs; it must differ from those of unfinished requests. None is a
                running number.
            prompt: a text, token ids, or a dictionary with ``prompt_token_ids`` and optionally ``prompt`` and ``cache_salt``.
                Requests share prefixes only with requests of the same salt.
            priority: a request of smaller priority is served first.
            arrival_time: when the request arrived, in seconds of `time.time`; None is now. Only `max_wait_s` depends on it.
                Requests of equal priority are served in the order in which they are added.

        Raises:
            ValueError: the prompt is empty, too long or contains unknown ids, the parameters need a tokenizer, the blocks could
                never hold the request, or the name is in use.
            QueueFullError: more than `max_waiting` outputs would wait for a place.
        """
        given = self.checked(prompt, params)
        with self.lock:
            free = (name for name in map(str, count(self._num_requests)) if name not in self._requests)
            name = next(free) if request_id is None else request_id
            if name in self._requests:
                raise UserError(f"request {name!r} is still running", "give every request a name of its own")
            waiting, most = len(self.scheduler.waiting), self.options.max_waiting
            places = self.options.num_seqs - len(self.scheduler.running)  # the next step fills them
            if most is not None and waiting + params.n - places > most:
                raise QueueFullError(f"{waiting} outputs wait, and max_waiting is {most}: try again later")
            seed = hash_seed(self._seed, self._num_requests) if params.seed is None else used_seed(params.seed)
            waited = 0.0 if arrival_time is None else max(0.0, time.time() - arrival_time)
            about = {"priority": priority, "arrived_s": time.monotonic() - waited, "salt": given["cache_salt"]}
            request = Request(name, self._num_requests, given["prompt"], given["prompt_token_ids"], params, seed, **about)
            request.sequences = [self._sequence(request, i, hash_seed(seed, i)) for i in range(params.n)]
            self._require_blocks(request)
            self._num_requests += 1
            try:
                self._requests[name] = request
                for sequence in request.sequences:
                    self.scheduler.add(sequence)
            except BaseException:  # an interrupt: otherwise a part of it would wait for ever
                self.abort_request(name)
                raise
            return request

    def add_requests(self, pairs: Items[tuple[Any, SamplingParams]], added: list[Request]) -> None:
        """Adds requests as `add_request` does, all or none of them. Appends each to `added`, which an interrupt keeps."""
        with self.lock:
            first = self._num_requests
            try:
                for prompt, params in pairs:
                    added.append(self.add_request(None, prompt, params))
            except BaseException:
                self.abort_request([name for name, request in self._requests.items() if request.number >= first])
                raise

    def step(self) -> list[RequestOutput]:
        """Runs one step. Returns the requests with news, see `SamplingParams.output_kind`.

        If a call is interrupted after its step, as by Ctrl-C, the next call returns the news of this step and runs none.
        """
        with self.lock, one_thread if self.target.has_own_threads else nullcontext():
            self._is_stepping = True
            try:
                if not self._ready:
                    if self.options.max_wait_s is not None:
                        self._expire(self.options.max_wait_s)
                    step(self.target, self.scheduler, self._layers)
                    self._ready = self._outputs()
            finally:
                self._is_stepping = False
                if self._aborted:
                    self.abort_request(())
            return self._given()

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests and releases what they hold. Names of requests that have ended are ignored.

        A call from within a step takes effect at its end: the garbage collector may close an abandoned stream anywhere.
        """
        with self.lock:
            self._aborted |= dict.fromkeys([request_ids] if isinstance(request_ids, str) else request_ids)
            try:
                while self._aborted and not self._is_stepping:
                    for name in [*self._aborted]:
                        self._abort(name)
            except BaseException:  # an interrupt: the rest is aborted later
                if not self._is_stepping:
                    self.scheduler.put_back()
                raise

    def _abort(self, name: str) -> None:
        request = self._requests.get(name)
        for sequence in request.sequences if request else ():
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self.scheduler.release(sequence)
        self.num_aborted += self._requests.pop(name, None) is not None
        self._ready = [pair for pair in self._ready if pair[0] is not request]
        self._aborted.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._requests or self._ready)

    def get_num_unfinished_requests(self) -> int:
        """Number of requests that wait or run."""
        return len(self._requests)

    @property
    def _layers(self) -> tuple[int, ...]:
        """The target's layers whose features a drafter needs."""
        return tuple({layer: None for way in self._draftings for layer in way.drafter.feature_layers})

    def _outputs(self) -> list[tuple[Request, RequestOutput]]:
        """Returns the requests with news. Nothing counts as given out yet."""
        found = []
        for request in {sequence.request: None for sequence in self.scheduler.unreported}:
            if self._requests.get(request.request_id) is not request:
                continue  # aborted
            if request.is_finished or request.sampling.output_kind is not RequestOutputKind.FINAL_ONLY:
                found.append((request, request.output()))
        return found

    def _given(self) -> list[RequestOutput]:
        """Returns the outputs that are ready. If it is interrupted, it may be called again."""
        for request, output in self._ready:
            request.tell()
            if output.finished and self._requests.get(request.request_id) is request:
                del self._requests[request.request_id]
        self.scheduler.unreported.clear()
        ready, self._ready = self._ready, []
        return [output for _, output in ready]

    def _expire(self, limit: float) -> None:
        """Ends outputs that have waited longer than `limit` seconds for their first step."""
        latest = time.monotonic() - limit
        for sequence in [late for late in self.scheduler.waiting if not late.has_run and late.request.arrived_s < latest]:
            self.scheduler.unreported.append(sequence)
            sequence.fail(UserError(f"the request waited longer than max_wait_s ({limit:g} s)", "try again later"))
            self.scheduler.release(sequence)

    def checked(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        """Returns a prompt with its token ids. Raises as `add_request` does, but adds nothing."""
        text, ids = encode(prompt, self.tokenizer)
        check_request(ids, params, self.target, self.tokenizer, self.max_model_len)
        return {"prompt": text, "prompt_token_ids": ids, "cache_salt": salt_of(prompt)}

    def _sequence(self, request: Request, index: int, seed: int) -> Sequence:
        sampling, num_prompt = request.sampling, len(request.prompt_ids)
        num_left = self.max_model_len - num_prompt
        words = bad_word_ids(self.tokenizer, sampling.bad_words) if sampling.bad_words else []
        drafting, nodes, pace = drafted_by(sampling, self._drafting, self._draftings, reproducible=self.options.reproducible)
        return Sequence(
            request=request,
            index=index,
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
            eos_ids=frozenset() if sampling.ignore_eos else self._eos_ids,
            processors=prefix_processors(sampling, num_prompt, {*self._eos_ids, *(sampling.stop_token_ids or ())}, words),
            tokenizer=self.tokenizer,
            drafting=drafting,
            nodes=nodes,
            pace=pace,
        )

    def _require_blocks(self, request: Request) -> None:
        sequence, count = request.sequences[0], self.scheduler.pool.blocks.count
        needed = self.scheduler.blocks_for(sequence, sequence.max_len)
        if needed > count:
            raise UserError(
                f"the request may take {needed * BLOCK} tokens of keys and values, but there is memory for {count * BLOCK}",
                "lower max_tokens, shorten the prompt, or raise kv_cache_memory_bytes",
            )
