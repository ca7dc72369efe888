"""One output while it is generated: its tokens so far, what a step adds to it, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Budget, Verdict
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.law import PrefixProcessor, TargetLaw
from foredraft.core.metrics import StepRecord
from foredraft.core.params import SamplingParams
from foredraft.core.text import TextStream
from foredraft.core.tree import DraftTree, TreeBatch


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
    error: UserError | None = None
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


def settle(continuation: Continuation, law: TargetLaw, tokens: Sequence[int], verdict: Verdict) -> int:
    """Commits the tokens of a step, up to the first token that ends the output. Returns the number of committed tokens.

    An output also ends before a token whose law does not exist; see `TargetLaw`.
    """
    nodes = [0, *verdict.path]  # the token after nodes[j] is tokens[j]
    for count, (node, token) in enumerate(zip(nodes, tokens, strict=True), start=1):
        failure = law.failure(node)
        if failure is not None:
            problem = f"no token can follow token {len(continuation.token_ids)} of the text: {failure.message}"
            continuation.finish_reason, continuation.error = "error", UserError(problem, failure.hint)
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


def top_logprobs(logprobs: Float[Tensor, " v"], token: int, k: int, tokenizer: Any = None) -> dict[int, Logprob]:
    """Returns the `k` most likely tokens (-1: all) and `token` itself, in the form that vLLM returns."""
    best = logprobs.topk(k if k >= 0 else len(logprobs)).indices.tolist()
    own_rank = int((logprobs > logprobs[token]).sum()) + 1
    ranks = {token: own_rank} | {token_id: rank for rank, token_id in enumerate(best, start=1) if token_id != token}
    decode = (lambda ids: tokenizer.decode(ids)) if tokenizer is not None else lambda ids: None
    return {token_id: Logprob(float(logprobs[token_id]), rank, decode([token_id])) for token_id, rank in ranks.items()}
