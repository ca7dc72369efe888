"""The decoding loops: plain decoding and speculative decoding, each around one forward of the target per step.

propose -> Target.forward -> law -> rule -> cache.keep -> observe -> cut at a stop -> StepRecord
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import rows_of
from foredraft.cache.pool import prefill
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Pool, Target, Verdict, Work
from foredraft.core.draws import Draws
from foredraft.core.law import PrefixProcessor, TargetLaw, at_least_float32
from foredraft.core.metrics import StepRecord
from foredraft.core.params import SamplingParams
from foredraft.core.text import TextStream
from foredraft.core.tree import DraftTree, TreeBatch

Steps = Generator[list["Continuation"], None, None]
"""Yields, after every step of a batch, the outputs that took part in it."""


class Logprob(NamedTuple):
    """Natural log-probability of a token under the model, its rank (1 is the most likely token) and its text.

    The probability is that of the raw logits, before sampling parameters are applied.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(eq=False)
class Continuation:
    """One output while it is generated.

    Attributes:
        token_ids: prompt and output so far. The last token is the root of the next tree.
        num_prompt: number of prompt tokens.
        max_len: maximum number of tokens of prompt plus output.
        draws: the random numbers of the output.
        eos_ids: end-of-sequence tokens; empty if they are ignored.
        processors: the parts of `sampling` that depend on the prefix.
        max_nodes: maximum number of nodes below the root of its trees, within the budget; None sets no such limit.
        text: the text of the output so far.
        kinds: per output token ``accepted``, ``recovered``, ``bonus``, or ``plain`` if nothing was drafted.
        cache: the target's cache. An earlier output with the same prompt may hand it over.
        prompt_features: the target's features of the prompt, handed over in the same way.
        finish_reason: ``stop``, ``length`` or ``error``; None while the output runs.
        error: why the output ended with ``error``.
        last_tree: the tree of the latest step.
        last_path: the accepted nodes of `last_tree`.
    """

    token_ids: list[int]
    num_prompt: int
    max_len: int
    sampling: SamplingParams
    draws: Draws
    text: TextStream
    eos_ids: frozenset[int] = frozenset()
    processors: Sequence[PrefixProcessor] = ()
    tokenizer: Any = None
    max_nodes: int | None = None
    cache: Any = None
    prompt_features: Float[Tensor, "m d"] | None = None
    draft_state: Any = None
    records: list[StepRecord] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    last_tree: DraftTree | None = None
    last_path: list[int] = field(default_factory=list)

    @property
    def prompt_key(self) -> tuple[int | None, ...]:
        """A key that is equal for outputs that can share the computation of their prompt."""
        return self.sampling.prompt_logprobs, *self.token_ids[: self.num_prompt]

    @property
    def output_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt :]

    @property
    def room(self) -> int:
        """Number of tokens that may still be generated."""
        return self.max_len - len(self.token_ids)

    def limit(self, budget: Budget) -> Budget:
        """Returns the part of a budget that this output can use."""
        nodes = budget.nodes if self.max_nodes is None else min(budget.nodes, self.max_nodes)
        return Budget(nodes, max(0, min(budget.depth, nodes, self.room - 1)))


def autoregressive(target: Target, pool: Pool, continuations: Sequence[Continuation]) -> Steps:
    """Plain decoding with one forward per token. Yields as `speculative` does."""
    start(target, pool, continuations)
    while running := [continuation for continuation in continuations if continuation.finish_reason is None]:
        decode_one(target, pool, running)
        yield running


