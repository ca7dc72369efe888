"""Label sequences of CTC frames: the likeliest prefixes, as a tree.

Source: prefix search: Graves et al. 2006, Connectionist Temporal Classification, section 3.2; collapsing: section 3.1.

`compiled/prefixes.c` does the same, many times faster; a test equates the two.
"""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from foredraft.compiled import library

Labels = tuple[int, ...]


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
    ends: dict[Labels, list[tuple[float, float]]] = {}  # before each frame: paths so far that end in a blank, and in a token

    def said(labels: Labels) -> list[float]:
        """Frame by frame, the probability that it completes the labels."""
        *before, token = labels
        is_new = not before or before[-1] != token  # a repeat is one only behind a blank
        return [
            frame.get(token, 0.0) * (in_blank + in_token if is_new else in_blank)
            for frame, (in_blank, in_token) in zip(chances, ends[labels[:-1]], strict=True)
        ]

    def take(labels: Labels) -> None:
        """Follows the labels through the frames and offers what extends them."""
        new = said(labels) if labels else [0.0] * len(chances)
        now = (0.0, 0.0) if labels else (1.0, 0.0)
        ends[labels] = []
        for frame, blank, entered in zip(chances, blanks.tolist(), new, strict=True):
            ends[labels].append(now)
            in_blank, in_token = now
            repeated = frame.get(labels[-1], 0.0) * in_token if labels else 0.0
            now = (in_blank + in_token) * blank, repeated + entered
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


def trie(prefixes: Sequence[Labels] | dict[Labels, float], root: int) -> tuple[list[int], list[int]]:
    """Prefixes, each behind what it extends, as a tree: tokens and parents, node 0 the root."""
    place = {(): 0} | {labels: i for i, labels in enumerate(prefixes, start=1)}
    return [root, *(labels[-1] for labels in prefixes)], [-1, *(place[labels[:-1]] for labels in prefixes)]


def collapse(path: Sequence[int], blank: int) -> Labels:
    """What a path of frames stands for: repeats merged, then blanks dropped. To be applied once: what comes out may have
    repeats of its own (1 blank 1 stands for 1 1)."""
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return tuple(token for token in merged if token != blank)
