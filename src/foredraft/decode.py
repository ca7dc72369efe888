"""The loop: plain decoding and speculative decoding, one screen each, around one forward of the target.

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

from foredraft.cache import prefill, rows_of
from foredraft.draws import Draws
from foredraft.metrics import StepRecord
from foredraft.params import SamplingParams
from foredraft.protocols import AcceptanceRule, Budget, Drafter, Pool, Target, Verdict
from foredraft.sampling import PrefixProcessor, TargetLaw, at_least_float32
from foredraft.text import TextStream
from foredraft.tree import DraftTree, TreeBatch

Steps = Generator[list["Continuation"], None, None]
"""After every step of a batch, the outputs that took part."""


class Logprob(NamedTuple):
    """Log-probability (natural) of a token under the model itself, its rank (1 is the likeliest) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(eq=False)
class Continuation:
    """One output while it is generated.

    Attributes:
        token_ids: prompt and output so far; the last one is the root of the next tree.
        num_prompt: length of the prompt.
        max_len: most tokens that prompt and output may have.
        draws: the output's random numbers.
        eos_ids: ends of sequence (empty where they are ignored).
        processors: what of `sampling` depends on the prefix.
        max_nodes: its trees have at most so many nodes below the root, whatever the budget allows.
        text: the output's text so far.
        kinds: per output token ``accepted``, ``recovered``, ``bonus``, or ``plain`` where nothing was drafted.
        cache, prompt_features: of the target; kept from an output with the same prompt where there was one before.
        finish_reason: ``stop``, ``length`` or ``error``; None while it runs.
        error: why it ended with ``error``.
        last_tree, last_path: of the latest step, to be shown.
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
        """Equal for outputs that can share what was computed of their prompt."""
        return self.sampling.prompt_logprobs, *self.token_ids[: self.num_prompt]

    @property
    def output_ids(self) -> list[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt :]

    @property
    def room(self) -> int:
        """Tokens that may still be generated."""
        return self.max_len - len(self.token_ids)

    def limit(self, budget: Budget) -> Budget:
        """The part of a budget that this output can use."""
        nodes = budget.nodes if self.max_nodes is None else min(budget.nodes, self.max_nodes)
        return Budget(nodes, max(0, min(budget.depth, nodes, self.room - 1)))


def autoregressive(target: Target, pool: Pool, continuations: Sequence[Continuation]) -> Steps:
    """Plain decoding: one forward a token. Yields those that took part after every step; see `speculative`."""
    start(target, pool, continuations)
    while running := [one for one in continuations if one.finish_reason is None]:
        decode_one(target, pool, running)
        yield running


def decode_one(target: Target, pool: Pool, running: Sequence[Continuation]) -> None:
    """One step of plain decoding."""
    clock = Clock()
    scores = target.forward(TreeBatch.chains([one.token_ids[-1:] for one in running]), [one.cache for one in running])
    verify_s = clock.lap()
    verdicts = []
    for b, one in enumerate(running):
        law = law_of(one, scores.logits[b : b + 1], None)
        draws = one.draws.at(len(one.token_ids))
        token = law.token(0) if law.is_certain else draws.categorical(law.row(0), ("next", (), 0))
        verdicts.append((law, Verdict([], token, "plain")))
    rule_s = clock.lap()
    pool.keep([one.cache for one in running], [[]] * len(running))
    cache_s = clock.lap()
    for one, (law, verdict) in zip(running, verdicts, strict=True):
        count = settle(one, law, [verdict.next_token], verdict)
        one.records.append(record(one, None, verdict, count, verify_s=verify_s, rule_s=rule_s, cache_s=cache_s))


def speculative(
    target: Target,
    pool: Pool,
    continuations: Sequence[Continuation],
    drafter: Drafter,
    rule: AcceptanceRule,
    budget: Budget,
) -> Steps:
    """Speculative decoding of a batch with ragged acceptance. Yields those that took part after every step.

    Guarantee: with an exact rule every output has the law of plain decoding, whatever the drafter proposes.
    Source: Leviathan et al. 2023 (arXiv 2211.17192); trees: SpecInfer (arXiv 2305.09781).

    Args:
        continuations: new ones; they are changed in place until each has a `finish_reason`.
        budget: largest tree; cut where the context or `max_tokens` ends earlier.
    """
    start(target, pool, continuations, drafter.feature_layers)
    for one in continuations:
        one.draft_state = drafter.start(one.token_ids, one.prompt_features)
    while running := [one for one in continuations if one.finish_reason is None]:
        draft_and_verify(target, pool, running, drafter, rule, budget)
        yield running


def draft_and_verify(
    target: Target, pool: Pool, running: Sequence[Continuation], drafter: Drafter, rule: AcceptanceRule, budget: Budget
) -> None:
    """One step of speculative decoding; its logits do not outlive it."""
    clock, caches = Clock(), [one.cache for one in running]
    draws = [one.draws.at(len(one.token_ids)) for one in running]
    budgets = [one.limit(budget) for one in running]
    batch = drafter.propose([one.draft_state for one in running], budgets, [one.sampling for one in running], draws)
    draft_s = clock.lap()
    scores = target.forward(batch, caches, feature_layers=drafter.feature_layers)
    verify_s = clock.lap()
    trees = [batch[b] for b in range(len(running))]
    laws = [law_of(one, scores.logits[part(batch, b)], trees[b]) for b, one in enumerate(running)]
    verdicts = [rule(*arguments) for arguments in zip(trees, laws, draws, strict=True)]
    rule_s = clock.lap()
    pool.keep(caches, [verdict.path for verdict in verdicts])
    cache_s = clock.lap()
    for b, (one, tree, law, verdict) in enumerate(zip(running, trees, laws, verdicts, strict=True)):
        tokens = [*tree.tokens[verdict.path].tolist(), verdict.next_token]
        features = None if scores.features is None else rows_of(scores.features[part(batch, b)], [0, *verdict.path])
        drafter.observe(one.draft_state, tokens, features, verdict.path)
        count = settle(one, law, tokens, verdict)
        one.last_tree, one.last_path = tree, verdict.path[:count]
        seconds = {"draft_s": draft_s, "verify_s": verify_s, "rule_s": rule_s, "cache_s": cache_s}
        one.records.append(record(one, tree, verdict, count, **seconds))


def paced(target: Target, steps: Steps) -> Steps:
    """`steps`, with torch on one thread while a target with threads of its own is at work.

    Its threads and torch's would wait for each other's processors; what torch does between forwards is small.
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
    """Gives every continuation a cache with its prompt except the root, and the features of these tokens if layers are named.

    Equal prompts are run once; one that comes with a cache was run before.
    """
    first: dict[tuple[int | None, ...], Continuation] = {}
    for one in continuations:
        first.setdefault(one.prompt_key, one)
    new = [one for one in first.values() if one.cache is None or (feature_layers and one.prompt_features is None)]
    for one in new:
        one.cache = pool.allocate() if one.cache is None else one.cache
        one.cache.truncate(0)
    for scored in (False, True):  # logits of prompts only where they are asked for
        group = [one for one in new if (one.sampling.prompt_logprobs is not None) == scored]
        prompts = [one.token_ids[:-1] for one in group]
        caches = [one.cache for one in group]
        found = prefill(target, pool, caches, prompts, scored=scored, feature_layers=feature_layers)
        for one, chunks in zip(group, found, strict=True):
            features = [scores.features for scores in chunks if scores.features is not None]
            one.prompt_features = torch.cat(features) if features else None
            if scored:
                _score_prompt(one, [scores.logits for scores in chunks])
    for one in continuations:
        leader = first[one.prompt_key]
        if leader is not one:
            one.cache = pool.copy(leader.cache)
            one.prompt_features, one.prompt_logprobs = leader.prompt_features, leader.prompt_logprobs


