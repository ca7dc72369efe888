"""Speculative against plain greedy output: where they part, and whether rounding alone explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foredraft.cache import prefill
from foredraft.llm import LLM
from foredraft.tree import TreeBatch


@dataclass(frozen=True)
class Divergence:
    """Where two outputs part: what each chose, how far apart the two logits are, and how far rounding moves a logit."""

    position: int
    plain_token: int
    drafted_token: int
    margin: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.margin <= self.rounding


def num_identical(plain: Sequence[int], drafted: Sequence[int]) -> int:
    """Tokens before the first difference."""
    both = zip(plain, drafted, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(plain), len(drafted)))


@torch.inference_mode()
def divergence(llm: LLM, prompt: Sequence[int], plain: Sequence[int], drafted: Sequence[int]) -> Divergence | None:
    """The first difference of two outputs; None where there is none.

    The rounding is measured on the text before it, scored in one forward and token by token: the largest change of either of
    the two leading logits at any of its positions. An output that ends where the other goes on differs without a margin.
    """
    at = num_identical(plain, drafted)
    if at == len(plain) == len(drafted):
        return None
    if at in (len(plain), len(drafted)):
        ends = [ids[at] if at < len(ids) else -1 for ids in (plain, drafted)]
        return Divergence(at, ends[0], ends[1], float("inf"), 0.0)
    ids, first = [*prompt, *plain[:at]], len(prompt) - 1
    pool = llm.target.new_pool(2, llm.max_model_len)
    at_once, stepwise = pool.allocate(), pool.allocate()
    chain = llm.target.forward(TreeBatch.chains([ids]), [at_once]).logits[first:]
    prefill(llm.target, pool, [stepwise], [ids[:first]])
    rows = []
    for token in ids[first:]:
        rows.append(llm.target.forward(TreeBatch.chains([[token]]), [stepwise]).logits[0].clone())
        pool.keep([stepwise], [[]])
    single = torch.stack(rows)
    leading = single.topk(2).indices
    moved = (single.gather(1, leading).double() - chain.gather(1, leading).double()).abs().max()
    tokens = plain[at], drafted[at]
    margin = abs(float(single[-1, tokens[0]]) - float(single[-1, tokens[1]]))
    return Divergence(at, *tokens, margin, float(moved))
