"""Chains that a drafter draws in one call, instead of token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Work


class ChainWish(NamedTuple):
    """Chains to draw, one per request.

    Attributes:
        depth: tokens of each chain.
        limits: the parameters of the draft law, see `foredraft.core.law.limits_of`.
        uniforms: for each request and token, the number that draws the token. None takes the most likely tokens.
    """

    depth: int
    limits: dict[str, Any]
    uniforms: list[list[float]] | None


class Chains(NamedTuple):
    """Drawn chains: their tokens for each request, and the law of each token in the same order if they are sampled."""

    tokens: list[list[int]]
    laws: Float[Tensor, "r v"]


DrawChains = Callable[[Work, ChainWish], Chains | None]
"""Method ``draw_chains`` of an `Expander` that can draw whole chains in one call. It draws what a `Grower` with ``expand``
draws, or returns None if it cannot."""
