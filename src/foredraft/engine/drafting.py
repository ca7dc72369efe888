"""The drafter of an engine. A failure of the drafter ends the drafting of one request, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items

import torch

from foredraft.cache.blocks import OutOfBlocksError
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Features, Work
from foredraft.core.errors import UserError
from foredraft.core.tree import TreeBatch
from foredraft.engine.request import Sequence

_log = logging.getLogger("foredraft")


class Drafting:
    """Drafts for the sequences of an engine.

    Args:
        drafter: proposes trees.
        rule: decides which nodes are kept.
        most: the largest tree.
    """

    def __init__(self, drafter: Drafter, rule: AcceptanceRule, most: Budget):
        self.drafter, self.rule, self.most = drafter, rule, most

    @property
    def feature_layers(self) -> Items[int]:
        """The target's layers whose features the drafter needs."""
        return self.drafter.feature_layers

    def start(self, sequence: Sequence) -> None:
        """Starts drafting for a sequence whose prompt is in the cache."""
        features = torch.cat(sequence.features) if sequence.features else None
        sequence.features = []
        try:
            sequence.draft_state = self.drafter.start(sequence.token_ids, features, sequence.cache, sequence.first)
        except Exception as error:
            self.switch_off(sequence, error)

    def propose(self, sequences: Items[Sequence], budgets: Items[Budget]) -> TreeBatch | None:
        """Returns one tree per sequence, within its budget. Node 0 is the root.

        Returns None if the drafter failed. It is then switched off for those sequences for which it fails alone, and may be
        asked again for the others. The random numbers are addressed, so their trees do not change.

        Raises:
            OutOfBlocksError: the drafter runs more nodes than its trees keep, and their blocks do not suffice for all.
            ValueError: an option of the user does not fit.
        """
        try:
            return self.drafter.propose(work_of(sequences, budgets))
        except (OutOfBlocksError, UserError):  # more blocks may help; a mistake of the user concerns every request
            raise
        except Exception as error:
            errors = [self._error_alone(*pair) for pair in zip(sequences, budgets, strict=True)]
            for sequence, own in zip(sequences, errors, strict=True):
                if own is not None or not any(errors):
                    self.switch_off(sequence, own or error)
            return None

    def _error_alone(self, sequence: Sequence, budget: Budget) -> Exception | None:
        """Returns the error of drafting for one sequence of a batch that failed. Too few blocks are no failure."""
        try:
            self.drafter.propose(work_of([sequence], [budget]))
        except OutOfBlocksError:
            return None
        except Exception as error:
            return error
        return None

    def observe(self, sequence: Sequence, tokens: Items[int], features: Features | None, path: Items[int]) -> None:
        """Tells the drafter what was committed, see `Drafter.observe`."""
        try:
            self.drafter.observe(sequence.draft_state, tokens, features, path)
        except Exception as error:
            self.switch_off(sequence, error)

    def finish(self, sequence: Sequence) -> None:
        """Releases the drafter's state of a sequence."""
        state, sequence.draft_state, sequence.features = sequence.draft_state, None, []
        if state is not None:
            try:
                self.drafter.finish(state)
            except Exception as error:
                _warn(sequence, error, "what it held may not be released")

    def written(self, sequence: Sequence) -> int:
        """Returns for how many tokens the keys and values of target and drafter are written."""
        if not sequence.nodes:
            return sequence.cache.length
        if sequence.draft_state is None:
            return 0
        try:
            held = self.drafter.written(sequence.draft_state)
        except Exception as error:
            self.switch_off(sequence, error)
            return 0
        return sequence.cache.length if held is None else min(held, sequence.cache.length)

    def switch_off(self, sequence: Sequence, error: Exception) -> None:
        """Ends the drafting of a sequence."""
        _warn(sequence, error, "the request goes on without drafting")
        sequence.nodes, sequence.trail = 0, None  # later blocks lack the drafter's keys and values
        self.finish(sequence)


def _warn(sequence: Sequence, error: Exception, what: str) -> None:
    reason = type(error).__name__, error
    _log.warning("request %s: the drafter failed (%s: %s); %s", sequence.request.request_id, *reason, what)


def work_of(sequences: Items[Sequence], budgets: Items[Budget]) -> Work:
    """Returns the work of a drafter in one step."""
    return Work(
        states=[sequence.draft_state for sequence in sequences],
        roots=[sequence.token_ids[-1] for sequence in sequences],
        budgets=budgets,
        sampling=[sequence.sampling for sequence in sequences],
        draws=[sequence.draws.at(len(sequence.token_ids)) for sequence in sequences],
    )
