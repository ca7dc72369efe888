"""Linear layers, plain and packed, and norms: the part of a forward that costs.

`plain` is `F.linear`. `packed` holds the weight in the blocked layout of oneDNN's bfloat16 kernels (`torch.ops.mkldnn`, the
operators that torch.compile uses on a CPU): a weight is laid out once at load and not at every call, which is what makes a few
rows cheap. The operators are private to torch, so `can_pack` tries them, and a test equates the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Linear = Callable[..., Tensor]
"""``(x [m, i], residual [m, o] | None) -> [m, o]``: x W^T + bias, plus the residual."""

_ROWS = 8
"""Rows that the blocked layout is made for; 4 to 32 give like layouts, and without a number none is chosen."""


def make_linear(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, *, packed: bool) -> Linear:
    """A linear layer; `packed` needs `can_pack`."""
    return pack(weight, bias) if packed else plain(weight, bias)


def plain(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> Linear:
    """The layer as torch computes it, on every device and in every dtype."""

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if residual is None else residual + out

    return run


def pack(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> Linear:
    """The layer with its weight in blocked layout; the residual is added within the kernel, before rounding."""
    operator = torch.ops.mkldnn._linear_pointwise
    run_alone, run_binary = operator.default, operator.binary
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return run_alone(x, blocked, bias, "none", [], "")
        return run_binary(x, residual, blocked, bias, "add")

    return run


@cache
def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layers work here: bfloat16 on a CPU whose torch has oneDNN and whose cores have AVX-512 (others emulate
    bfloat16, slower than `F.linear`)."""
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    try:
        weight, x = torch.eye(16, dtype=dtype), torch.ones(2, 16, dtype=dtype)
        return bool(torch.equal(pack(weight, None)(x, x), x + x))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


Norm = Callable[[Tensor], Tensor]
"""``x [*m, d] -> [*m, d]``: RMSNorm with its weight."""

_FEW_ROWS = 16
"""Up to here the mirrored norm is faster: `F.rms_norm` runs five kernels where that runs three."""


def make_norm(weight: Float[Tensor, " d"], eps: float) -> Norm:
    """RMSNorm; for few rows in bfloat16 on a CPU the mirrored variant."""
    shape = weight.shape
    mirrored = mirrored_norm(weight, eps) if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" else None

    def run(x: Tensor) -> Tensor:
        if mirrored is not None and x.dim() == 2 and x.shape[0] <= _FEW_ROWS:
            return mirrored(x)
        return F.rms_norm(x, shape, weight, eps)

    return run


def mirrored_norm(weight: Float[Tensor, " d"], eps: float) -> Norm:
    """RMSNorm by the layer norm of ``[x, -x]``, whose mean is 0 and whose variance is the mean square of x."""
    size, doubled = weight.shape[0], torch.cat([weight, weight])
    shape = [2 * size]

    def run(x: Tensor) -> Tensor:
        return torch.layer_norm(torch.cat([x, -x], dim=-1), shape, doubled, None, eps)[:, :size]

    return run
