"""Label sequences of CTC frames: the most likely prefixes as a tree, and the law of the label after any prefix.

Source: prefix search: Graves et al. 2006, Connectionist Temporal Classification, section 3.2; collapsing: section 3.1.

`kernels/c/prefixes.c` computes the tree many times faster. A test compares the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.kernels import library

Labels = tuple[int, ...]

Ends = Sequence[tuple[float, float]]
"""For a label sequence, two probabilities before each frame. The first: the frames so far collapse to the sequence and end in a
blank. The second: they collapse to it and end in a label."""


def likeliest_prefixes(
    tokens: Int[np.ndarray, "l k"],
    probs: Float[np.ndarray, "l k"],
    blanks: Float[np.ndarray, " l"],
    *,
    root: int,
    nodes: int,
    depth: int,
) -> tuple[list[int], list[int]]:
    """Returns the `trie` of the prefixes that `prefix_search` finds. Uses compiled code if it can run.

    Raises:
        MemoryError: there is not enough memory for the nodes.
    """
    code = library()
    if code is None:
        return trie(prefix_search(tokens, probs, blanks, nodes, depth), root)
    frames = [np.ascontiguousarray(tokens, np.int64), *(np.ascontiguousarray(row, np.float64) for row in (probs, blanks))]
    out = np.empty((2, nodes + 1), np.int64)
    size = code.prefixes(*map(_at, frames), *probs.shape, nodes, depth, *map(_at, out))
    if size < 0:
        raise MemoryError(f"no memory for {nodes} prefixes")
    out[:, 0] = root, -1
    drafted, parents = out[:, :size].tolist()
    return drafted, parents


def _at(numbers: np.ndarray) -> int:
    return numbers.ctypes.data


def prefix_search(
    tokens: Int[np.ndarray, "l k"], probs: Float[np.ndarray, "l k"], blanks: Float[np.ndarray, " l"], nodes: int, depth: int
) -> dict[Labels, float]:
    """Returns the `nodes` most likely prefixes of at most `depth` labels, in descending order, with their probabilities.

    The probability of a prefix is that of all paths whose collapsed sequence begins with the prefix. No prefix is more likely
    than the prefix that it extends. The next best prefix is thus always an extension of one already found, and the search is
    exact. Among equally likely prefixes, the shorter comes first, then the lexicographically smaller.

    Args:
        tokens, probs: the tokens that each frame may take, and their probabilities. Other tokens have probability 0.
        blanks: probability of the blank in each frame.
    """
    chances = [dict(zip(*frame, strict=True)) for frame in zip(tokens.tolist(), probs.tolist(), strict=True)]
    every = sorted({token for frame in chances for token in frame})
    found: dict[Labels, float] = {}
    queue: list[tuple[float, int, Labels]] = []
    ends: dict[Labels, Ends] = {}

    def completions(labels: Labels) -> list[float]:
        """Returns for each frame the probability that it completes the labels."""
        *before, token = labels
        return completed([frame.get(token, 0.0) for frame in chances], ends[labels[:-1]], not before or before[-1] != token)

    def take(labels: Labels) -> None:
        """Computes the `Ends` of the labels and pushes their extensions onto the queue."""
        own = [frame.get(labels[-1], 0.0) for frame in chances] if labels else [0.0] * len(chances)
        ends[labels] = followed(own, blanks.tolist(), completions(labels) if labels else None)
        for token in every if len(labels) < depth else ():
            mass = 0.0
            for completion in completions((*labels, token)):
                mass += completion
            if mass > 0:
                heapq.heappush(queue, (-mass, len(labels), (*labels, token)))

    take(())
    while queue and len(found) < nodes:
        mass, _, labels = heapq.heappop(queue)
        found[labels] = -mass
        take(labels)
    return found


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


def completed(chances: Sequence[float], ends: Ends, is_new: bool) -> list[float]:
    """Returns for each frame the probability that it completes a label sequence.

    Args:
        chances: probability of the last label in each frame.
        ends: `Ends` of the sequence without its last label.
        is_new: whether the last label differs from the label before. A repeated label counts only after a blank.
    """
    return [
        chance * (in_blank + in_token if is_new else in_blank)
        for chance, (in_blank, in_token) in zip(chances, ends, strict=True)
    ]


def followed(chances: Sequence[float], blanks: Sequence[float], completes: Sequence[float] | None) -> Ends:
    """Returns the `Ends` of a label sequence.

    Args:
        chances: probability of the last label in each frame.
        blanks: probability of the blank in each frame.
        completes: for each frame, the probability that it completes the sequence; None for the empty sequence.
    """
    ends, now = [], (1.0, 0.0) if completes is None else (0.0, 0.0)
    for chance, blank, entered in zip(chances, blanks, completes or [0.0] * len(chances), strict=True):
        ends.append(now)
        in_blank, in_token = now
        now = (in_blank + in_token) * blank, chance * in_token + entered
    return ends


def trie(prefixes: Sequence[Labels] | dict[Labels, float], root: int) -> tuple[list[int], list[int]]:
    """Returns tokens and parents of the tree of `prefixes`. Node 0 is the root. A prefix must follow the one it extends."""
    place = {(): 0} | {labels: i for i, labels in enumerate(prefixes, start=1)}
    return [root, *(labels[-1] for labels in prefixes)], [-1, *(place[labels[:-1]] for labels in prefixes)]


def collapse(path: Sequence[int], blank: int) -> Labels:
    """Collapses a path of frames: merges repeats, then removes blanks.

    Apply it only once, because the result may contain repeats: the path 1 blank 1 collapses to 1 1.
    """
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return tuple(token for token in merged if token != blank)
