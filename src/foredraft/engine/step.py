"""One step of the engine: schedule -> propose -> forward -> decide -> commit."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.blocks import OutOfBlocksError
from foredraft.cache.layout import rows_of
from foredraft.core.contracts import Scores, Target
from foredraft.core.errors import UserError, told
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.engine.deciding import Case, Decision, decide
from foredraft.engine.drafting import Drafting
from foredraft.engine.request import Mark, Sequence
from foredraft.engine.schedule import Schedule
from foredraft.engine.scheduler import Scheduler
from foredraft.engine.scores import record, score_prompt
from foredraft.engine.stop import settle


def step(target: Target, scheduler: Scheduler, layers: Items[int] = ()) -> None:
    """Runs one step. Those of its sequences that have new tokens or an end are added to ``scheduler.unreported``.

    An interrupt may come anywhere. For every sequence, the step then counts as a whole or not at all.

    Args:
        layers: the target's layers whose features the drafters need.

    Guarantee: with an exact rule, every output has the law of plain decoding, whatever the drafter proposes.
    Source: Leviathan et al. 2023 (arXiv 2211.17192); trees: SpecInfer (arXiv 2305.09781).
    """
    now = Step(target, scheduler, layers)
    try:
        now.schedule = scheduler.schedule()
        batch = now.propose()
        if not now.schedule.sequences:
            return
        scores = now.forward(batch)
        decisions = now.decide(batch, scores)
        now.commit(batch, scores, decisions)
    except Exception as error:
        try:
            now.give_up(error)
        except BaseException:
            now.put_back()
            raise
    except BaseException:
        now.put_back()
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
class Group:
    """Sequences with the same drafter: their places in the schedule, and their trees."""

    places: list[int] = field(default_factory=list)
    drafted: TreeBatch | None = None


@dataclass
class Step:
    """One step while it runs.

    Attributes:
        layers: the target's layers whose features the drafters need.
        schedule: the rows of the step. Trees come first in every batch, then the chunks of prompts.
        drafted: the trees of the sequences that draft, by place in the schedule.
        packed: the trees of the step with their draft laws, if the target runs these and nothing else.
    """

    target: Target
    scheduler: Scheduler
    layers: Items[int]
    schedule: Schedule = field(default_factory=Schedule)
    clock: Clock = field(default_factory=Clock)
    drafted: dict[int, DraftTree] = field(default_factory=dict)
    packed: TreeBatch | None = None
    _marks: dict[Sequence, Mark] = field(default_factory=dict)  # where those stand that are not committed yet
    _kept: Float[Tensor, "m w"] | None = None

    def propose(self) -> TreeBatch:
        """Returns what the target runs: a tree for each sequence that decodes, and a chain for each chunk of a prompt."""
        groups, trees = self._draft(), len(self.schedule.trees)
        for group in groups:
            assert group.drafted is not None
            self.drafted |= {b: group.drafted[i] for i, b in enumerate(group.places)}
        is_whole = len(groups) == 1 and len(groups[0].places) == trees and not self.schedule.chunks
        batch = groups[0].drafted if is_whole else None
        if batch is None and not (groups or self.schedule.chunks or any(self.schedule.leads)):
            batch = TreeBatch.roots([sequence.token_ids[-1] for sequence in self.schedule.trees])
        self.packed = batch
        batch = self._joined() if batch is None else batch
        self.clock.lap("draft_s")
        return batch

    def _joined(self) -> TreeBatch:
        """Returns the batch of the step for the target, which reads no draft laws. Without a tree, a sequence runs its root."""
        parents: list[Items[int]] = []
        tokens: list[Items[int]] = []
        for b, sequence in enumerate(self.schedule.trees):
            tree, lead = self.drafted.get(b), self.schedule.leads[b]
            tokens.append(sequence.token_ids[-1 - lead :] if tree is None else tree.tokens.tolist())
            parents.append(range(-1, lead) if tree is None else tree.parents.tolist())
        for sequence, count in self.schedule.chunks:
            tokens.append(sequence.token_ids[sequence.cache.length :][:count])
            parents.append(range(-1, count - 1))
        return TreeBatch.chains(tokens, parents)

    def _draft(self) -> list[Group]:
        """Returns the trees of the sequences that draft. Preempts others if blocks do not suffice for a drafter."""
        while True:
            groups: dict[Drafting, Group] = {}
            for b, (sequence, budget) in enumerate(zip(self.schedule.trees, self.schedule.budgets, strict=True)):
                if budget.nodes:
                    sequence.drafting.catch_up(sequence, self.layers)
                if budget.nodes and sequence.draft_state is not None:
                    groups.setdefault(sequence.drafting, Group()).places.append(b)
            try:
                for drafting, group in groups.items():
                    sequences = [self.schedule.trees[b] for b in group.places]
                    group.drafted = drafting.propose(sequences, [self.schedule.budgets[b] for b in group.places])
                if all(group.drafted is not None for group in groups.values()):
                    return [*groups.values()]
            except OutOfBlocksError as error:  # random numbers are addressed, so drafting again gives the same trees
                if len(self.scheduler.running) == 1:
                    [sequence] = self.schedule.trees
                    sequence.drafting.switch_off(sequence, error)
                else:
                    self.scheduler.make_room(self.schedule, is_drafted=True)

    def forward(self, batch: TreeBatch) -> Scores:
        """Runs the target once. Logits are computed for the nodes of trees, and for prompts that are scored."""
        rows, sequences, leads = None, self.schedule.sequences, self.schedule.leads
        if self.schedule.chunks or any(leads):
            scored = [True] * len(leads) + [sequence.scores_prompt for sequence, _ in self.schedule.chunks]
            is_scored = np.repeat(scored, np.diff(batch.offsets))
            for first, lead in zip(batch.offsets, leads, strict=False):
                is_scored[first : first + lead] = False
            rows = np.flatnonzero(is_scored)
        reads = any(sequence.drafts and sequence.drafting.drafter.feature_layers for sequence in sequences)
        layers = self.layers if reads else ()
        scores = self.target.forward(batch, [sequence.cache for sequence in sequences], rows, feature_layers=layers)
        self.clock.lap("verify_s")
        return scores

    def decide(self, batch: TreeBatch, scores: Scores) -> list[Decision | None]:
        """Applies the rules to the trees. A sequence whose law or rule fails ends with the reason."""
        self._marks = {sequence: sequence.mark() for sequence in self.schedule.sequences}
        cases, row = list[Case](), 0
        for b, (sequence, lead) in enumerate(zip(self.schedule.trees, self.schedule.leads, strict=True)):
            end = row + batch.bounds[b + 1] - batch.bounds[b] - lead  # leads have no logits
            cases.append(Case(sequence, self.drafted.get(b), slice(row, end)))
            row = end
        decisions: list[Decision | None] = []
        for case, found in zip(cases, decide(cases, scores.logits, self.packed), strict=True):
            decisions.append(found if isinstance(found, Decision) else None)
            if isinstance(found, Exception):
                _fail(case.sequence, found, "the tokens of a step cannot be decided")
        self.clock.lap("rule_s")
        return decisions

    def commit(self, batch: TreeBatch, scores: Scores, decisions: Items[Decision | None]) -> None:
        """Keeps the accepted paths, tells the drafter, cuts outputs at a stop, and releases those that ended."""
        schedule = self.schedule
        paths = [
            range(1, lead + 1) if lead else decision.verdict.path if decision else []
            for decision, lead in zip(decisions, schedule.leads, strict=True)
        ]
        chains = [range(1, count) for _, count in schedule.chunks]
        self.scheduler.pool.keep([sequence.cache for sequence in schedule.sequences], [*paths, *chains])
        self.clock.lap("cache_s")
        for b, (sequence, decision) in enumerate(zip(schedule.trees, decisions, strict=True)):
            if decision is not None:
                self._commit_tree(b, sequence, decision, scores, batch)
            self._is_committed(sequence, is_decided=decision is not None)
        self._commit_chunks(batch, scores)
        for sequence in schedule.sequences:
            self.scheduler.publish(sequence)
            if sequence.finish_reason is not None:
                self.scheduler.release(sequence)
        ended = (sequence for sequence, _ in schedule.chunks if sequence.finish_reason is not None)
        self.scheduler.unreported += [*schedule.trees, *ended]

    def _is_committed(self, sequence: Sequence, *, is_decided: bool) -> None:
        """Notes that an interrupt no longer undoes what the step did to a sequence. Its next tree is another one."""
        sequence.owed = None
        self._marks.pop(sequence, None)
        if is_decided and sequence.pace is not None:
            last = sequence.records[-1]
            sequence.pace.saw(last.budget, last.num_draft_tokens, last.num_accepted_tokens, last.num_tokens)

    def _commit_tree(self, b: int, sequence: Sequence, decision: Decision, scores: Scores, batch: TreeBatch) -> None:
        tree, verdict, nodes = decision.tree, decision.verdict, part(batch, b)
        drafted = [] if tree is None else tree.tokens[verdict.path].tolist()
        tokens = [*drafted, verdict.next_token]
        if sequence.draft_state is not None and tree is None:
            sequence.missed.add(self._kept_features(scores, batch), nodes.start)
        elif sequence.draft_state is not None:
            features = None if scores.features is None else rows_of(scores.features[nodes], [0, *verdict.path])
            sequence.drafting.observe(sequence, tokens, sequence.drafting.take(features, self.layers), verdict.path)
        before = len(sequence.token_ids)
        try:
            settle(sequence, decision.law, tokens, verdict)
        except Exception as error:
            _fail(sequence, error, "the tokens of a step cannot be written")
        count = len(sequence.token_ids) - before
        sequence.last_tree, sequence.last_path = tree, verdict.path[:count]
        budget, lead = self.schedule.budgets[b].nodes, self.schedule.leads[b]
        seconds = self.clock.seconds | {"verify_s": self.clock.seconds["verify_s"] / (1 + lead)}  # without the prompt
        sequence.records.append(record(sequence, tree, verdict, count, budget=budget, **seconds))

    def _kept_features(self, scores: Scores, batch: TreeBatch) -> Float[Tensor, "m w"] | None:
        """Returns the features of the trees, for a drafter that pauses. Those of prompts are not held any longer."""
        end = batch.bounds[len(self.schedule.trees)]
        if self._kept is None and scores.features is not None:
            self._kept = scores.features if end == len(scores.features) else scores.features[:end].clone()
        return self._kept

    def _commit_chunks(self, batch: TreeBatch, scores: Scores) -> None:
        first = len(self.schedule.trees)
        row = batch.bounds[first] - sum(self.schedule.leads)  # of the logits
        for b, (sequence, count) in enumerate(self.schedule.chunks, start=first):
            if sequence.scores_prompt:
                try:
                    score_prompt(sequence, scores.logits[row : row + count], sequence.cache.length - count)
                except Exception as error:
                    _fail(sequence, error, "the prompt cannot be scored")
                row += count
            if sequence.drafts:
                given = None if scores.features is None else scores.features[part(batch, b)]
                features = sequence.drafting.take(given, self.layers)
                sequence.features += [] if features is None else [features]
                if not sequence.num_missing and sequence.finish_reason is None:
                    sequence.drafting.start(sequence)
            self._marks.pop(sequence, None)

    def give_up(self, error: Exception) -> None:
        """Ends all sequences of a step that failed, with the reason. Raises the error if the step has none."""
        if not self.schedule.sequences:
            self.put_back()
            raise error
        for sequence in self.schedule.sequences:
            if sequence.finish_reason is None:
                _fail(sequence, error, "a step failed")
            self.scheduler.release(sequence)
        self.scheduler.unreported += self.schedule.sequences

    def put_back(self) -> None:
        """Ends a step that was interrupted anywhere. What was committed stays, and the rest is computed again.

        The same trees are drafted again, because what was decided must not change them.
        """
        for sequence, mark in self._marks.items():
            sequence.go_back(mark)
        for sequence, budget in zip(self.schedule.trees, self.schedule.budgets, strict=False):
            if sequence in self._marks and sequence.pace is not None:
                sequence.owed = budget
        sequences = self.schedule.sequences
        self.scheduler.unreported += [sequence for sequence in sequences if sequence.finish_reason is not None]
        self.scheduler.put_back(sequences)


def _fail(sequence: Sequence, error: Exception, what: str) -> None:
    message, hint = told(error)
    own = isinstance(error, UserError)
    sequence.fail(UserError(message if own else f"{what} ({type(error).__name__}: {message or error})", hint), error)


def part(batch: TreeBatch, b: int) -> slice:
    """Returns the slice of the packed nodes that belong to tree b."""
    return slice(batch.bounds[b], batch.bounds[b + 1])
