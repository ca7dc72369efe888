"""The planted bias of the audit's negative control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from foredraft.core.draws import Draws, Key

PLANTED = 0.15
"""Amount that the negative control adds to every acceptance probability."""


@dataclass(frozen=True)
class Eager(Draws):
    """Draws that accept too often. They are the planted bias of the negative control."""

    def at(self, num_committed: int) -> Eager:
        """Returns the draws of a step."""
        return Eager(self.seed, num_committed)

    def bernoulli(self, prob: float, key: Key) -> bool:
        """Returns True with probability `prob` + `PLANTED`."""
        return super().bernoulli(min(1.0, prob + PLANTED), key)

    @staticmethod
    def of_nodes(
        draws: Sequence[Draws], purposes: Sequence[str], offsets: Int[np.ndarray, " b1"], parents: Int[np.ndarray, " n"]
    ) -> Float[np.ndarray, "p n"] | None:
        """Returns the numbers of `Draws.of_nodes`. Those that accept are lowered by `PLANTED`, so a test passes as often."""
        numbers = Draws.of_nodes(draws, purposes, offsets, parents)
        if numbers is not None:
            numbers[[purpose == "accept" for purpose in purposes]] -= PLANTED
        return numbers
