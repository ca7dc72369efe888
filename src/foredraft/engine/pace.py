"""Chooses how many nodes a request drafts, from stored costs, the rows of the step and the accepted tokens of the request.

A budget is fixed before the drafter is asked, from the load and from committed tokens. So the law of the output does not
change. Two runs of a request at equal load choose equal budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

from foredraft.core.costs import Costs

_PRIOR, _DECAY = 4.0, 0.9
"""Steps that the prior counts for, and the weight of a step relative to the next one. On training prompts, these values lost
least where drafting pays, and stopped soonest where it does not."""

_FIRST_PAUSE, _LONGEST_PAUSE = 16, 512
"""Plain steps before the first probe, and the largest number before a later one. It doubles from probe to probe."""

MOST_PENDING = 512
"""Tokens that a paused drafter may have to catch up. Beyond that, it stays off for the request."""


@dataclass(eq=False)
class Pace:
    """The budget of one request from step to step.

    Attributes:
        gained, expected: accepted tokens, and those that a typical request would have had. Both decay.
        pause: plain steps until the next probe; 0 while drafting pays.
        next_pause: length of the next pause, in plain steps.
        pending: tokens that were committed since the last step with a budget. The drafter must catch up on them.
    """

    costs: Costs
    gained: float = 0.0
    expected: float = 0.0
    pause: int = 0
    next_pause: int = _FIRST_PAUSE
    pending: int = 0

    def __post_init__(self) -> None:
        self.gained = self.expected = _PRIOR * self.costs.gain(self.costs.most)

    @property
    def share(self) -> float:
        """Accepted tokens of this request, divided by those of a typical request."""
        return self.gained / self.expected if self.expected > 0 else 0.0

    def nodes(self, requests: int, besides: int) -> int:
        """Returns the number of nodes of the next tree.

        Args:
            requests: number of requests that decode in the step.
            besides: rows of prompts in the step.
        """
        is_behind = self.pending > 0
        if self.pause:
            self.pause -= 1
            return self.costs.best(requests, besides, 1.0, is_behind=is_behind) if not self.pause else 0
        nodes = self.costs.best(requests, besides, self.share, is_behind=is_behind)
        if not nodes and self.costs.pays(requests, besides):  # this request, not the load
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, _LONGEST_PAUSE)
        elif nodes:
            self.next_pause = _FIRST_PAUSE
        return nodes

    def saw(self, budget: int, nodes: int, accepted: int, committed: int) -> None:
        """Updates the pace after a step.

        Args:
            budget: the budget of the step, in nodes.
            nodes: number of nodes that were drafted. 0 within a larger budget says nothing: lookup found nothing.
            accepted, committed: numbers of tokens.
        """
        self.pending = 0 if budget else self.pending + committed
        if not nodes:
            return
        self.gained = _DECAY * self.gained + accepted
        self.expected = _DECAY * self.expected + self.costs.gain(nodes)