def decode_one(target: Target, pool: Pool, running: Sequence[Continuation]) -> None:
    """Runs one step of plain decoding."""
    clock = Clock()
    scores = target.forward(
        TreeBatch.chains([continuation.token_ids[-1:] for continuation in running]),
        [continuation.cache for continuation in running],
    )
    verify_s = clock.lap()
    verdicts = []
    for b, continuation in enumerate(running):
        law = law_of(continuation, scores.logits[b : b + 1], None)
        draws = continuation.draws.at(len(continuation.token_ids))
        token = law.token(0) if law.is_certain else draws.categorical(law.row(0), ("next", (), 0))
        verdicts.append((law, Verdict([], token, "plain")))
    rule_s = clock.lap()
    pool.keep([continuation.cache for continuation in running], [[]] * len(running))
    cache_s = clock.lap()
    for continuation, (law, verdict) in zip(running, verdicts, strict=True):
        count = settle(continuation, law, [verdict.next_token], verdict)
        continuation.records.append(
            record(continuation, None, verdict, count, verify_s=verify_s, rule_s=rule_s, cache_s=cache_s)
        )


def speculative(
    target: Target,
    pool: Pool,
    continuations: Sequence[Continuation],
    drafter: Drafter,
    rule: AcceptanceRule,
    budget: Budget,
) -> Steps:
    """Speculative decoding of a batch, in which each output accepts its own number of tokens per step.

    After every step, yields the outputs that took part in it.

    Guarantee: with an exact rule, every output has the law of plain decoding, whatever the drafter proposes.
    Source: Leviathan et al. 2023 (arXiv 2211.17192); trees: SpecInfer (arXiv 2305.09781).

    Args:
        continuations: new outputs. They are changed in place until each has a `finish_reason`.
        budget: the largest tree. It is reduced if the context or `max_tokens` ends earlier.
    """
    start(target, pool, continuations, drafter.feature_layers)
    for continuation in continuations:
        continuation.draft_state = drafter.start(continuation.token_ids, continuation.prompt_features)
    while running := [continuation for continuation in continuations if continuation.finish_reason is None]:
        draft_and_verify(target, pool, running, drafter, rule, budget)
        yield running


def draft_and_verify(
    target: Target, pool: Pool, running: Sequence[Continuation], drafter: Drafter, rule: AcceptanceRule, budget: Budget
) -> None:
    """Runs one step of speculative decoding. A function of its own, so that the logits are freed at its end."""
    clock, caches = Clock(), [continuation.cache for continuation in running]
    work = Work(
        states=[continuation.draft_state for continuation in running],
        roots=[continuation.token_ids[-1] for continuation in running],
        budgets=[continuation.limit(budget) for continuation in running],
        sampling=[continuation.sampling for continuation in running],
        draws=[continuation.draws.at(len(continuation.token_ids)) for continuation in running],
    )
    batch = drafter.propose(work)
    draft_s = clock.lap()
    scores = target.forward(batch, caches, feature_layers=drafter.feature_layers)
    verify_s = clock.lap()
    trees = [batch[b] for b in range(len(running))]
    laws = [law_of(continuation, scores.logits[part(batch, b)], trees[b]) for b, continuation in enumerate(running)]
    verdicts = [rule(*arguments) for arguments in zip(trees, laws, work.draws, strict=True)]
    rule_s = clock.lap()
    pool.keep(caches, [verdict.path for verdict in verdicts])
    cache_s = clock.lap()
    for b, (continuation, tree, law, verdict) in enumerate(zip(running, trees, laws, verdicts, strict=True)):
        tokens = [*tree.tokens[verdict.path].tolist(), verdict.next_token]
        features = None if scores.features is None else rows_of(scores.features[part(batch, b)], [0, *verdict.path])
        drafter.observe(continuation.draft_state, tokens, features, verdict.path)
        count = settle(continuation, law, tokens, verdict)
        continuation.last_tree, continuation.last_path = tree, verdict.path[:count]
        seconds = {"draft_s": draft_s, "verify_s": verify_s, "rule_s": rule_s, "cache_s": cache_s}
        continuation.records.append(record(continuation, tree, verdict, count, **seconds))


