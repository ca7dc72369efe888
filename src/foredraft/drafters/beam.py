"""Label sequences of CTC frames: prefix beam search, and the trie of the likeliest prefixes.

Source: Hannun et al. 2014, First-Pass Large Vocabulary Continuous Speech Recognition (arXiv 1408.2873), Algorithm 1, without
a language model; collapsing: Graves et al. 2006, Connectionist Temporal Classification.

`compiled/beam.c` does the same, many times faster; a test equates the two.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
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
    beam: int,
    root: int,
    nodes: int,
    depth: int,
) -> tuple[list[int], list[int]]:
    """The `trie` of what `prefix_beam` finds, by the compiled code where that can run.

    Raises:
        MemoryError: there is no room for the beam.
    """
    code = library()
    if code is None:
        return trie(prefix_beam(tokens, probs, blanks, beam), root, nodes, depth)
    frames = [np.ascontiguousarray(tokens, np.int64), *(np.ascontiguousarray(one, np.float64) for one in (probs, blanks))]
    out = np.empty((2, nodes + 1), np.int64)
    numbers = (ctypes.c_int64(one) for one in (*probs.shape, beam, nodes, depth))
    size = code.foredraft_beam(*map(_at, frames), *numbers, *map(_at, out))
    if size < 0:
        raise MemoryError(f"no memory for a beam of {beam} sequences")
    out[:, 0] = root, -1
    drafted, parents = out[:, :size].tolist()
    return drafted, parents


def _at(numbers: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.ctypes.data)


def prefix_beam(
    tokens: Int[np.ndarray, "l k"], probs: Float[np.ndarray, "l k"], blanks: Float[np.ndarray, " l"], beam: int
) -> dict[Labels, float]:
    """The likeliest label sequences, each with the probability of all paths that collapse to it, as far as the beam held them.

    Args:
        tokens, probs: the tokens that each frame may take, with their probabilities; others count as impossible.
        blanks: probability of the blank in each frame.
        beam: sequences kept after a frame. With room for all it is exact.
    """
    alive: dict[Labels, tuple[float, float]] = {(): (1.0, 0.0)}  # paths that end in a blank, and those that do not
    for frame, weights, blank in zip(tokens.tolist(), probs.tolist(), blanks.tolist(), strict=True):
        chances = dict(zip(frame, weights, strict=True))
        found: dict[Labels, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for labels, (in_blank, in_token) in alive.items():
            last = labels[-1] if labels else None
            both = in_blank + in_token
            found[labels][0] += both * blank
            if last in chances:
                found[labels][1] += in_token * chances[last]
            for token, chance in chances.items():
                found[(*labels, token)][1] += (in_blank if token == last else both) * chance
        possible = [(labels, both) for labels, both in found.items() if sum(both) > 0]
        best = sorted(possible, key=lambda one: (-sum(one[1]), one[0]))[:beam]
        alive = {labels: (in_blank, in_token) for labels, (in_blank, in_token) in best}
    return {labels: sum(both) for labels, both in alive.items()}


def trie(sequences: dict[Labels, float], root: int, nodes: int, depth: int) -> tuple[list[int], list[int]]:
    """The `nodes` likeliest prefixes of the sequences as a tree: tokens and parents, node 0 the root.

    A prefix is worth the probability of all sequences that begin with it, so none is worth more than what it extends.
    """
    mass: dict[Labels, float] = defaultdict(float)
    for labels, prob in sequences.items():
        for length in range(1, min(len(labels), depth) + 1):
            mass[labels[:length]] += prob
    kept = sorted(mass, key=lambda labels: (-mass[labels], len(labels), labels))[:nodes]
    place = {(): 0} | {labels: i for i, labels in enumerate(kept, start=1)}
    return [root, *(labels[-1] for labels in kept)], [-1, *(place[labels[:-1]] for labels in kept)]


def collapse(path: Sequence[int], blank: int) -> Labels:
    """What a path of frames stands for: repeats merged, then blanks dropped. To be applied once: what comes out may have
    repeats of its own (1 blank 1 stands for 1 1)."""
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return tuple(token for token in merged if token != blank)
