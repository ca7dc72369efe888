"""Chooses how many nodes requests draft, from stored costs, the rows of the step and the accepted tokens of each request.

A budget is fixed before the drafter is asked, from the load and from committed tokens. So the law of the output does not
change. Two runs of the same requests choose equal budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foredraft.core.costs import Costs

_PRIOR, _DECAY = 4.0, 0.9
"""Steps that the prior counts for, and the weight of a step relative to the next one. On training prompts, these values lost
least where drafting pays, and stopped soonest where it does not."""

_KEPT = 1.0
"""Steps that the evidence from before a pause counts for. The text may have changed since."""

_FIRST_PAUSE, _LONGEST_PAUSE = 16, 512
"""Plain steps before the first probe, and the largest number before a later one. It doubles from probe to probe."""

MOST_PENDING = 512
"""Tokens that a paused drafter may have to catch up. Beyond that, it stays off for the request."""


@dataclass(eq=False)
class Pace:
    """What decides whether and how far one request drafts.

    Attributes:
        gained, expected: accepted tokens, and those that a typical request would have had. Both decay.
        pause: plain steps until the next probe; 0 while drafting pays.
        next_pause: length of the next pause, in plain steps.
        is_probe: whether its next tree is a probe, which is drafted as for a typical request.
        pending: tokens that were committed since the last step with a budget. The drafter must catch up on them.
    """

    costs: Costs
    gained: float = 0.0
    expected: float = 0.0
    pause: int = 0
    next_pause: int = _FIRST_PAUSE
    is_probe: bool = False
    pending: int = 0

    def __post_init__(self) -> None:
        self.gained = self.expected = _PRIOR * self.costs.gain(self.costs.most)

    @property
    def share(self) -> float:
        """Accepted tokens of this request, divided by those of a typical request. For a probe, it is taken to be typical."""
        return 1.0 if self.is_probe or self.expected <= 0 else self.gained / self.expected

    def is_ready(self) -> bool:
        """Counts a step. Returns whether the request may draft in it."""
        if self.pause:
            self.pause -= 1
            self.is_probe = not self.pause
        return not self.pause

    def stop(self) -> None:
        """Begins a pause, which is longer than the one before."""
        self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, _LONGEST_PAUSE)
        weight = min(1.0, _KEPT * self.costs.gain(self.costs.most) / self.expected) if self.expected > 0 else 1.0
        self.gained, self.expected = weight * self.gained, weight * self.expected

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
        self.is_probe = False
        self.gained = _DECAY * self.gained + accepted
        self.expected = _DECAY * self.expected + self.costs.gain(nodes)


def allot(paces: Sequence[Pace], requests: int, besides: int) -> list[int]:
    """Returns the number of nodes of the next tree of each request. They are chosen together.

    Drafting for a few of many requests has its full fixed cost and little gain, so a request may have to wait for others. One
    whose drafts are accepted too rarely to pay at this load, whoever drafts with it, pauses. Of equal requests, those that have
    waited longest draft.

    Args:
        paces: of the requests that may draft.
        requests: number of requests that decode in the step.
        besides: rows of prompts and of other trees in the step.
    """
    nodes = [0] * len(paces)
    groups: dict[int, list[tuple[float, int]]] = {}  # share and place of those that may draft now
    for i, pace in enumerate(paces):
        if pace.is_ready():
            groups.setdefault(id(pace.costs), []).append((pace.share, i))
    for group in groups.values():  # each has costs of its own, and comes on top of those before
        costs, rows = paces[group[0][1]].costs, besides + sum(nodes)
        least = costs.least(requests, rows)
        if max(group)[0] > least:
            group.sort(key=lambda pair: (-pair[0], -paces[pair[1]].pending))
            for i, size in _chosen(costs, [(share, paces[i].pending > 0, i) for share, i in group], requests, rows).items():
                nodes[i] = size
                paces[i].next_pause = paces[i].next_pause if paces[i].is_probe else _FIRST_PAUSE
        if least <= 1:
            for share, i in group:
                if share <= least and not nodes[i]:
                    paces[i].stop()
    return nodes


def _chosen(costs: Costs, group: list[tuple[float, bool, int]], requests: int, besides: int) -> dict[int, int]:
    """Returns the number of nodes by place, for those that draft.

    Args:
        group: share, whether the drafter must catch up, and place of each request, the largest share first.
    """
    ready = [pair for pair in group if not pair[1]]
    found: list[tuple[float, dict[int, int]]] = [(0.0, {})]
    for some in [group] if len(ready) in (0, len(group)) else [group, ready]:  # catching up may cost all their gain
        shares = [share for share, _, _ in some]
        count, size = costs.best(shares, requests, besides, behind=[is_behind for _, is_behind, _ in some])
        if count:
            late_s = costs.catch_up_s * sum(1 + share * costs.gain(size) for share, is_behind, _ in some[:count] if is_behind)
            seconds = costs.decoding_s(requests, size, besides, count) + late_s
            speed = (requests + sum(shares[:count]) * costs.gain(size)) / seconds
            found.append((speed, {i: size for _, _, i in some[:count]}))
    return max(found, key=lambda choice: choice[0])[1]
