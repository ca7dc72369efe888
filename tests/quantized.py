"""What the compiled products make of a weight of four bits and of inputs of eight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from foredraft.kernels.quantized import Quantized
from foredraft.models.native import NativeTarget


def in_four_bits(weight: Tensor) -> Tensor:
    """A weight [o, i] as four bits say it, in float64."""
    return Quantized.of(weight).weight()


def in_eight_bits(x: Tensor) -> Tensor:
    """Inputs [*n, i] as they are given to such a weight, in float64: 32 in steps of a 127th of the largest."""
    blocks = x.float().unflatten(-1, (-1, 32))
    most = blocks.abs().amax(-1, keepdim=True)
    steps = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # 127 / most would be 127 times a reciprocal
    return ((blocks * steps).round().double() * (most / 127).double()).flatten(-2)


def round_inputs(_: object, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook that rounds what a layer is given."""
    return (in_eight_bits(given[0]).to(given[0].dtype), *given[1:])


class QuantizedTarget(NativeTarget):
    """One whose output layer is given rounded inputs."""

    def head(self, features: Tensor) -> Tensor:
        return super().head(in_eight_bits(features).to(features.dtype))
