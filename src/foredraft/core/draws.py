"""Counter-based random numbers: each number has an address and does not depend on the order of calls.

Every random number is a stateless hash of (seed, number of committed tokens, key). A key is (purpose, path of sibling ranks,
index). A draw is thus the same for every call order, every batch and every way to construct the tree. The hash is splitmix64's
finaliser (Steele, Lea, Flood, OOPSLA 2014), used as a counter-based generator. 53 bits of it are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.kernels import run
from foredraft.kernels.race import GOLDEN, MIX1, MIX2

Key = tuple[str, tuple[int, ...], int]
"""(purpose, path of sibling ranks from the root, index)."""

_WORD = (1 << 64) - 1


def mix(word: int) -> int:
    """Applies splitmix64's finaliser, a bijection of 64-bit words whose output bits look independent."""
    word = ((word ^ (word >> 30)) * MIX1) & _WORD
    word = ((word ^ (word >> 27)) * MIX2) & _WORD
    return word ^ (word >> 31)


def hash_seed(seed: int, number: int) -> int:
    """Derives the seed of part `number` from `seed`. A part is, for example, one of n outputs or one request of an engine."""
    return mix((mix(seed & _WORD) + (number + 1) * GOLDEN) & _WORD)


@lru_cache(maxsize=1 << 16)
def _hash_address(purpose: str, path: tuple[int, ...]) -> int:
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    for rank in path:
        word = mix((word + (rank + 1) * GOLDEN) & _WORD)
    return word


@dataclass(frozen=True)
class Draws:
    """The random numbers of one output. The object is immutable, so drawing a number never changes later numbers.

    Attributes:
        seed: any integer; equal seeds give equal numbers.
        num_committed: number of committed tokens, including prompt and root. `at` sets it once per step.
    """

    seed: int
    num_committed: int = 0

    def at(self, num_committed: int) -> Draws:
        """Returns the random numbers of the step that starts with this many committed tokens."""
        return Draws(self.seed, num_committed)

    def _start(self, key: Key) -> int:
        return mix(hash_seed(self.seed, self.num_committed) ^ _hash_address(key[0], key[1]))

    def uniform(self, key: Key) -> float:
        """Returns a number in [0, 1), which is a multiple of 2**-53."""
        return (mix((self._start(key) + (key[2] + 1) * GOLDEN) & _WORD) >> 11) * 2.0**-53

    def bernoulli(self, prob: float, key: Key) -> bool:
        """Returns True with probability `prob`. Probability 0 never gives True, and probability 1 always does."""
        return self.uniform(key) < prob

    def categorical(self, probs: Float[Tensor, " v"], key: Key) -> int:
        """Draws a token from `probs`, which need not be normalised. A token of probability zero is never drawn.

        Raises:
            ValueError: the sum of `probs` is not positive.
        """
        token = run("categorical", probs, uniform=self.uniform(key))
        if token < 0:
            raise ValueError("cannot draw a token from a law without mass: every probability is zero or NaN")
        return token

    def order(self, probs: Float[Tensor, " v"], key: Key, k: int) -> list[int]:
        """Draws `k` tokens from `probs` without replacement; fewer if fewer have positive probability."""
        return self.order_rows([self], probs[None], [key], k)[0]

    @staticmethod
    def of_nodes(
        draws: Sequence[Draws], purposes: Sequence[str], offsets: Int[np.ndarray, " b1"], parents: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "p n"] | None:
        """Computes `uniform` for all nodes of packed trees at once.

        Args:
            draws: the random numbers of each tree.
            purposes: the purposes of the keys.
            offsets: tree b holds the nodes ``offsets[b]`` to ``offsets[b + 1] - 1``.
            parents: the parent of each node, counted within its tree; -1 for a root.

        Returns:
            The number of every key (purpose, path of the node, 0), by purpose and node. None if the draws have outcomes without
            numbers, as a double that enumerates outcomes.
        """
        starts = [hash_seed(own.seed, own.num_committed) for own in draws]
        words = [_hash_address(purpose, ()) for purpose in purposes]
        return run("uniforms", starts=starts, words=words, offsets=offsets, parents=parents)

    @staticmethod
    def order_rows(
        draws: Sequence[Draws],
        probs: Float[Tensor, "n k"],
        keys: Sequence[Key],
        k: int,
        token_ids: Int[Tensor, "n k"] | None = None,
    ) -> list[list[int]]:
        """Computes `order` for many rows at once. Row i is drawn with ``draws[i]`` at ``keys[i]``.

        The method is an exponential race, which is equivalent to Gumbel-top-k. Token t arrives at time -log(u_t) / probs[t],
        where u_t is addressed by t. The first k arrivals are the draws. Times are computed in float64.

        Args:
            token_ids: the token of each entry; None if entry j is token j.

        Returns:
            For each row, the indices of the drawn entries in the order of the draws.
        """
        starts = [row_draws._start(key) for row_draws, key in zip(draws, keys, strict=True)]
        found = run("race", probs, starts=starts, count=min(k, probs.shape[1]), token_ids=token_ids)
        return [
            [entry for time, entry in zip(*row, strict=True) if time < float("inf")]
            for row in zip(found.times.tolist(), found.entries.tolist(), strict=True)
        ]
