"""One drafter for greedy requests and another for sampled ones, behind the one contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from foredraft.draws import Draws
from foredraft.params import SamplingParams
from foredraft.protocols import Budget, Drafter
from foredraft.tree import DraftTree, TreeBatch


@dataclass(eq=False)
class MixedState:
    """A request's state in both drafters; which of them drafts is known when the first tree is asked for.

    Attributes:
        parts: of the greedy and of the sampled drafter.
        drafts: which of the two drafts; the other one's part is given back by then.
    """

    parts: tuple[Any, Any]
    drafts: int | None = None


class MixedDrafter:
    """Two drafters that share out the requests by their temperature.

    Args:
        greedy, sampled: where both need features of the target, those of the same layers.
    """

    def __init__(self, greedy: Drafter, sampled: Drafter):
        self._drafters = (greedy, sampled)
        self.feature_layers: Sequence[int] = greedy.feature_layers or sampled.feature_layers
        assert all(tuple(one.feature_layers) in ((), tuple(self.feature_layers)) for one in self._drafters)

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> MixedState:
        """A new request."""
        greedy, sampled = (one.start(tokens, features if one.feature_layers else None) for one in self._drafters)
        return MixedState((greedy, sampled))

    def finish(self, state: MixedState) -> None:
        """Gives back what is held."""
        for drafter, part in self._following(state):
            drafter.finish(part)

    def propose(
        self,
        states: Sequence[MixedState],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request, each by its own drafter."""
        trees: dict[int, DraftTree] = {}
        for which, drafter in enumerate(self._drafters):
            mine = [b for b, one in enumerate(sampling) if (one.temperature > 0) == bool(which)]
            if mine:
                own = [self._part(states[b], which) for b in mine]
                given = ([of[b] for b in mine] for of in (budgets, sampling, draws))
                batch = drafter.propose(own, *given)  # type: ignore[arg-type]
                if len(mine) == len(states):
                    return batch
                trees |= {b: batch[i] for i, b in enumerate(mine)}
        return TreeBatch.joined([trees[b] for b in range(len(states))])

    def observe(
        self, state: MixedState, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]
    ) -> None:
        """Whoever drafts follows the text."""
        for drafter, part in self._following(state):
            drafter.observe(part, tokens, features if drafter.feature_layers else None, path)

    def _part(self, state: MixedState, which: int) -> Any:
        """The state in the drafter that drafts; the other one is done with the request."""
        if state.drafts is None:
            self._drafters[1 - which].finish(state.parts[1 - which])
            state.drafts = which
        return state.parts[which]

    def _following(self, state: MixedState) -> Iterator[tuple[Drafter, Any]]:
        for which, pair in enumerate(zip(self._drafters, state.parts, strict=True)):
            if state.drafts in (None, which):
                yield pair
