"""Linear layers, plain and packed, and norms. They take most of the time of a forward.

`plain` is `F.linear`. `pack` keeps the weight in the blocked layout of oneDNN's bfloat16 kernels (`torch.ops.mkldnn`, the
operators that torch.compile uses on a CPU). The weight is laid out once at load instead of at every call, which makes layers
of a few rows fast. The operators are private to torch, so `can_pack` tries them. `tests/test_plain_versions.py` compares both
variants, and both norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Linear = Callable[..., Tensor]
"""A linear layer, ``(x [m, i], residual [m, o] | None) -> [m, o]``: x W^T + bias + residual."""

_ROWS = 8
"""Number of input rows that the blocked layout is made for. 4 to 32 give similar layouts. oneDNN needs a number."""


def make_linear(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, *, packed: bool) -> Linear:
    """Makes a linear layer. `packed` requires `can_pack`."""
    return pack(weight, bias) if packed else plain(weight, bias)


def plain(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> Linear:
    """Makes a layer that runs `F.linear`, on every device and in every dtype."""

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if residual is None else residual + out

    return run


def pack(weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None) -> Linear:
    """Makes a layer with its weight in blocked layout. The kernel adds the residual before it rounds."""
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
    """Returns whether packed layers work in this dtype on this device.

    They need bfloat16, a CPU with AVX-512, and a torch with oneDNN. Other CPUs emulate bfloat16, which is slower than
    `F.linear`.
    """
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
"""RMSNorm with its weight, ``x [*m, d] -> [*m, d]``."""

_MOST_MIRRORED_ROWS = 16
"""Most rows for which `mirrored_norm` is faster: it runs three kernels, `F.rms_norm` five."""


def make_norm(weight: Float[Tensor, " d"], eps: float) -> Norm:
    """Makes an RMSNorm. In bfloat16 on a CPU, inputs of up to 16 rows run `mirrored_norm`."""
    shape = weight.shape
    mirrored = mirrored_norm(weight, eps) if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" else None

    def run(x: Tensor) -> Tensor:
        if mirrored is not None and x.dim() == 2 and x.shape[0] <= _MOST_MIRRORED_ROWS:
            return mirrored(x)
        return F.rms_norm(x, shape, weight, eps)

    return run


def mirrored_norm(weight: Float[Tensor, " d"], eps: float) -> Norm:
    """Makes an RMSNorm by the layer norm of ``[x, -x]``, which has mean 0 and the mean square of x as its variance."""
    size, doubled = weight.shape[0], torch.cat([weight, weight])
    shape = [2 * size]

    def run(x: Tensor) -> Tensor:
        return torch.layer_norm(torch.cat([x, -x], dim=-1), shape, doubled, None, eps)[:, :size]

    return run
