"""Residuals of laws after a rejection."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from foredraft.kernels import run


def subtract(target: Float[Tensor, " v"], draft: Float[Tensor, " v"] | None, token: int) -> Float[Tensor, " v"]:
    """Returns ``norm([target - draft]+)``, the target's law after a rejection.

    If the residual has no mass, the rejection had probability 0 up to rounding. The function then returns `target`.

    Args:
        target: the target's law.
        draft: the draft law. None is one-hot at `token`.
        token: the rejected token.
    """
    left, mass = run("without", target, token=token) if draft is None else run("subtract", target, draft)
    return left if mass > 0 else target


def without(draft: Float[Tensor, " v"], token: int) -> Float[Tensor, " v"]:
    """Returns the draft law without `token`, normalised. All zero if `token` was the only one."""
    return run("without", draft, token=token)[0]
