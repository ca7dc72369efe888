"""The most likely prefixes of the label sequences of CTC frames, as a tree. In Python, and compiled.

Source: prefix search: Graves et al. 2006, Connectionist Temporal Classification, section 3.2; collapsing: section 3.1.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from foredraft.kernels.sets import Code

Labels = tuple[int, ...]

Ends = Sequence[tuple[float, float]]
"""For a label sequence, two probabilities before each frame. The first: the frames so far collapse to the sequence and end in a
blank. The second: they collapse to it and end in a label."""


Tree = tuple[list[int], list[int]]
"""Tokens and parents of a tree."""


def prefixes(
    tokens: Int[np.ndarray, "l k"],
    probs: Float[np.ndarray, "l k"],
    blanks: Float[np.ndarray, " l"],
    *,
    root: int,
    nodes: int,
    depth: int,
) -> Tree:
    """Returns the `trie` of the prefixes that `prefix_search` finds."""
    return trie(prefix_search(tokens, probs, blanks, nodes, depth), root)


def prefixes_compiled(
    code: Code,
    tokens: Int[np.ndarray, "l k"],
    probs: Float[np.ndarray, "l k"],
    blanks: Float[np.ndarray, " l"],
    *,
    root: int,
    nodes: int,
    depth: int,
) -> Tree:
    """Computes `prefixes`, many times faster.

    Raises:
        MemoryError: there is not enough memory for the nodes.
    """
    frames = [np.ascontiguousarray(tokens, np.int64), *(np.ascontiguousarray(row, np.float64) for row in (probs, blanks))]
    out = np.empty((2, nodes + 1), np.int64)
    size = code.prefixes(*map(_address, frames), *probs.shape, nodes, depth, *map(_address, out))
    if size < 0:
        raise MemoryError(f"no memory for {nodes} prefixes")
    out[:, 0] = root, -1
    drafted, parents = out[:, :size].tolist()
    return drafted, parents


def _address(numbers: np.ndarray) -> int:
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
