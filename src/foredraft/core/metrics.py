"""Statistics of a run: records of steps, and pure functions over them.

Only tokens of the output are counted. The last step of an output may end inside its accepted path, at a stop string, a stop
token or an end of sequence. The drafts behind that end never reach the output, and neither does the step's recovered or bonus
token. Such a step counts the accepted drafts up to the end and no other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

SPLIT = ("draft_s", "verify_s", "rule_s", "cache_s")
"""The parts of a step whose seconds are measured."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One propose-verify cycle of one request.

    Attributes:
        num_draft_tokens: number of nodes of the tree besides the root. All of them were drafted and verified, so a step that
            ended early counts all of them too.
        num_accepted_tokens: accepted drafts that reached the output, without the recovered or bonus token.
        depth: depth of the tree, which is the largest number of tokens that could be accepted. For a step that ended early,
            it is `num_accepted_tokens`, because no later token was tested.
        kind: kind of the step's last token: ``recovered``, ``bonus`` or ``plain``. ``accepted`` if the output ended inside
            the path, and ``error`` if it ended because no token could follow. In the last two cases, the step added no
            recovered or bonus token.
        branched: whether a node of the tree had two or more children.
        tv_bounds: only for lossy rules, one bound per token of the step; see `foredraft.core.contracts.Verdict`.
        budget: the largest number of nodes that the tree was allowed. It follows the load and the acceptance of the request,
            unless it is fixed.
        draft_s, verify_s, rule_s, cache_s: seconds of the batched step in which this request took part. If the step ran the end
            of its prompt too, `verify_s` is divided by the number of its rows.
    """

    num_draft_tokens: int
    num_accepted_tokens: int
    depth: int
    kind: str
    branched: bool = False
    tv_bounds: Sequence[float] = ()
    budget: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    rule_s: float = 0.0
    cache_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step added to the output: the accepted tokens and, unless it ended early, one more."""
        return self.num_accepted_tokens + (self.kind not in _ENDED_EARLY)


_ENDED_EARLY = ("accepted", "error")
"""Kinds of steps without a recovered or bonus token."""


@dataclass(frozen=True)
class Metrics:
    """Summary of a request or of a run; see `summarize`.

    Attributes:
        num_steps: number of steps.
        num_draft_tokens: number of drafted tokens.
        num_accepted_tokens: accepted drafts in the output. This is the number of tokens whose kind is ``accepted``.
        acceptance_length: tokens of the output / steps. This equals 1 + accepted / steps if every step adds a recovered or
            bonus token. A step that ended early adds none.
        acceptance_rate: accepted / drafted.
        joint_acceptance_rate: element k is the share of all steps in which more than k tokens were accepted.
        conditional_acceptance_rate: element k is a share of the steps that accepted at least k tokens and whose tree was
            deeper than k: the share that accepted more than k tokens.
        branched_rate: share of the steps whose tree branched.
        tv_bound_mean, tv_bound_max: mean and maximum, over all tokens, of the bound on the total variation distance between
            their law and the target's law. 0 for an exact rule.
        num_saved_rejections: expected number of rejections saved by rule ``tolerance``: the sum of the bounds (Theorem 5).
        draft_s, verify_s, rule_s, cache_s: total seconds of the steps, by part.
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
    """Summarizes `records`. All rates are weighted by steps."""
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
        **{part: sum(getattr(record, part) for record in records) for part in SPLIT},
    )


def _conditional(records: Sequence[StepRecord], k: int) -> float:
    tried = [r.num_accepted_tokens > k for r in records if r.num_accepted_tokens >= k and r.depth > k]
    return sum(tried) / len(tried) if tried else 0.0