def hand_over(wave: Sequence[Continuation], next_wave: Sequence[Continuation]) -> None:
    """Gives the caches of prompts that come again to the first output of the next wave that has them."""
    heirs: dict[tuple[int | None, ...], Continuation] = {}
    for one in next_wave:
        heirs.setdefault(one.prompt_key, one)
    for one in wave:
        heir = heirs.pop(one.prompt_key, None)
        if heir is not None:
            one.cache.truncate(one.num_prompt - 1)
            heir.cache, one.cache = one.cache, None
            heir.prompt_features, heir.prompt_logprobs = one.prompt_features, one.prompt_logprobs


def settle(one: Continuation, law: TargetLaw, tokens: Sequence[int], verdict: Verdict) -> int:
    """Commits the tokens of a step one by one, up to the first that ends the output. Returns how many reached the output.

    An output also ends before a token that no law could give; see `TargetLaw`.
    """
    nodes = [0, *verdict.path]  # the token after nodes[j] is tokens[j]
    for count, (node, token) in enumerate(zip(nodes, tokens, strict=True), start=1):
        failure = law.failure(node)
        if failure is not None:
            one.finish_reason, one.error = "error", f"no token can follow token {len(one.token_ids)} of the text: {failure}"
            one.text.flush()
            return count - 1
        one.token_ids.append(token)
        one.kinds.append("accepted" if node != nodes[-1] else verdict.kind)
        if one.sampling.logprobs is not None:
            one.logprobs.append(top_logprobs(law.raw_logprobs(node), token, one.sampling.logprobs, one.tokenizer))
            one.cumulative_logprob += one.logprobs[-1][token].logprob
        _end(one, token)
        if one.finish_reason is not None:
            return count
    return len(tokens)


