"""The decoding loops: plain decoding and speculative decoding, each around one forward of the target per step.

propose -> Target.forward -> law -> rule -> cache.keep -> observe -> cut at a stop -> StepRecord
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from time import perf_counter

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.layout import rows_of
from foredraft.cache.pool import prefill
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Pool, Target, Verdict, Work
from foredraft.core.law import at_least_float32
from foredraft.core.tree import TreeBatch
from foredraft.engine.continuation import Continuation, law_of, record, settle, top_logprobs
from foredraft.engine.one_thread import one_thread

Steps = Generator[list[Continuation], None, None]
"""Yields, after every step of a batch, the outputs that took part in it."""


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
        features = continuation.prompt_features
        continuation.draft_state = drafter.start(continuation.token_ids, features, continuation.cache)
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
        with one_thread if target.has_own_threads else nullcontext():
            running = next(steps, None)
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
        found = prefill(target, caches, prompts, scored=scored, feature_layers=feature_layers)
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


def part(batch: TreeBatch, b: int) -> slice:
    """Returns the slice of the packed nodes that belong to tree b."""
    return slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))


class Clock:
    """Measures the seconds between laps."""

    def __init__(self) -> None:
        self._last = perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap, and starts a new lap."""
        now = perf_counter()
        self._last, before = now, self._last
        return now - before


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
