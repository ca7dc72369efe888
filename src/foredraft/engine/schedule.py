"""The rows of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from foredraft.core.contracts import Budget
from foredraft.engine.request import Sequence


@dataclass
class Schedule:
    """The rows of one step.

    Attributes:
        trees: sequences that decode. Each runs the root and the nodes of its tree.
        budgets: the largest tree of each of them.
        leads: number of prompt tokens that each of them runs before its root. Then its tree is the root alone.
        chunks: sequences whose prompt is computed, each with the number of tokens that this step adds.
    """

    trees: list[Sequence] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)
    leads: list[int] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of the step."""
        return [*self.trees, *(sequence for sequence, _ in self.chunks)]

    def add_tree(self, sequence: Sequence, budget: Budget, lead: int = 0) -> None:
        """Adds a sequence that decodes."""
        self.trees.append(sequence)
        self.budgets.append(budget)
        self.leads.append(lead)

    def drop(self, sequence: Sequence) -> None:
        """Removes a sequence that is preempted."""
        if sequence in self.trees:
            at = self.trees.index(sequence)
            del self.trees[at], self.budgets[at], self.leads[at]
        self.chunks = [pair for pair in self.chunks if pair[0] is not sequence]