def paced(target: Target, steps: Steps) -> Steps:
    """Runs `steps` with torch on a single thread if the target has threads of its own.

    Otherwise the two thread pools would compete for the same processors. Torch has little work between forwards.
    """
    while True:
        before = torch.get_num_threads()
        torch.set_num_threads(1 if target.has_own_threads else before)
        try:
            running = next(steps, None)
        finally:
            torch.set_num_threads(before)
        if running is None:
            return
        yield running


def start(target: Target, pool: Pool, continuations: Sequence[Continuation], feature_layers: Sequence[int] = ()) -> None:
    """Fills the cache of every continuation with its prompt, except the root.

    If `feature_layers` names layers, also computes the features of these tokens. Equal prompts are run once. A continuation
    that already has a cache is not run again.
    """
    first: dict[tuple[int | None, ...], Continuation] = {}
    for continuation in continuations:
        first.setdefault(continuation.prompt_key, continuation)
    new = [
        continuation
        for continuation in first.values()
        if continuation.cache is None or (feature_layers and continuation.prompt_features is None)
    ]
    for continuation in new:
        continuation.cache = pool.allocate() if continuation.cache is None else continuation.cache
        continuation.cache.truncate(0)
    for scored in (False, True):  # prompt logits only on request
        group = [continuation for continuation in new if (continuation.sampling.prompt_logprobs is not None) == scored]
        prompts = [continuation.token_ids[:-1] for continuation in group]
        caches = [continuation.cache for continuation in group]
        found = prefill(target, pool, caches, prompts, scored=scored, feature_layers=feature_layers)
        for continuation, chunks in zip(group, found, strict=True):
            features = [scores.features for scores in chunks if scores.features is not None]
            continuation.prompt_features = torch.cat(features) if features else None
            if scored:
                _score_prompt(continuation, [scores.logits for scores in chunks])
    for continuation in continuations:
        leader = first[continuation.prompt_key]
        if leader is not continuation:
            continuation.cache = pool.copy(leader.cache)
            continuation.prompt_features, continuation.prompt_logprobs = leader.prompt_features, leader.prompt_logprobs


def hand_over(wave: Sequence[Continuation], next_wave: Sequence[Continuation]) -> None:
    """Hands the cache of each prompt over to the first output of the next wave that has the same prompt."""
    heirs: dict[tuple[int | None, ...], Continuation] = {}
    for continuation in next_wave:
        heirs.setdefault(continuation.prompt_key, continuation)
    for continuation in wave:
        heir = heirs.pop(continuation.prompt_key, None)
        if heir is not None:
            continuation.cache.truncate(continuation.num_prompt - 1)
            heir.cache, continuation.cache = continuation.cache, None
            heir.prompt_features, heir.prompt_logprobs = continuation.prompt_features, continuation.prompt_logprobs


def settle(continuation: Continuation, law: TargetLaw, tokens: Sequence[int], verdict: Verdict) -> int:
    """Commits the tokens of a step, up to the first token that ends the output. Returns the number of committed tokens.

    An output also ends before a token whose law does not exist; see `TargetLaw`.
    """
    nodes = [0, *verdict.path]  # the token after nodes[j] is tokens[j]
    for count, (node, token) in enumerate(zip(nodes, tokens, strict=True), start=1):
        failure = law.failure(node)
        if failure is not None:
            continuation.finish_reason, continuation.error = (
                "error",
                f"no token can follow token {len(continuation.token_ids)} of the text: {failure}",
            )
            continuation.text.flush()
            return count - 1
        continuation.token_ids.append(token)
        continuation.kinds.append("accepted" if node != nodes[-1] else verdict.kind)
        if continuation.sampling.logprobs is not None:
            continuation.logprobs.append(
                top_logprobs(law.raw_logprobs(node), token, continuation.sampling.logprobs, continuation.tokenizer)
            )
            continuation.cumulative_logprob += continuation.logprobs[-1][token].logprob
        _end(continuation, token)
        if continuation.finish_reason is not None:
            return count
    return len(tokens)


