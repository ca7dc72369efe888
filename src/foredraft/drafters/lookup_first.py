"""Lookup where the text has repeated itself for a while, another drafter everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from foredraft.drafters.ngram import NgramDrafter, NgramState
from foredraft.drafters.options import check_options
from foredraft.draws import Draws
from foredraft.params import SamplingParams
from foredraft.protocols import Budget, Drafter
from foredraft.tree import TreeBatch

DEFAULT_MATCH = 4
"""On training prompts 2, 3 and 4 were the fastest at temperature 0, and 4 costs nothing at temperature 1."""


class LookupState(NamedTuple):
    """A request's state in the lookup and in the other drafter."""

    lookup: NgramState
    other: Any


class LookupFirst:
    """Drafts what followed the last `min_match` tokens where they stood in the text before; else asks another drafter.

    A lookup costs nothing and is nearly always right where the text goes round in circles or copies its prompt, which is
    where a model only repeats at some cost what is known. Who drafts depends on the request's committed tokens alone.

    Args:
        other: a drafter that catches up from its own length when it is not asked for some steps.
        lookup_min_match: tokens that must have stood in the text before.

    Attributes:
        num_looked_up, num_drafted: trees so far from the lookup, and from the other drafter.

    Source: the combination of SAM decoding (Hu et al., arXiv 2411.10666, section 3.3) with another drafter.

    Raises:
        ValueError: `lookup_min_match` is below 1.
    """

    def __init__(self, other: Drafter, lookup_min_match: int = DEFAULT_MATCH):
        check_options(lookup_min_match=lookup_min_match)
        self._lookup, self._other = NgramDrafter(lookup_min_match, lookup_min_match), other
        self.feature_layers: Sequence[int] = other.feature_layers
        self.num_looked_up = self.num_drafted = 0

    @classmethod
    def build(cls, other: Drafter, **options: int) -> LookupFirst:
        """The drafter of a speculative config, around the one that it asks.

        Raises:
            ValueError: see `LookupFirst`.
        """
        return cls(other, **options)

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> LookupState:
        """A new request."""
        return LookupState(self._lookup.start(tokens, None), self._other.start(tokens, features))

    def finish(self, state: LookupState) -> None:
        """Gives back what the other drafter held."""
        self._other.finish(state.other)

    def propose(
        self,
        states: Sequence[LookupState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request."""
        found = self._lookup.propose([state.lookup for state in states], budgets, sampling, draws)
        trees = {b: found[b] for b in range(len(states)) if found[b].num_nodes > 1}
        late = [b for b in range(len(states)) if b not in trees]
        self.num_looked_up += len(trees)
        self.num_drafted += len(late)
        if not late:
            return found
        own = [states[b].other for b in late]
        grown = self._other.propose(own, [budgets[b] for b in late], [sampling[b] for b in late], [draws[b] for b in late])
        if not trees:
            return grown
        trees |= {b: grown[i] for i, b in enumerate(late)}
        return TreeBatch.joined([trees[b] for b in range(len(states))])

    def observe(
        self, state: LookupState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """Both follow the text."""
        self._lookup.observe(state.lookup, tokens, None, path)
        self._other.observe(state.other, tokens, features, path)
