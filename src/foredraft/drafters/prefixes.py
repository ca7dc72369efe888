"""Label sequences of CTC frames: the likeliest prefixes, as a tree, and the law of the label after any prefix.

Source: prefix search: Graves et al. 2006, Connectionist Temporal Classification, section 3.2; collapsing: section 3.1.

`compiled/prefixes.c` does the same, many times faster; a test equates the two.
"""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.compiled import library

Labels = tuple[int, ...]

Ends = Sequence[tuple[float, float]]
"""Of some labels, before each frame: the probability that the frames so far stand for them and end in a blank; in a label."""


def likeliest_prefixes(
    tokens: Int[np.ndarray, "l k"],
    probs: Float[np.ndarray, "l k"],
    blanks: Float[np.ndarray, " l"],
    *,
    root: int,
    nodes: int,
    depth: int,
) -> tuple[list[int], list[int]]:
    """The `trie` of what `prefix_search` finds, by the compiled code where that can run.

    Raises:
        MemoryError: there is no room for so many nodes.
    """
    code = library()
    if code is None:
        return trie(prefix_search(tokens, probs, blanks, nodes, depth), root)
    frames = [np.ascontiguousarray(tokens, np.int64), *(np.ascontiguousarray(one, np.float64) for one in (probs, blanks))]
    out = np.empty((2, nodes + 1), np.int64)
    numbers = (ctypes.c_int64(one) for one in (*probs.shape, nodes, depth))
    size = code.foredraft_prefixes(*map(_at, frames), *numbers, *map(_at, out))
    if size < 0:
        raise MemoryError(f"no memory for {nodes} prefixes")
    out[:, 0] = root, -1
    drafted, parents = out[:, :size].tolist()
    return drafted, parents


def _at(numbers: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.ctypes.data)


def prefix_search(
    tokens: Int[np.ndarray, "l k"], probs: Float[np.ndarray, "l k"], blanks: Float[np.ndarray, " l"], nodes: int, depth: int
) -> dict[Labels, float]:
    """The `nodes` likeliest prefixes of at most `depth` labels, the likeliest first, each with the probability that what the
    frames collapse to begins with it, summed over all paths.

    No prefix is likelier than what it extends, so the next best one is always an extension of one that was taken: the search
    is exact. Of equally likely ones the shorter goes first, then the smaller in the order of words.

    Args:
        tokens, probs: the tokens that each frame may take, with their probabilities; others count as impossible.
        blanks: probability of the blank in each frame.
    """
    chances = [dict(zip(*one, strict=True)) for one in zip(tokens.tolist(), probs.tolist(), strict=True)]
    every = sorted({token for frame in chances for token in frame})
    found: dict[Labels, float] = {}
    queue: list[tuple[float, int, Labels]] = []
    ends: dict[Labels, Ends] = {}

    def said(labels: Labels) -> list[float]:
        """Frame by frame, the probability that it completes the labels."""
        *before, token = labels
        return completed([one.get(token, 0.0) for one in chances], ends[labels[:-1]], not before or before[-1] != token)

    def take(labels: Labels) -> None:
        """Follows the labels through the frames and offers what extends them."""
        own = [one.get(labels[-1], 0.0) for one in chances] if labels else [0.0] * len(chances)
        ends[labels] = followed(own, blanks.tolist(), said(labels) if labels else None)
        for token in every if len(labels) < depth else ():
            mass = 0.0
            for one in said((*labels, token)):
                mass += one
            if mass > 0:
                heapq.heappush(queue, (-mass, len(labels), (*labels, token)))

    take(())
    while queue and len(found) < nodes:
        mass, _, labels = heapq.heappop(queue)
        found[labels] = -mass
        take(labels)
    return found


class PrefixLaws:
    """The law of the label that comes next in what frames collapse to, after any labels: the probability that they go on with
    it, over that of all labels which they can go on with. Of a growing tree, whose labels are those of the path to a node.

    Args:
        probs: of each frame the law over the labels and the blank, which stands last.
    """

    def __init__(self, probs: Float[Tensor, "l w"]):
        self._probs, self._blanks = probs, probs[:, -1].tolist()
        self._ends = {0: followed([0.0] * len(probs), self._blanks, None)}

    def logits(self, tokens: Sequence[int], parents: Sequence[int], nodes: Sequence[int]) -> Float[Tensor, "n v"]:
        """Logarithms of the laws after `nodes` of a tree (node 0 is the root, no label); all equal where the frames have no
        room for another label."""
        ends = self._probs.new_tensor([self._ends_of(node, tokens, parents) for node in nodes])
        masses = ends.sum(-1) @ self._probs[:, :-1]
        for row, node in enumerate(nodes):
            if node:  # a repeat is a label only behind a blank
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
    """Frame by frame, the probability that it completes labels whose last one it takes with `chances`.

    Args:
        ends: of the labels before.
        is_new: whether the last label differs from the one before; a repeat is one only behind a blank.
    """
    return [
        chance * (in_blank + in_token if is_new else in_blank)
        for chance, (in_blank, in_token) in zip(chances, ends, strict=True)
    ]


def followed(chances: Sequence[float], blanks: Sequence[float], completes: Sequence[float] | None) -> Ends:
    """`Ends` of labels that each frame `completes` so, and whose last one it takes with `chances`; None: of no labels."""
    ends, now = [], (1.0, 0.0) if completes is None else (0.0, 0.0)
    for chance, blank, entered in zip(chances, blanks, completes or [0.0] * len(chances), strict=True):
        ends.append(now)
        in_blank, in_token = now
        now = (in_blank + in_token) * blank, chance * in_token + entered
    return ends


def trie(prefixes: Sequence[Labels] | dict[Labels, float], root: int) -> tuple[list[int], list[int]]:
    """Prefixes, each behind what it extends, as a tree: tokens and parents, node 0 the root."""
    place = {(): 0} | {labels: i for i, labels in enumerate(prefixes, start=1)}
    return [root, *(labels[-1] for labels in prefixes)], [-1, *(place[labels[:-1]] for labels in prefixes)]


def collapse(path: Sequence[int], blank: int) -> Labels:
    """What a path of frames stands for: repeats merged, then blanks dropped. To be applied once: what comes out may have
    repeats of its own (1 blank 1 stands for 1 1)."""
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return tuple(token for token in merged if token != blank)
