"""One step of the engine: schedule -> propose -> forward -> decide -> commit."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from foredraft.cache.blocks import OutOfBlocksError
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
    now = Step(target, scheduler, drafting)
    try:
        now.schedule = scheduler.schedule()
        batch = now.propose()
        if not now.schedule.sequences:
            return []
        scores = now.forward(batch)
        decisions = now.decide(batch, scores)
        return now.commit(batch, scores, decisions)
    except Exception as error:
        return now.give_up(error)
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
class Decision:
    """What was decided on the tree of a sequence. `tree` is None for plain decoding."""

    tree: DraftTree | None
    law: TargetLaw
    verdict: Verdict


@dataclass
class Step:
    """One step while it runs.

    Attributes:
        drafting: None for plain decoding.
        schedule: what the step runs. Trees come first in every batch, then the chunks of prompts.
    """

    target: Target
    scheduler: Scheduler
    drafting: Drafting | None
    schedule: Schedule = field(default_factory=Schedule)
    clock: Clock = field(default_factory=Clock)

    def propose(self) -> TreeBatch:
        """Returns what the target runs: a tree for each sequence that decodes, and a chain for each chunk of a prompt."""
        able, drafted = self._draft()
        if drafted is None or len(able) < len(self.schedule.sequences):
            drafted = self._joined({} if drafted is None else {b: drafted[i] for i, b in enumerate(able)})
        self.clock.lap("draft_s")
        return drafted

    def _joined(self, grown: Mapping[int, DraftTree]) -> TreeBatch:
        """Returns the batch of the step. Sequences without a tree in `grown` run their root alone."""
        chunks = [sequence.token_ids[sequence.cache.length :][:count] for sequence, count in self.schedule.chunks]
        others = TreeBatch.chains([*(sequence.token_ids[-1:] for sequence in self.schedule.trees), *chunks])
        return TreeBatch.joined([grown.get(b) or others[b] for b in range(len(others))]) if grown else others

    def _draft(self) -> tuple[list[int], TreeBatch | None]:
        """Returns which of the sequences draft, and their trees. Preempts others if blocks do not suffice for the drafter."""
        while self.drafting is not None:
            schedule = self.schedule
            states = [sequence.draft_state for sequence in schedule.trees]
            able = [b for b, budget in enumerate(schedule.budgets) if budget.nodes and states[b] is not None]
            if not able:
                break
            try:
                found = self.drafting.propose([schedule.trees[b] for b in able], [schedule.budgets[b] for b in able])
                if found is not None:
                    return able, found
            except OutOfBlocksError as error:  # random numbers are addressed, so drafting again gives the same trees
                if len(self.scheduler.running) == 1:
                    self.drafting.switch_off(schedule.trees[0], error)
                else:
                    self.scheduler.make_room(schedule)
        return [], None

    def forward(self, batch: TreeBatch) -> Scores:
        """Runs the target once. Logits are computed for the nodes of trees, and for prompts that are scored."""
        rows, sequences = None, self.schedule.sequences
        if self.schedule.chunks:
            scored = [True] * len(self.schedule.trees) + [sequence.scores_prompt for sequence, _ in self.schedule.chunks]
            rows = np.flatnonzero(np.repeat(scored, np.diff(batch.offsets)))
        reads = self.drafting is not None and any(sequence.nodes for sequence in sequences)
        layers = self.drafting.feature_layers if reads and self.drafting is not None else ()
        scores = self.target.forward(batch, [sequence.cache for sequence in sequences], rows, feature_layers=layers)
        self.clock.lap("verify_s")
        return scores

    def decide(self, batch: TreeBatch, scores: Scores) -> list[Decision | None]:
        """Applies the rule to each tree. A sequence whose law or rule fails ends with the reason."""
        decisions: list[Decision | None] = []
        for b, sequence in enumerate(self.schedule.trees):
            try:
                decisions.append(self._decision(sequence, batch, b, scores))
            except Exception as error:
                _fail(sequence, error, "the tokens of a step cannot be decided")
                decisions.append(None)
        self.clock.lap("rule_s")
        return decisions

    def _decision(self, sequence: Sequence, batch: TreeBatch, b: int, scores: Scores) -> Decision:
        logits, draws = scores.logits[part(batch, b)], sequence.draws.at(len(sequence.token_ids))
        if self.drafting is None or sequence.draft_state is None:
            law = law_of(sequence, logits, None)
            token = law.token(0) if law.is_certain else draws.categorical(law.row(0), ("next", (), 0))
            return Decision(None, law, Verdict([], token, "plain"))
        tree = batch[b]
        law = law_of(sequence, logits, tree)
        return Decision(tree, law, self.drafting.rule(tree, law, draws))

    def commit(self, batch: TreeBatch, scores: Scores, decisions: Items[Decision | None]) -> list[Sequence]:
        """Keeps the accepted paths, tells the drafter, cuts outputs at a stop, and releases those that ended."""
        schedule = self.schedule
        paths = [decision.verdict.path if decision else [] for decision in decisions]
        chains = [range(1, count) for _, count in schedule.chunks]
        self.scheduler.pool.keep([sequence.cache for sequence in schedule.sequences], [*paths, *chains])
        self.clock.lap("cache_s")
        for b, (sequence, decision) in enumerate(zip(schedule.trees, decisions, strict=True)):
            if decision is not None:
                self._commit_tree(sequence, decision, scores, part(batch, b))
        self._commit_chunks(batch, scores)
        for sequence in schedule.sequences:
            self.scheduler.publish(sequence)
            if sequence.finish_reason is not None:
                self.scheduler.release(sequence)
        return [*schedule.trees, *(sequence for sequence, _ in schedule.chunks if sequence.finish_reason is not None)]

    def _commit_tree(self, sequence: Sequence, decision: Decision, scores: Scores, nodes: slice) -> None:
        tree, verdict = decision.tree, decision.verdict
        drafted = [] if tree is None else tree.tokens[verdict.path].tolist()
        tokens = [*drafted, verdict.next_token]
        if self.drafting is not None and sequence.draft_state is not None:
            features = None if scores.features is None else rows_of(scores.features[nodes], [0, *verdict.path])
            self.drafting.observe(sequence, tokens, features, verdict.path)
        before = len(sequence.token_ids)
        try:
            settle(sequence, decision.law, tokens, verdict)
        except Exception as error:
            _fail(sequence, error, "the tokens of a step cannot be written")
        count = len(sequence.token_ids) - before
        sequence.last_tree, sequence.last_path = tree, verdict.path[:count]
        sequence.records.append(record(sequence, tree, verdict, count, **self.clock.seconds))

    def _commit_chunks(self, batch: TreeBatch, scores: Scores) -> None:
        first = len(self.schedule.trees)
        row = int(batch.offsets[first])  # of the logits
        for b, (sequence, count) in enumerate(self.schedule.chunks, start=first):
            if sequence.scores_prompt:
                try:
                    score_prompt(sequence, scores.logits[row : row + count], sequence.cache.length - count)
                except Exception as error:
                    _fail(sequence, error, "the prompt cannot be scored")
                row += count
            if self.drafting is not None and sequence.nodes:
                sequence.features += [] if scores.features is None else [scores.features[part(batch, b)]]
                if not sequence.num_missing and sequence.finish_reason is None:
                    self.drafting.start(sequence)

    def give_up(self, error: Exception) -> list[Sequence]:
        """Ends all sequences of a step that failed, with the reason. Raises the error if the step has none."""
        if not self.schedule.sequences:
            self.put_back()
            raise error
        for sequence in self.schedule.sequences:
            if sequence.finish_reason is None:
                _fail(sequence, error, "a step failed")
            self.scheduler.release(sequence)
        return self.schedule.sequences

    def put_back(self) -> None:
        """Ends a step that was interrupted anywhere. What was committed stays, and the rest is computed again."""
        for sequence in dict.fromkeys([*self.schedule.sequences, *self.scheduler.running]):
            if sequence.finish_reason is not None:
                self.scheduler.release(sequence)
                self.scheduler.unreported.append(sequence)
            elif sequence.cache is not None:
                self.scheduler.preempt(sequence)


def _fail(sequence: Sequence, error: Exception, what: str) -> None:
    message, hint = told(error)
    own = isinstance(error, UserError)
    sequence.fail(UserError(message if own else f"{what} ({type(error).__name__}: {message or error})", hint), error)


def part(batch: TreeBatch, b: int) -> slice:
    """Returns the slice of the packed nodes that belong to tree b."""
    return slice(int(batch.offsets[b]), int(batch.offsets[b + 1]))
