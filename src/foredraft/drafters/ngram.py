"""Prompt lookup: what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from foredraft.drafters import Setting
from foredraft.drafters.options import check_options
from foredraft.draws import Draws
from foredraft.params import SamplingParams
from foredraft.protocols import Budget
from foredraft.tree import TreeBatch


@dataclass
class NgramState:
    """Text so far, and where each n-gram in it (except the last ones) ended most recently."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramDrafter:
    """Drafts the continuation of the latest earlier occurrence of the longest matching n-gram, as a chain.

    Args:
        prompt_lookup_max, prompt_lookup_min: longest and shortest n-gram that is looked up.

    Source: prompt lookup decoding (A. Saxena, 2023); vLLM's method ``ngram``, whose names these are.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, prompt_lookup_max: int = 4, prompt_lookup_min: int = 1):
        check_options(prompt_lookup_max=prompt_lookup_max, prompt_lookup_min=prompt_lookup_min)
        self._sizes = range(prompt_lookup_max, prompt_lookup_min - 1, -1)

    @classmethod
    def build(cls, setting: Setting, **options: int) -> NgramDrafter:
        """The drafter of a speculative config."""
        return cls(**options)

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> NgramState:
        """A new request."""
        state = NgramState()
        self.observe(state, tokens, None, ())
        return state

    def finish(self, state: NgramState) -> None:
        """Nothing is held."""

    def propose(
        self,
        states: Sequence[NgramState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One chain a request; the root alone where nothing matches."""
        return TreeBatch.chains([self._look_up(s, min(budget)) for s, budget in zip(states, budgets, strict=True)])

    def observe(
        self, state: NgramState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """Adds the new tokens. An n-gram is entered once the token after it is known."""
        for token in tokens:
            end = len(state.tokens)
            for size in self._sizes:
                if size <= end:
                    state.ends[tuple(state.tokens[end - size :])] = end
            state.tokens.append(token)

    def _look_up(self, state: NgramState, length: int) -> list[int]:
        for size in self._sizes:
            end = state.ends.get(tuple(state.tokens[-size:]))
            if end is not None and size <= len(state.tokens):
                return [state.tokens[-1], *state.tokens[end : end + length]]
        return [state.tokens[-1]]
