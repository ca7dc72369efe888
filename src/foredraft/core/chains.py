"""Chains that a drafter draws in one call, instead of token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import Work


class ChainWish(NamedTuple):
    """Chains to draw, one per request.

    Attributes:
        depth: tokens of each chain.
        kept: number of most likely tokens that the draft law keeps.
        limits: the parameters of the draft law, see `foredraft.core.law.limits_of`.
        uniforms: returns for each request and token the number that draws the token. None takes the most likely tokens.
    """

    depth: int
    kept: int
    limits: dict[str, Any]
    uniforms: Callable[[], list[list[float]]] | None


class Chains(NamedTuple):
    """Drawn chains: their tokens for each request. If they are sampled, also the laws of all tokens, in the same order.

    If the laws are cut, `token_ids` holds the token of each entry.
    """

    tokens: list[list[int]]
    laws: Float[Tensor, "r k"]
    token_ids: Int[Tensor, "r k"] | None


DrawChains = Callable[[Work, ChainWish], Chains | None]
"""Method ``draw_chains`` of an `Expander` that can draw whole chains in one call. It draws what a `Grower` with ``expand``
draws, or returns None if it cannot."""
