"""What a run did, as numbers: records of steps, and pure functions over them.

Only tokens of the output are counted. The last step of an output may end inside its accepted path, at a stop string, a stop
token or an end of sequence. The drafts behind that end, and the step's recovered or bonus token, never reached the output:
such a cut step counts the drafts up to the end and no further token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One propose-verify cycle of one request.

    Attributes:
        num_draft_tokens: nodes of the tree without its root. All of them were drafted and verified, so a cut step counts all.
        num_accepted_tokens: accepted drafts that reached the output, without the recovered or bonus token.
        depth: depth of the tree, the most that could be accepted; of a step that ended early, `num_accepted_tokens`, because
            nothing behind its end was tried.
        kind: of the step's last token, ``recovered``, ``bonus`` or ``plain``; ``accepted`` where the output ended inside the
            path, ``error`` where it ended because no token could follow. With these two the step gave no token of its own.
        branched: whether any node of the tree had two or more children.
        tv_bounds: of a lossy rule, one per token of the step; see `foredraft.protocols.Verdict`.
        draft_s, verify_s, rule_s, cache_s: seconds of the batched step that this request was part of.
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    depth: int
    kind: str
    branched: bool = False
    tv_bounds: Sequence[float] = ()
    draft_s: float = 0.0
    verify_s: float = 0.0
    rule_s: float = 0.0
    cache_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step gave to the output: the accepted ones and, unless it ended early, one more."""
        return self.num_accepted_tokens + (self.kind not in _ENDED_EARLY)


_ENDED_EARLY = ("accepted", "error")
"""Kinds of steps without a recovered or bonus token."""


@dataclass(frozen=True)
class Metrics:
    """Summary of a request or of a run; see `summarize`. Times are seconds of the steps that it took part in.

    Attributes:
        num_accepted_tokens: accepted drafts in the output; as many of its `kinds` are ``accepted``.
        acceptance_length: tokens of the output / steps. This is 1 + accepted / steps as long as every step gives its recovered
            or bonus token; a step that ended early gives none.
        acceptance_rate: accepted / drafted.
        joint_acceptance_rate: element k: the share of all steps in which more than k tokens were accepted.
        conditional_acceptance_rate: element k: of the steps that accepted k tokens and whose tree went deeper, the share
            that accepted one more.
        tv_bound_mean, tv_bound_max: over all tokens, how far their law may be from the target's (total variation); 0 for an
            exact rule.
        num_saved_rejections: expected rejections that rule ``tolerance`` saved: the sum of the bounds (Theorem 5).
    """

    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_length: float = 1.0
    acceptance_rate: float = 0.0
    joint_acceptance_rate: list[float] = field(default_factory=list)
    conditional_acceptance_rate: list[float] = field(default_factory=list)
    branched_rate: float = 0.0
    tv_bound_mean: float = 0.0
    tv_bound_max: float = 0.0
    num_saved_rejections: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    rule_s: float = 0.0
    cache_s: float = 0.0


def summarize(records: Sequence[StepRecord]) -> Metrics:
    """The figures of `records`; every rate is weighted by steps."""
    if not records:
        return Metrics()
    accepted = [record.num_accepted_tokens for record in records]
    num_tokens = sum(record.num_tokens for record in records)
    drafted = sum(record.num_draft_tokens for record in records)
    deepest = max(record.depth for record in records)
    bounds = [bound for record in records for bound in record.tv_bounds]
    return Metrics(
        num_steps=len(records),
        num_draft_tokens=drafted,
        num_accepted_tokens=sum(accepted),
        acceptance_length=num_tokens / len(records),
        acceptance_rate=sum(accepted) / drafted if drafted else 0.0,
        joint_acceptance_rate=[sum(a > k for a in accepted) / len(records) for k in range(deepest)],
        conditional_acceptance_rate=[_conditional(records, k) for k in range(deepest)],
        branched_rate=sum(record.branched for record in records) / len(records),
        tv_bound_mean=sum(bounds) / max(1, num_tokens),
        tv_bound_max=max(bounds, default=0.0),
        num_saved_rejections=float(sum(bounds)),
        draft_s=sum(record.draft_s for record in records),
        verify_s=sum(record.verify_s for record in records),
        rule_s=sum(record.rule_s for record in records),
        cache_s=sum(record.cache_s for record in records),
    )


def _conditional(records: Sequence[StepRecord], k: int) -> float:
    tried = [r.num_accepted_tokens > k for r in records if r.num_accepted_tokens >= k and r.depth > k]
    return sum(tried) / len(tried) if tried else 0.0
