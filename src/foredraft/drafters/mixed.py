"""One drafter for greedy requests and another for sampled ones, behind the one contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from foredraft.draws import Draws
from foredraft.protocols import Budget, Drafter
from foredraft.sampling import SamplingParams
from foredraft.tree import DraftTree, TreeBatch


class MixedState(NamedTuple):
    """A request's state in both drafters: which of them drafts is known when the first tree is asked for."""

    greedy: Any
    sampled: Any


class MixedDrafter:
    """Two drafters that share out the requests by their temperature.

    Args:
        greedy, sampled: drafters that need no features of the target.
    """

    feature_layers: Sequence[int] = ()

    def __init__(self, greedy: Drafter, sampled: Drafter):
        assert not greedy.feature_layers
        assert not sampled.feature_layers
        self._greedy, self._sampled = greedy, sampled

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> MixedState:
        """A new request."""
        return MixedState(self._greedy.start(tokens, None), self._sampled.start(tokens, None))

    def finish(self, state: MixedState) -> None:
        """Gives back what both held."""
        self._greedy.finish(state.greedy)
        self._sampled.finish(state.sampled)

    def propose(
        self,
        states: Sequence[MixedState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request, each by its own drafter."""
        trees: dict[int, DraftTree] = {}
        for drafter, name in ((self._greedy, "greedy"), (self._sampled, "sampled")):
            mine = [b for b, one in enumerate(sampling) if (one.temperature > 0) == (name == "sampled")]
            if mine:
                own = [getattr(states[b], name) for b in mine]
                given = ([of[b] for b in mine] for of in (budgets, sampling, draws))
                batch = drafter.propose(own, *given)  # type: ignore[arg-type]
                if len(mine) == len(states):
                    return batch
                trees |= {b: batch[i] for i, b in enumerate(mine)}
        return TreeBatch.joined([trees[b] for b in range(len(states))])

    def observe(
        self, state: MixedState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """Both follow the text."""
        self._greedy.observe(state.greedy, tokens, None, path)
        self._sampled.observe(state.sampled, tokens, None, path)
