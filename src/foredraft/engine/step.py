"""One step of the engine: schedule -> propose -> forward -> decide -> commit."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from foredraft.cache.layout import rows_of
from foredraft.core.contracts import Scores, Target, Verdict
from foredraft.core.errors import UserError, told
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.engine.drafting import Drafting
from foredraft.engine.request import Sequence
from foredraft.engine.scheduler import Schedule, Scheduler
from foredraft.engine.scores import law_of, record, score_prompt
from foredraft.engine.stop import settle


def step(target: Target, scheduler: Scheduler, drafting: Drafting | None) -> list[Sequence]:
    """Runs one step. Returns the sequences that took part and have new tokens or an end.

    Guarantee: with an exact rule, every output has the law of plain decoding, whatever the drafter proposes.
    Source: Leviathan et al. 2023 (arXiv 2211.17192); trees: SpecInfer (arXiv 2305.09781).
    """
    clock = Clock()
    schedule = scheduler.schedule()
    if not schedule.sequences:
        return []
    try:
        batch = propose(schedule, drafting, clock)
        scores = forward(target, schedule, batch, drafting, clock)
        decisions = decide(schedule, batch, scores, drafting, clock)
        return commit(scheduler, schedule, batch, scores, decisions, drafting, clock)
    except Exception as error:
        return give_up(scheduler, schedule, error)
    except BaseException:
        for sequence in schedule.sequences:  # interrupted anywhere: what was committed stays, the rest is computed again
            if sequence.cache is not None and sequence.finish_reason is None:
                scheduler.preempt(sequence)
        raise


@dataclass
class Clock:
    """The seconds of the parts of a step, see `StepRecord`."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=perf_counter)

    def lap(self, part: str) -> None:
        """Books the time since the last call."""
        now = perf_counter()
        self.seconds[part], self.last = now - self.last, now


@dataclass
class Decision:
    """What was decided on the tree of a sequence. `tree` is None for plain decoding."""

    tree: DraftTree | None
    law: TargetLaw
    verdict: Verdict


def propose(schedule: Schedule, drafting: Drafting | None, clock: Clock) -> TreeBatch:
    """Returns what the target runs: one tree for each sequence that decodes, then the chunks of prompts as chains."""
    trees = schedule.trees
    able = [b for b, budget in enumerate(schedule.budgets) if budget.nodes]
    drafted: TreeBatch | list[DraftTree] = []
    if drafting is not None and able:
        drafted = drafting.propose([trees[b] for b in able], [schedule.budgets[b] for b in able])
    if isinstance(drafted, TreeBatch) and len(able) == len(trees) and not schedule.chunks:
        batch = drafted
    else:
        grown = dict(zip(able, (drafted[i] for i in range(len(able))), strict=True))
        roots = [sequence.token_ids[-1:] for sequence in trees]
        chunks = [sequence.token_ids[sequence.cache.length :][:count] for sequence, count in schedule.chunks]
        others = TreeBatch.chains([*roots, *chunks])
        batch = TreeBatch.joined([grown.get(b) or others[b] for b in range(len(others))]) if grown else others
    clock.lap("draft_s")
    return batch


def forward(target: Target, schedule: Schedule, batch: TreeBatch, drafting: Drafting | None, clock: Clock) -> Scores:
    """Runs the target once. Logits are computed for the nodes of trees, and for prompts that are scored."""
    rows, first = None, len(schedule.trees)
    if schedule.chunks:
        scored = [True] * first + [sequence.scores_prompt for sequence, _ in schedule.chunks]
        rows = np.flatnonzero(np.repeat(scored, np.diff(batch.offsets)))
    reads = drafting is not None and any(sequence.nodes for sequence in schedule.sequences)
    layers = drafting.feature_layers if reads and drafting is not None else ()
    scores = target.forward(batch, [sequence.cache for sequence in schedule.sequences], rows, feature_layers=layers)
    clock.lap("verify_s")
    return scores


