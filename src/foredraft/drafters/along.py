"""Computes the law of a drafter after every token of a text, exactly as it would draft during decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import Budget, Drafter, Expander, Grower, Target, Work
from foredraft.core.draws import Draws
from foredraft.core.law import at_least_float32
from foredraft.core.params import SamplingParams
from foredraft.core.tree import TreeBatch


class Roots:
    """A tree policy that computes the law after each root and drafts nothing.

    Attributes:
        logits: draft logits of the last call; None if the context left no space to draft.
    """

    def __init__(self) -> None:
        self.logits: Float[Tensor, "b v"] | None = None

    def grow(self, drafter: Expander, work: Work) -> TreeBatch:
        """See `foredraft.core.contracts.Grower`."""
        batch = TreeBatch.roots(work.roots)
        self.logits = drafter.expand(work.states, batch, batch.offsets[:-1]) if all(map(min, work.budgets)) else None
        return batch


class AskedAlong:
    """A drafter that is evaluated along texts.

    Args:
        build: builds the drafter with a given tree policy.

    Attributes:
        needs_features: whether the law after a token depends on the target's state at that token. After drafted tokens, the
            law of such a drafter then also depends on where the draft began.
    """

    def __init__(self, target: Target, build: Callable[[Grower], Drafter]):
        self._target, self._roots = target, Roots()
        self._drafter = build(self._roots)
        self.needs_features = bool(self._drafter.feature_layers)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], first: int) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n v"]]:
        """Returns target and draft logits after each token of a text from index `first` on, in float32 or float64.

        All draft logits are equal if the drafter cannot draft. This happens to a drafter over features before the target has
        run a token, and to every drafter when its context is full.
        """
        pool, layers = self._target.new_pool(num_blocks(len(token_ids))), self._drafter.feature_layers
        [chunks] = prefill(self._target, [pool.allocate()], [token_ids], scored=True, feature_layers=layers)
        wanted = at_least_float32(torch.cat([scores.logits for scores in chunks])[first:])
        parts = [scores.features for scores in chunks if scores.features is not None]
        features, drafted = torch.cat(parts) if parts else None, torch.zeros_like(wanted)
        state = self._drafter.start(token_ids[: first + 1], None if features is None or not first else features[:first])
        for row, token in enumerate([*token_ids[first + 1 :], None]):
            self._drafter.propose(Work([state], [token_ids[first + row]], [Budget(1, 1)], [SamplingParams()], [Draws(0)]))
            if self._roots.logits is not None:
                drafted[row] = self._roots.logits[0]
            if token is not None:
                at = slice(first + row, first + row + 1)
                self._drafter.observe(state, [token], None if features is None else features[at], ())
        self._drafter.finish(state)
        return wanted, drafted
