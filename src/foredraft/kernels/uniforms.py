"""Addressed random numbers of all nodes of packed trees at once. In numpy, and compiled. Both give the same numbers.

The hash is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), used as a counter-based generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt64

from foredraft.kernels.race import GOLDEN, MIX1, MIX2
from foredraft.kernels.sets import Code

Words = UInt64[np.ndarray, "*n"]


def address(numbers: np.ndarray) -> int:
    """Returns where an array is stored."""
    return numbers.__array_interface__["data"][0]


def _mix(words: Words) -> Words:
    """Applies splitmix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(MIX1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(MIX2)
    return words ^ (words >> np.uint64(31))


def sibling_ranks(parents: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Returns how many earlier nodes have the same parent, for each node."""
    order = np.argsort(parents, kind="stable")
    ordered = parents[order]
    ranks = np.empty_like(parents)
    ranks[order] = np.arange(len(parents)) - np.searchsorted(ordered, ordered)
    return ranks


def uniforms(
    *, starts: Sequence[int], words: Sequence[int], offsets: Int[np.ndarray, " b1"], parents: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "p n"]:
    """Returns numbers in [0, 1), multiples of 2**-53, for each purpose and node.

    The address of a child is hashed from that of its parent and its rank among the siblings. The number of a node is hashed
    from the start of its tree and its address.

    Args:
        starts: for each tree, the word of its seed and position.
        words: for each purpose, the address of a root.
        offsets: tree b holds the nodes ``offsets[b]`` to ``offsets[b + 1] - 1``.
        parents: the parent of each node, counted within its tree; -1 for a root.
    """
    sizes, golden = np.diff(offsets), np.uint64(GOLDEN)
    whole = np.where(parents < 0, -1, parents + np.repeat(offsets[:-1], sizes))
    begin, steps = np.repeat(np.array(starts, np.uint64), sizes), (sibling_ranks(whole) + 1).astype(np.uint64) * golden
    addresses = np.repeat(np.array(words, np.uint64)[:, None], len(parents), axis=1)
    level = np.flatnonzero(parents < 0)
    while len(level := np.flatnonzero(np.isin(whole, level))):
        addresses[:, level] = _mix(addresses[:, whole[level]] + steps[level])
    return (_mix(_mix(begin ^ addresses) + golden) >> np.uint64(11)) * 2.0**-53


def uniforms_compiled(
    code: Code, *, starts: Sequence[int], words: Sequence[int], offsets: Int[np.ndarray, " b1"], parents: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "p n"]:
    """Computes `uniforms`.

    Raises:
        MemoryError: there is not enough memory.
    """
    hashed = np.array([*starts, *words], np.uint64)
    shape = np.concatenate([offsets, parents], dtype=np.int64)
    found = np.empty((len(words), len(parents)))
    at, first, trees = address(shape), address(hashed), len(starts)
    if code.uniforms(first, trees, at, at + 8 * len(offsets), first + 8 * trees, len(words), address(found)):
        raise MemoryError("not enough memory for the random numbers of a step")
    return found
