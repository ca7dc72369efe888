"""The drafter of an engine. A failure of the drafter ends the drafting of one request, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.cache.blocks import OutOfBlocksError
from foredraft.core.contracts import AcceptanceRule, Budget, Drafter, Features, Work
from foredraft.core.costs import Costs
from foredraft.core.errors import UserError, unknown_name
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.engine.pace import MOST_PENDING, Pace, allot
from foredraft.engine.request import Missed, Sequence
from foredraft.rules.batched import batched_form

_log = logging.getLogger("foredraft")

NOTHING = Budget(0, 0)
"""The budget of a step without a tree."""


class Drafting:
    """One way of drafting of an engine.

    Args:
        drafter: proposes trees.
        rule: decides which nodes are kept.
        most: the largest tree.
        name: name by which a request chooses it.
        max_nodes: gives the maximum number of tree nodes of a request, within `most`; None uses the whole budget.
        costs: gives the costs of steps for a request. By these, its number of nodes follows the load and its accepted tokens.
            None keeps the number.
        fixed_load: number of running requests that is assumed for a request that keeps its number of nodes.
    """

    def __init__(
        self,
        drafter: Drafter,
        rule: AcceptanceRule,
        most: Budget,
        *,
        name: str = "",
        max_nodes: Callable[[SamplingParams], int] | None = None,
        costs: Callable[[SamplingParams], Costs | None] | None = None,
        fixed_load: int = 1,
    ):
        self.drafter, self.rule, self.most, self.name = drafter, rule, most, name
        self._max_nodes, self._costs, self._fixed_load = max_nodes, costs, fixed_load

    @property
    def rule(self) -> AcceptanceRule:
        """The rule that verifies its trees."""
        return self._rule

    @rule.setter
    def rule(self, rule: AcceptanceRule) -> None:
        """Sets the rule."""
        self._rule, self._batches = rule, batched_form(rule)

    @property
    def holds_tokens(self) -> bool:
        """Whether the drafter keeps features, keys or values of the tokens, which lookup does not."""
        return bool(self.drafter.bytes_per_token or self.drafter.feature_layers)

    def batches(self, tree: DraftTree) -> bool:
        """Returns whether `foredraft.rules.batched.verify` gives the verdict of the rule on a tree."""
        return self._batches is not None and self._batches(tree)

    def take(self, features: Float[Tensor, "m w"] | None, places: Items[int]) -> Float[Tensor, "m d"] | None:
        """Returns the features of the drafter's own layers.

        Args:
            features: features of all layers that the drafters of the engine need, side by side.
            places: these layers, in the same order.
        """
        own = [*self.drafter.feature_layers]
        if features is None or not own or own == list(places):
            return features if own else None
        return features.unflatten(1, (len(places), -1))[:, [places.index(layer) for layer in own]].flatten(1)

    def size(self, sampling: SamplingParams, *, is_fixed: bool) -> tuple[int, Pace | None]:
        """Returns the maximum number of nodes of the trees of a request, and what changes the number from step to step.

        Args:
            is_fixed: whether the request keeps its number, which is then the one that pays with `fixed_load` running requests.
                It is 0 if drafting does not pay with so many.
        """
        nodes = min(self.most.nodes, self._max_nodes(sampling)) if self._max_nodes else self.most.nodes
        costs = self._costs(sampling) if self._costs is not None else None
        if costs is None or not nodes:
            return nodes, None
        return (min(nodes, costs.for_all(self._fixed_load)), None) if is_fixed else (nodes, Pace(costs))

    def start(self, sequence: Sequence) -> None:
        """Starts drafting for a sequence whose prompt is in the cache."""
        features = torch.cat(sequence.features) if sequence.features else None
        sequence.features = []
        if sequence.pace is not None:
            sequence.pace.pending = 0
        try:
            sequence.draft_state = self.drafter.start(sequence.token_ids, features, sequence.cache, sequence.first)
        except Exception as error:
            self.switch_off(sequence, error)

    def propose(self, sequences: Items[Sequence], budgets: Items[Budget]) -> TreeBatch | None:
        """Returns one tree per sequence, within its budget. Node 0 is the root.

        Returns None if the drafter failed. It is then asked for each sequence alone, and switched off where it fails again, or
        for all if it never does. For the others, `propose` may be called again. Random numbers are addressed, so their trees do
        not change.

        Raises:
            OutOfBlocksError: the drafter runs more nodes than its trees keep, and their blocks do not suffice for all.
            ValueError: an option of the user does not fit any of the sequences.
        """
        try:
            return self.drafter.propose(work_of(sequences, budgets))
        except OutOfBlocksError:  # more blocks may help
            raise
        except Exception as error:
            errors = [self._error_alone(*pair) for pair in zip(sequences, budgets, strict=True)]
            if isinstance(error, UserError) and all(isinstance(own, UserError) for own in errors):
                raise
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

    def catch_up(self, sequence: Sequence, places: Items[int]) -> None:
        """Tells the drafter what was committed while it paused. `places` is as in `take`."""
        missed, sequence.missed = sequence.missed, Missed()
        if missed:
            self.observe(sequence, sequence.token_ids[-len(missed) :], self.take(missed.joined(), places), [])

    def finish(self, sequence: Sequence) -> None:
        """Releases the drafter's state of a sequence."""
        state, sequence.draft_state, sequence.features, sequence.missed = sequence.draft_state, None, [], Missed()
        if state is not None:
            try:
                self.drafter.finish(state)
            except Exception as error:
                _warn(sequence, error, "what it held may not be released")

    def switch_off(self, sequence: Sequence, error: Exception | None = None) -> None:
        """Ends the drafting of a sequence. Its later blocks lack the drafter's keys and values, so they are not published."""
        if error is not None:
            _warn(sequence, error, "the request goes on without drafting")
        sequence.nodes, sequence.trail = 0, None
        self.finish(sequence)

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


