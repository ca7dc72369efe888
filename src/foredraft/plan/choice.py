"""The result of an automatic choice of drafter, tree and size, with its reasons."""

from __future__ import annotations

from typing import Any, NamedTuple

from foredraft.plan.speculation import Way


class Choice(NamedTuple):
    """The result of an automatic choice, with its reasons.

    Attributes:
        way: drafter and tree of the best candidate.
        nodes: number of nodes of its tree; 0 if plain decoding is expected to be faster.
        tokens_per_step: expected tokens per step of the best candidate.
        slowdown: time of its step divided by the time of a plain decoding step, measured on this machine.
        speedup: expected speed-up over plain decoding: `tokens_per_step` divided by `slowdown`.
        timed_on: date of the measurement; None if nothing was timed.
        calibrated: whether `tokens_per_step` was measured. If not, it is that of a typical drafter.
        costs: costs of this way as `Costs.written` stores them; None if the budget is fixed, or nothing is drafted.
    """

    way: Way
    nodes: int
    tokens_per_step: float
    slowdown: float
    speedup: float
    timed_on: str | None = None
    calibrated: bool = True
    costs: dict[str, Any] | None = None

    @property
    def reason(self) -> str:
        """Describes the choice in one line."""
        name = ", ".join(part for part in self.way if part)
        if self.timed_on is None:
            return f"drafting: {f'{name} {self.nodes} nodes' if self.nodes else 'off'} (nothing was timed)"
        assumed = "" if self.calibrated else "; not calibrated, so a typical drafter is assumed"
        when = f"timed here on {self.timed_on}{assumed}"
        if self.nodes:
            speedup = f"{self.speedup:.{1 if self.speedup > 1.1 else 2}f}x"
            return f"drafting: {name} {self.nodes} nodes (expected {speedup}; {when})"
        if self.speedup > 1:
            return f"drafting: off (best {name} {self.speedup:.2f}x, which is within the error of this estimate; {when})"
        return f"drafting: off (no method expected above plain: best {name} {self.speedup:.2f}x; {when})"