def _end(continuation: Continuation, token: int) -> None:
    """Sets `finish_reason` and `stop_reason` if `token` ends the output."""
    num_output = len(continuation.token_ids) - continuation.num_prompt
    is_eos = token in continuation.eos_ids
    if is_eos or token in (continuation.sampling.stop_token_ids or ()):
        continuation.finish_reason, continuation.stop_reason = "stop", None if is_eos else token
        if continuation.sampling.include_stop_str_in_output:
            continuation.text.push(token, may_stop=False)
    else:
        stop = continuation.text.push(token, may_stop=num_output > continuation.sampling.min_tokens)
        if stop is not None:
            continuation.finish_reason, continuation.stop_reason = "stop", stop
            return
        if continuation.room <= 0:
            continuation.finish_reason = "length"
    if continuation.finish_reason is not None:
        continuation.text.flush()


def law_of(continuation: Continuation, logits: Float[Tensor, "n v"], tree: DraftTree | None) -> TargetLaw:
    """Returns the target's law on the tree of a continuation. Without a tree, the law at the root alone."""
    if tree is None and continuation.processors:
        tree = TreeBatch.chains([continuation.token_ids[-1:]])[0]
    return TargetLaw(logits, continuation.sampling, tree, continuation.token_ids, continuation.processors)


def part(batch: TreeBatch, b: int) -> slice:
    """Returns the slice of the packed nodes that belong to tree b."""
    return slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))


def record(continuation: Continuation, tree: DraftTree | None, verdict: Verdict, count: int, **seconds: float) -> StepRecord:
    """Returns the record of one step of one request.

    Args:
        tree: the tree of the step; None for plain decoding.
        count: number of tokens of the step that reached the output.
        seconds: the times of the step, see `StepRecord`.
    """
    ended_early, failed = count <= len(verdict.path), continuation.finish_reason == "error"
    accepted = min(count, len(verdict.path))
    return StepRecord(
        num_draft_tokens=0 if tree is None else tree.num_nodes - 1,
        num_accepted_tokens=accepted,
        depth=accepted if tree is None or ended_early else int(tree.depths.max()),
        kind="error" if failed else "accepted" if ended_early else verdict.kind,
        branched=tree is not None and any(len(siblings) > 1 for siblings in tree.children),
        tv_bounds=verdict.tv_bounds[:count],
        **seconds,
    )


class Clock:
    """Measures the seconds between laps."""

    def __init__(self) -> None:
        self._last = perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap, and starts a new lap."""
        now = perf_counter()
        self._last, before = now, self._last
        return now - before


def top_logprobs(logprobs: Float[Tensor, " v"], token: int, k: int, tokenizer: Any = None) -> dict[int, Logprob]:
    """Returns the `k` most likely tokens (-1: all) and `token` itself, in the form that vLLM returns."""
    best = logprobs.topk(k if k >= 0 else len(logprobs)).indices.tolist()
    own_rank = int((logprobs > logprobs[token]).sum()) + 1
    ranks = {token: own_rank} | {token_id: rank for rank, token_id in enumerate(best, start=1) if token_id != token}
    decode = (lambda ids: tokenizer.decode(ids)) if tokenizer is not None else lambda ids: None
    return {token_id: Logprob(float(logprobs[token_id]), rank, decode([token_id])) for token_id, rank in ranks.items()}


def _score_prompt(continuation: Continuation, chunks: Sequence[Float[Tensor, "_ v"]]) -> None:
    continuation.prompt_logprobs = [None]
    if not chunks:
        return
    logits = torch.cat(list(chunks))
    rows = at_least_float32(logits).log_softmax(-1)
    k = continuation.sampling.prompt_logprobs or 0
    continuation.prompt_logprobs += [
        top_logprobs(row, token, k, continuation.tokenizer)
        for row, token in zip(rows, continuation.token_ids[1 : continuation.num_prompt], strict=True)
    ]
