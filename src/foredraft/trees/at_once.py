"""Grows chains in one call of the drafter. The policy `chain` grows the same chains pass by pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from foredraft.core.chains import ChainWish, DrawChains
from foredraft.core.contracts import Expander, Work
from foredraft.core.law import limits_of
from foredraft.core.shape import Drawn
from foredraft.core.tree import TreeBatch
from foredraft.trees.base import PolicyOptions, draft_sampling


def at_once(options: PolicyOptions, drafter: Expander, work: Work) -> TreeBatch | None:
    """Draws the chains of all requests in one call of the drafter. They are the trees that the policy `chain` grows.

    Returns None if the drafter cannot do this, or if the chains differ in depth or in their laws.
    """
    draw: DrawChains | None = getattr(drafter, "draw_chains", None)
    if draw is None:
        return None
    kinds = [
        (min(budget), options.samples(params), limits_of(draft_sampling(params, options.draft_temperature)))
        for budget, params in zip(work.budgets, work.sampling, strict=True)
    ]
    depth, is_sampled, limits = kinds[0]
    if any(kind != kinds[0] for kind in kinds[1:]):
        return None
    keys = [("draft", (0,) * at, 0) for at in range(depth)]
    uniforms = (lambda: [[draws.uniform(key) for key in keys] for draws in work.draws]) if is_sampled else None
    found = draw(work, ChainWish(depth, options.cut(drafter.vocab_size), limits, uniforms)) if depth else None
    if found is None:
        return None
    batch = TreeBatch.chains([[root, *tokens] for root, tokens in zip(work.roots, found.tokens, strict=True)])
    if not is_sampled:
        return batch
    parents = np.arange(len(batch.tokens)) % (depth + 1) < depth
    batch.drawn[parents], batch.draft_row[parents] = Drawn.IID, np.arange(depth * len(batch))
    return replace(batch, draft_probs=found.laws, draft_ids=found.token_ids, vocab_size=drafter.vocab_size)
