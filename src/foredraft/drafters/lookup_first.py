"""Drafts by lookup if the text repeats itself, and with a fallback drafter otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from foredraft.core.contracts import Drafter, Features, Work
from foredraft.core.tree import TreeBatch
from foredraft.drafters.ngram import NgramDrafter, NgramState
from foredraft.drafters.options import check_options

DEFAULT_MATCH = 4
"""On training prompts, 2, 3 and 4 were the fastest values at temperature 0, and 4 costs no speed at temperature 1."""


class LookupState(NamedTuple):
    """The state of a request in the lookup drafter and in the fallback drafter (`other`)."""

    lookup: NgramState
    other: Any


class LookupFirst:
    """Drafts the earlier continuation of the last `lookup_min_match` tokens; without one, calls the fallback drafter.

    In text that loops or copies its prompt, lookup costs almost no time and is nearly always right. A model would only repeat
    known tokens there, at a cost. The choice depends on the committed tokens of the request alone.

    Args:
        other: the fallback drafter. It must catch up by itself after steps in which it was not called.
        lookup_min_match: number of last tokens that must occur earlier in the text.

    Attributes:
        num_looked_up: number of trees from the lookup so far.
        num_drafted: number of trees from the fallback drafter so far.

    Source: the combination of SAM decoding (Hu et al., arXiv 2411.10666, section 3.3) with another drafter.

    Raises:
        ValueError: `lookup_min_match` is below 1.
    """

    def __init__(self, other: Drafter, lookup_min_match: int = DEFAULT_MATCH):
        check_options(lookup_min_match=lookup_min_match)
        self._lookup, self._other = NgramDrafter(lookup_min_match, lookup_min_match), other
        self.feature_layers: Sequence[int] = other.feature_layers
        self.ahead, self.bytes_per_token = other.ahead, other.bytes_per_token
        self.num_looked_up = self.num_drafted = 0

    @classmethod
    def build(cls, other: Drafter, **options: int) -> LookupFirst:
        """Builds the drafter of a speculative config around its fallback drafter.

        Raises:
            ValueError: see `LookupFirst`.
        """
        return cls(other, **options)

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> LookupState:
        """Returns the state of a new request."""
        return LookupState(self._lookup.start(tokens, None), self._other.start(tokens, features, cache, first))

    def written(self, state: LookupState) -> int | None:
        """Returns for how many tokens the fallback drafter has written keys and values."""
        return self._other.written(state.other)

    def finish(self, state: LookupState) -> None:
        """Releases the resources of the fallback drafter."""
        self._other.finish(state.other)

    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request."""
        found = self._lookup.propose(replace(work, states=[state.lookup for state in work.states]))
        trees = {b: found[b] for b in range(len(work)) if found[b].num_nodes > 1}
        late = [b for b in range(len(work)) if b not in trees]
        self.num_looked_up += len(trees)
        self.num_drafted += len(late)
        if not late:
            return found
        grown = self._other.propose(work.part(late, [work.states[b].other for b in late]))
        if not trees:
            return grown
        trees |= {b: grown[i] for i, b in enumerate(late)}
        return TreeBatch.joined([trees[b] for b in range(len(work))])

    def observe(self, state: LookupState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Passes the committed tokens to both drafters."""
        self._lookup.observe(state.lookup, tokens, None, path)
        self._other.observe(state.other, tokens, features, path)
