"""What is left of a law after a rejection; on CPUs where `compiled/laws.c` runs, by that, else by torch."""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.compiled import compiled_for


def subtract(target: Float[Tensor, " v"], draft: Float[Tensor, " v"] | None, token: int) -> Float[Tensor, " v"]:
    """``norm([target - draft]+)``, the law after a rejection; a draft law of None is one-hot at `token`.

    Where nothing is left, the rejection had probability zero but for rounding: the law stays as it was.
    """
    if draft is None:
        left, mass = _remove(target, token)
    else:
        code = compiled_for(target, draft)
        left, mass = _subtract(target, draft) if code is None else _subtract_compiled(code, target, draft)
    return left if mass > 0 else target


def without(draft: Float[Tensor, " v"], token: int) -> Float[Tensor, " v"]:
    """`draft` after `token` was taken out; all zero if it was the last one."""
    return _remove(draft, token)[0]


_Left = tuple[Float[Tensor, " v"], float]
"""What is left of a law, normalised where it has mass, and the mass that it had before."""


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


def _subtract_compiled(code: CDLL, target: Float[Tensor, " v"], draft: Float[Tensor, " v"]) -> _Left:
    """The twin of `_subtract` by `compiled/laws.c`."""
    target, draft, left = target.contiguous(), draft.contiguous(), torch.empty(len(target))
    size = c_int64(len(target))
    mass = code.foredraft_subtract(c_void_p(target.data_ptr()), c_void_p(draft.data_ptr()), size, c_void_p(left.data_ptr()))
    return left, mass


def _without_compiled(code: CDLL, law: Float[Tensor, " v"], token: int) -> _Left:
    """The twin of `_without` by `compiled/laws.c`."""
    law, left = law.contiguous(), torch.empty(len(law))
    mass = code.foredraft_without(c_void_p(law.data_ptr()), c_int64(token), c_int64(len(law)), c_void_p(left.data_ptr()))
    return left, mass
