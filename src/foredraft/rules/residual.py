"""Residuals of laws after a rejection. `kernels/c/laws.h` computes them where it runs, else torch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.kernels import Code, compiled_for


def subtract(target: Float[Tensor, " v"], draft: Float[Tensor, " v"] | None, token: int) -> Float[Tensor, " v"]:
    """Returns ``norm([target - draft]+)``, the target's law after a rejection.

    If the residual has no mass, the rejection had probability 0 up to rounding. The function then returns `target`.

    Args:
        target: the target's law.
        draft: the draft law. None is one-hot at `token`.
        token: the rejected token.
    """
    if draft is None:
        left, mass = _remove(target, token)
    else:
        code = compiled_for(target, draft)
        left, mass = _subtract(target, draft) if code is None else _subtract_compiled(code, target, draft)
    return left if mass > 0 else target


def without(draft: Float[Tensor, " v"], token: int) -> Float[Tensor, " v"]:
    """Returns the draft law without `token`, normalised. All zero if `token` was the only one."""
    return _remove(draft, token)[0]


_Left = tuple[Float[Tensor, " v"], float]
"""A residual, normalised if it has mass, and its mass before normalisation."""


def _remove(law: Float[Tensor, " v"], token: int) -> _Left:
    code = compiled_for(law)
    return _without(law, token) if code is None else _without_compiled(code, law, token)


def _subtract(target: Float[Tensor, " v"], draft: Float[Tensor, " v"]) -> _Left:
    return _normalized((target - draft).clamp_(min=0.0))


def _normalized(law: Float[Tensor, " v"]) -> _Left:
    mass = float(law.sum())
    return law / mass if mass > 0 else law, mass


def _without(law: Float[Tensor, " v"], token: int) -> _Left:
    left = law.clone()
    left[token] = 0.0
    return _normalized(left)


def _subtract_compiled(code: Code, target: Float[Tensor, " v"], draft: Float[Tensor, " v"]) -> _Left:
    """Computes `_subtract` in `kernels/c/laws.h`."""
    target, draft, left = target.contiguous(), draft.contiguous(), torch.empty(len(target))
    return left, code.subtract(target.data_ptr(), draft.data_ptr(), len(target), left.data_ptr())


def _without_compiled(code: Code, law: Float[Tensor, " v"], token: int) -> _Left:
    """Computes `_without` in `kernels/c/laws.h`."""
    law, left = law.contiguous(), torch.empty(len(law))
    return left, code.without(law.data_ptr(), token, len(law), left.data_ptr())
