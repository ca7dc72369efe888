"""Compares speculative with plain greedy output. Finds the first difference, and whether rounding explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.tree import TreeBatch
from foredraft.llm import LLM


@dataclass(frozen=True)
class Divergence:
    """The first difference of two outputs.

    Attributes:
        position: index of the token in the output.
        plain_token: token of the plain output, -1 if it has ended.
        drafted_token: token of the speculative output, -1 if it has ended.
        margin: difference of the logits of the two tokens. Infinite if one output has ended.
        rounding: largest change of a leading logit by rounding.
    """

    position: int
    plain_token: int
    drafted_token: int
    margin: float
    rounding: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone explains the difference."""
        return self.margin <= self.rounding


def num_identical(plain: Sequence[int], drafted: Sequence[int]) -> int:
    """Returns the number of tokens before the first difference."""
    both = zip(plain, drafted, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(plain), len(drafted)))


@torch.inference_mode()
def divergence(llm: LLM, prompt: Sequence[int], plain: Sequence[int], drafted: Sequence[int]) -> Divergence | None:
    """Returns the first difference of two outputs, or None if they are equal.

    Rounding is measured on the text before the difference. The text is scored in one forward, and again token by token. The
    rounding is the largest change of the two leading logits at any output position. If one output ends before the other, the
    margin is infinite.

    Args:
        llm: the model.
        prompt: token ids of the prompt.
        plain: token ids of the plain output.
        drafted: token ids of the speculative output.
    """
    at = num_identical(plain, drafted)
    if at == len(plain) == len(drafted):
        return None
    if at in (len(plain), len(drafted)):
        ends = [ids[at] if at < len(ids) else -1 for ids in (plain, drafted)]
        return Divergence(at, ends[0], ends[1], float("inf"), 0.0)
    ids, first = [*prompt, *plain[:at]], len(prompt) - 1
    pool = llm.target.new_pool(num_blocks(llm.max_model_len, 2))
    at_once, stepwise = pool.allocate(), pool.allocate()
    chain = llm.target.forward(TreeBatch.chains([ids]), [at_once]).logits[first:]
    prefill(llm.target, [stepwise], [ids[:first]])
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