def _end(one: Continuation, token: int) -> None:
    """Sets `finish_reason` and `stop_reason` if `token` ends the output."""
    num_output = len(one.token_ids) - one.num_prompt
    is_eos = token in one.eos_ids
    if is_eos or token in (one.sampling.stop_token_ids or ()):
        one.finish_reason, one.stop_reason = "stop", None if is_eos else token
        if one.sampling.include_stop_str_in_output:
            one.text.push(token, may_stop=False)
    else:
        stop = one.text.push(token, may_stop=num_output > one.sampling.min_tokens)
        if stop is not None:
            one.finish_reason, one.stop_reason = "stop", stop
            return
        if one.room <= 0:
            one.finish_reason = "length"
    if one.finish_reason is not None:
        one.text.flush()


def law_of(one: Continuation, logits: Float[Tensor, "n v"], tree: DraftTree | None) -> TargetLaw:
    """The target's law on a continuation's tree (None: the root alone)."""
    if tree is None and one.processors:
        tree = TreeBatch.chains([one.token_ids[-1:]])[0]
    return TargetLaw(logits, one.sampling, tree, one.token_ids, one.processors)


def part(batch: TreeBatch, b: int) -> slice:
    """The packed nodes of tree b."""
    return slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))


def record(one: Continuation, tree: DraftTree | None, verdict: Verdict, count: int, **seconds: float) -> StepRecord:
    """The record of one request's step (without a tree, of plain decoding), of whose tokens `count` reached the output."""
    ended_early, failed = count <= len(verdict.path), one.finish_reason == "error"
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
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = perf_counter()
        self._last, before = now, self._last
        return now - before


def top_logprobs(logprobs: Float[Tensor, " v"], token: int, k: int, tokenizer: Any = None) -> dict[int, Logprob]:
    """The `k` likeliest tokens (-1: all) and `token` itself, as vLLM returns them."""
    best = logprobs.topk(k if k >= 0 else len(logprobs)).indices.tolist()
    own_rank = int((logprobs > logprobs[token]).sum()) + 1
    ranks = {token: own_rank} | {one: rank for rank, one in enumerate(best, start=1) if one != token}
    decode = (lambda ids: tokenizer.decode(ids)) if tokenizer is not None else lambda ids: None
    return {one: Logprob(float(logprobs[one]), rank, decode([one])) for one, rank in ranks.items()}


def _score_prompt(one: Continuation, chunks: Sequence[Float[Tensor, "_ v"]]) -> None:
    one.prompt_logprobs = [None]
    if not chunks:
        return
    logits = torch.cat(list(chunks))
    rows = at_least_float32(logits).log_softmax(-1)
    k = one.sampling.prompt_logprobs or 0
    one.prompt_logprobs += [
        top_logprobs(row, token, k, one.tokenizer) for row, token in zip(rows, one.token_ids[1 : one.num_prompt], strict=True)
    ]
