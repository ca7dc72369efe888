"""Label sequences of CTC frames: the law of the label after any prefix.

Source: prefix search: Graves et al. 2006, Connectionist Temporal Classification, section 3.2; collapsing: section 3.1.

`foredraft.kernels.prefixes` searches the prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from foredraft.kernels.prefixes import Ends, completed, followed


class PrefixLaws:
    """The law of the next label of the collapsed sequence, after the path to any node of a growing tree.

    The law of a label is the probability that the sequence continues with it, divided by the sum over all labels.

    Args:
        probs: for each frame, the law over the labels and the blank, which is the last entry.
    """

    def __init__(self, probs: Float[Tensor, "l w"]):
        self._probs, self._blanks = probs, probs[:, -1].tolist()
        self._ends = {0: followed([0.0] * len(probs), self._blanks, None)}

    def logits(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> Float[Tensor, "n v"]:
        """Returns the logarithms of the laws after `nodes` of a tree, up to a constant per row.

        Node 0 is the root and has no label. All entries of a row are equal if the frames cannot hold another label.
        """
        ends = self._probs.new_tensor([self._ends_of(node, tokens, parents) for node in nodes])
        masses = ends.sum(-1) @ self._probs[:, :-1]
        for row, node in enumerate(nodes):
            if node:  # a repeated label counts only after a blank
                masses[row, tokens[node]] = ends[row, :, 0] @ self._probs[:, tokens[node]]
        masses[masses.sum(-1) == 0] = 1
        return masses.log()

    def _ends_of(self, node: int, tokens: Sequence[int], parents: Sequence[int]) -> Ends:
        if node not in self._ends:
            own, before = self._probs[:, tokens[node]].tolist(), self._ends_of(parents[node], tokens, parents)
            is_new = not parents[node] or tokens[parents[node]] != tokens[node]
            self._ends[node] = followed(own, self._blanks, completed(own, before, is_new))
        return self._ends[node]
