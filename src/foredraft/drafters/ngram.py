"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from foredraft.core.contracts import Features, Work
from foredraft.core.setting import Setting
from foredraft.core.tree import TreeBatch
from foredraft.drafters.options import check_options


@dataclass
class NgramState:
    """The text so far, and the most recent end of each n-gram in it. N-grams at the end of the text are not included."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramDrafter:
    """Drafts a chain: the continuation of the latest earlier occurrence of the longest matching n-gram.

    Args:
        prompt_lookup_max, prompt_lookup_min: length of the longest and of the shortest n-gram that is looked up.

    Source: prompt lookup decoding (A. Saxena, 2023). The option names are those of vLLM's method ``ngram``.
    """

    feature_layers: Sequence[int] = ()
    ahead = bytes_per_token = 0

    def __init__(self, prompt_lookup_max: int = 4, prompt_lookup_min: int = 1):
        check_options(prompt_lookup_max=prompt_lookup_max, prompt_lookup_min=prompt_lookup_min)
        self._sizes = range(prompt_lookup_max, prompt_lookup_min - 1, -1)

    @classmethod
    def build(cls, setting: Setting, **options: int) -> NgramDrafter:
        """Builds the drafter of a speculative config."""
        return cls(**options)

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> NgramState:
        """Returns the state of a new request."""
        state = NgramState()
        self.observe(state, tokens, None, ())
        return state

    def written(self, state: NgramState) -> None:
        """Returns None, because the drafter has no keys and values."""

    def finish(self, state: NgramState) -> None:
        """Does nothing, because no resources are held."""

    def propose(self, work: Work) -> TreeBatch:
        """Returns one chain per request; the root alone if no n-gram matches."""
        return TreeBatch.chains([self._look_up(s, min(budget)) for s, budget in zip(work.states, work.budgets, strict=True)])

    def observe(self, state: NgramState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Adds the new tokens. An n-gram is stored once the token after it is known."""
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
