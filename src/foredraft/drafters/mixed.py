"""A drafter that combines two: one for greedy requests and one for sampled requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foredraft.core.contracts import Drafter, Features, Work
from foredraft.core.tree import DraftTree, TreeBatch


@dataclass(eq=False)
class MixedState:
    """The state of a request in both drafters. The first call of `propose` decides which of them drafts.

    Attributes:
        parts: the states in the greedy and in the sampled drafter.
        drafts: index of the drafter that drafts; None before the first tree. The state in the other drafter is then released.
    """

    parts: list[Any]
    drafts: int | None = None


class MixedDrafter:
    """Two drafters that divide the requests by temperature.

    Args:
        greedy: drafts requests at temperature 0.
        sampled: drafts requests above temperature 0. If both drafters need features, they must need the same layers.
    """

    def __init__(self, greedy: Drafter, sampled: Drafter):
        self._drafters = (greedy, sampled)
        self.feature_layers: Sequence[int] = greedy.feature_layers or sampled.feature_layers
        self.ahead, self.bytes_per_token = max(greedy.ahead, sampled.ahead), greedy.bytes_per_token + sampled.bytes_per_token
        assert all(tuple(drafter.feature_layers) in ((), tuple(self.feature_layers)) for drafter in self._drafters)

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> MixedState:
        """Returns the state of a new request."""
        state = MixedState([])
        try:
            for drafter in self._drafters:
                state.parts.append(drafter.start(tokens, features if drafter.feature_layers else None, cache, first))
        except BaseException:
            self.finish(state)
            raise
        return state

    def written(self, state: MixedState) -> int | None:
        """Returns for how many tokens the drafter that drafts has written keys and values."""
        if state.drafts is None:
            return 0
        return self._drafters[state.drafts].written(state.parts[state.drafts])

    def finish(self, state: MixedState) -> None:
        """Releases the resources of the request."""
        for drafter, part in self._following(state):
            drafter.finish(part)

    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request, each from the drafter of its temperature."""
        trees: dict[int, DraftTree] = {}
        for which, drafter in enumerate(self._drafters):
            mine = [b for b, params in enumerate(work.sampling) if (params.temperature > 0) == bool(which)]
            if mine:
                batch = drafter.propose(work.part(mine, [self._part(work.states[b], which) for b in mine]))
                if len(mine) == len(work):
                    return batch
                trees |= {b: batch[i] for i, b in enumerate(mine)}
        return TreeBatch.joined([trees[b] for b in range(len(work))])

    def observe(self, state: MixedState, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Passes the committed tokens to the drafter that drafts."""
        for drafter, part in self._following(state):
            drafter.observe(part, tokens, features if drafter.feature_layers else None, path)

    def _part(self, state: MixedState, which: int) -> Any:
        """Returns the state in the drafter that drafts. Releases the state in the other drafter."""
        if state.drafts is None:
            other, state.parts[1 - which], state.drafts = state.parts[1 - which], None, which
            self._drafters[1 - which].finish(other)
        return state.parts[which]

    def _following(self, state: MixedState) -> Iterator[tuple[Drafter, Any]]:
        for which, pair in enumerate(zip(self._drafters, state.parts, strict=False)):
            if state.drafts in (None, which):
                yield pair
