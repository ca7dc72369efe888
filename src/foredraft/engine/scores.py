"""Computes what a step gives one output beside its tokens: the law of the target, log-probabilities, and the step's record."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Verdict
from foredraft.core.law import TargetLaw, at_least_float32
from foredraft.core.metrics import StepRecord
from foredraft.core.outputs import Logprob
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.engine.request import Sequence


def law_of(sequence: Sequence, logits: Float[Tensor, "n v"], tree: DraftTree | None) -> TargetLaw:
    """Returns the target's law on the tree of a sequence. Without a tree, the law at the root alone."""
    if tree is None and sequence.processors:
        tree = TreeBatch.roots(sequence.token_ids[-1:])[0]
    return TargetLaw(logits, sequence.sampling, tree, sequence.token_ids, sequence.processors)


def record(
    sequence: Sequence, tree: DraftTree | None, verdict: Verdict, count: int, *, budget: int = 0, **seconds: float
) -> StepRecord:
    """Returns the record of one step of one output.

    Args:
        tree: the tree of the step; None for plain decoding.
        count: number of tokens of the step that reached the output.
        budget: the largest number of nodes that the tree was allowed.
        seconds: the times of the step, see `StepRecord`.
    """
    ended_early, failed = count <= len(verdict.path), sequence.finish_reason == "error"
    accepted = min(count, len(verdict.path))
    return StepRecord(
        num_draft_tokens=0 if tree is None else tree.num_nodes - 1,
        num_accepted_tokens=accepted,
        depth=accepted if tree is None or ended_early else int(tree.depths.max()),
        kind="error" if failed else "accepted" if ended_early else verdict.kind,
        branched=tree is not None and any(len(siblings) > 1 for siblings in tree.children),
        tv_bounds=verdict.tv_bounds[:count],
        budget=budget,
        **seconds,
    )


def top_logprobs(logprobs: Float[Tensor, " v"], token: int, k: int, tokenizer: Any = None) -> dict[int, Logprob]:
    """Returns the `k` most likely tokens (-1: all) and `token` itself, in the form that vLLM returns."""
    best = logprobs.topk(k if k >= 0 else len(logprobs)).indices.tolist()
    own_rank = int((logprobs > logprobs[token]).sum()) + 1
    ranks = {token: own_rank} | {token_id: rank for rank, token_id in enumerate(best, start=1) if token_id != token}
    decode = (lambda ids: tokenizer.decode(ids)) if tokenizer is not None else lambda ids: None
    return {token_id: Logprob(float(logprobs[token_id]), rank, decode([token_id])) for token_id, rank in ranks.items()}


def score_prompt(sequence: Sequence, logits: Float[Tensor, "n v"], first: int) -> None:
    """Adds the log-probabilities of the prompt's tokens from ``first + 1`` on. Row i decides token ``first + i + 1``."""
    assert sequence.prompt_logprobs is not None
    rows, k = at_least_float32(logits).log_softmax(-1), sequence.sampling.prompt_logprobs or 0
    tokens = sequence.token_ids[first + 1 : sequence.num_prompt]
    sequence.prompt_logprobs += [
        top_logprobs(row, token, k, sequence.tokenizer) for row, token in zip(rows, tokens, strict=False)
    ]