def _warn(sequence: Sequence, error: Exception, what: str) -> None:
    reason = type(error).__name__, error
    _log.warning("request %s: the drafter failed (%s: %s); %s", sequence.request.request_id, *reason, what)


def drafted_by(
    sampling: SamplingParams, default: Drafting | None, draftings: Items[Drafting], *, reproducible: bool = False
) -> tuple[Drafting | None, int, Pace | None]:
    """Returns how a request drafts, its largest number of nodes, and what changes it from step to step.

    Args:
        reproducible: whether every request keeps its number of nodes. One with a seed of its own always does.

    Raises:
        ValueError: `SamplingParams.speculative` names a method or a size that the engine was not given.
    """
    wish, drafting = sampling.speculative, default
    if wish is False:
        return None, 0, None
    if wish is not None:
        named = {other.name: other for other in draftings}
        if wish["method"] not in named:
            raise unknown_name("method of a request", wish["method"], named)
        drafting = named[wish["method"]]
    if drafting is None:
        return None, 0, None
    fixed = None if wish is None else wish.get("num_speculative_tokens")
    if fixed is None:
        return drafting, *drafting.size(sampling, is_fixed=reproducible or sampling.seed is not None)
    if fixed > drafting.most.nodes:
        raise UserError(
            f"num_speculative_tokens of a request must be at most {drafting.most.nodes}, got {fixed}",
            "name a larger num_speculative_tokens at the start",
        )
    return drafting, fixed, None


def budgets_of(sequences: Items[Sequence], requests: int, besides: int) -> list[Budget]:
    """Returns the largest trees of the next step of some sequences that decode.

    Args:
        requests, besides: as in `allot`.
    """
    budgets: list[Budget] = []
    paced: dict[int, Pace] = {}  # by place
    for sequence in sequences:
        budget, pace = NOTHING, sequence.pace
        if sequence.draft_state is None or sequence.room <= 1:
            pass  # a tree needs room for a token behind it
        elif pace is None:
            budget = sequence.budget(sequence.drafting.most)
        elif sequence.owed is not None:
            budget = sequence.owed
        elif pace.pending > MOST_PENDING and sequence.drafting.holds_tokens:
            sequence.drafting.switch_off(sequence)
        else:
            paced[len(budgets)] = pace
        budgets.append(budget)
    if paced:
        fixed = sum(budget.nodes for budget in budgets)
        for i, nodes in zip(paced, allot([*paced.values()], requests, besides + fixed), strict=True):
            if nodes:
                budgets[i] = sequences[i].budget(Budget(nodes, sequences[i].drafting.most.depth))
    return budgets


def work_of(sequences: Items[Sequence], budgets: Items[Budget]) -> Work:
    """Returns the work of a drafter in one step."""
    return Work(
        states=[sequence.draft_state for sequence in sequences],
        roots=[sequence.token_ids[-1] for sequence in sequences],
        budgets=budgets,
        sampling=[sequence.sampling for sequence in sequences],
        draws=[sequence.draws.at(len(sequence.token_ids)) for sequence in sequences],
    )