def decide(
    schedule: Schedule, batch: TreeBatch, scores: Scores, drafting: Drafting | None, clock: Clock
) -> list[Decision | None]:
    """Applies the rule to each tree. A sequence whose law or rule fails ends with the reason."""
    decisions: list[Decision | None] = []
    for b, sequence in enumerate(schedule.trees):
        try:
            decisions.append(_decision(sequence, batch, b, scores, drafting))
        except Exception as error:
            _fail(sequence, error, "the tokens of a step cannot be decided")
            decisions.append(None)
    clock.lap("rule_s")
    return decisions


def _decision(sequence: Sequence, batch: TreeBatch, b: int, scores: Scores, drafting: Drafting | None) -> Decision:
    logits, draws = scores.logits[part(batch, b)], sequence.draws.at(len(sequence.token_ids))
    if drafting is None or sequence.draft_state is None:
        law = law_of(sequence, logits, None)
        token = law.token(0) if law.is_certain else draws.categorical(law.row(0), ("next", (), 0))
        return Decision(None, law, Verdict([], token, "plain"))
    tree = batch[b]
    law = law_of(sequence, logits, tree)
    return Decision(tree, law, drafting.rule(tree, law, draws))


def commit(
    scheduler: Scheduler,
    schedule: Schedule,
    batch: TreeBatch,
    scores: Scores,
    decisions: Items[Decision | None],
    drafting: Drafting | None,
    clock: Clock,
) -> list[Sequence]:
    """Keeps the accepted paths, tells the drafter, cuts outputs at a stop, and releases those that ended."""
    paths = [decision.verdict.path if decision else [] for decision in decisions]
    sizes = [range(1, count) for _, count in schedule.chunks]
    scheduler.pool.keep([sequence.cache for sequence in schedule.sequences], [*paths, *sizes])
    clock.lap("cache_s")
    for b, (sequence, decision) in enumerate(zip(schedule.trees, decisions, strict=True)):
        if decision is not None:
            _commit_tree(sequence, decision, scores, part(batch, b), drafting, clock)
    row = int(batch.offsets[len(schedule.trees)])  # of the logits: chunks follow the trees
    for b, (sequence, count) in enumerate(schedule.chunks, start=len(schedule.trees)):
        if sequence.scores_prompt:
            score_prompt(sequence, scores.logits[row : row + count], sequence.cache.length - count)
            row += count
        if drafting is not None and sequence.nodes:
            sequence.features += [] if scores.features is None else [scores.features[part(batch, b)]]
            if not sequence.num_missing:
                drafting.start(sequence)
    for sequence in schedule.sequences:
        scheduler.publish(sequence)
        if sequence.finish_reason is not None:
            scheduler.release(sequence)
    return schedule.trees


def _commit_tree(
    sequence: Sequence, decision: Decision, scores: Scores, nodes: slice, drafting: Drafting | None, clock: Clock
) -> None:
    tree, verdict = decision.tree, decision.verdict
    drafted = [] if tree is None else tree.tokens[verdict.path].tolist()
    tokens = [*drafted, verdict.next_token]
    if drafting is not None and sequence.draft_state is not None:
        features = None if scores.features is None else rows_of(scores.features[nodes], [0, *verdict.path])
        drafting.observe(sequence, tokens, features, verdict.path)
    count = settle(sequence, decision.law, tokens, verdict)
    sequence.last_tree, sequence.last_path = tree, verdict.path[:count]
    sequence.records.append(record(sequence, tree, verdict, count, **clock.seconds))


def give_up(scheduler: Scheduler, schedule: Schedule, error: Exception) -> list[Sequence]:
    """Ends all sequences of a step that failed, with the reason."""
    for sequence in schedule.sequences:
        if sequence.finish_reason is None:
            _fail(sequence, error, "a step failed")
        scheduler.release(sequence)
    return schedule.sequences


def _fail(sequence: Sequence, error: Exception, what: str) -> None:
    message, hint = told(error)
    sequence.fail(UserError(f"{what} ({type(error).__name__}: {message})", hint), error)


def part(batch: TreeBatch, b: int) -> slice:
    """Returns the slice of the packed nodes that belong to tree b."""
    return slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
