"""Weights in the order in which compiled code reads them."""

from __future__ import annotations

import contextlib
import mmap
from typing import NamedTuple

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from foredraft.kernels.structures import CLinear

TILE = 32
"""Number of outputs of a linear layer whose weights are interleaved. All widths but the vocabulary size must be multiples."""

NO_WINDOW = 1 << 62
"""Window of a layer in which a token sees all earlier tokens."""

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of the types of a model and of its weights in compiled code."""

_QUANTIZED_TYPE = 3
"""Number of the type of quantized weights."""

QUANTIZED, FULL = 4, 16
"""Bits of a weight: four, or those of its dtype. Quantized weights are read four times as fast as those of 16 bits. Their
inputs are rounded to eight bits, and the processor multiplies four pairs of eight bits at once."""

_BLOCK = 32
"""Number of inputs whose four-bit weights share one scale. Each output has its own scales."""

_LINE, _PAGES = 64, 64 << 20
"""Bytes of a cache line, and bytes of one allocation. Pages that are never written take no memory."""


class QuantizedWeight(NamedTuple):
    """Weights of four bits. The weight of output o and input i is ``(numbers[o, i] - 8) * scales[o, i // 32]``."""

    numbers: UInt8[Tensor, "o i"]
    scales: Float[Tensor, "o b"]

    @staticmethod
    def of(weight: Float[Tensor, "o i"]) -> QuantizedWeight:
        """Rounds a weight to four bits. The number 0 stands for the weight of largest magnitude in a block."""
        blocks = weight.float().unflatten(1, (-1, _BLOCK))
        scales = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).bfloat16()
        steps = torch.where(scales == 0, 0, blocks / scales.float())
        return QuantizedWeight((steps.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1), scales[..., 0])


def describe_weight(memory: Memory, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, bits: int) -> CLinear:
    """Lays out a weight and its bias, with weights of `QUANTIZED` bits or in their dtype."""
    laid_out = blocked_quantized(weight) if bits == QUANTIZED else blocked(weight)
    kind = _QUANTIZED_TYPE if bits == QUANTIZED else TYPES[weight.dtype]
    given = None if bias is None else memory.put(bias.float()).data_ptr()
    return CLinear(memory.put(laid_out).data_ptr(), kind, given, *weight.shape)


class Memory:
    """Stores tensors one after another, on huge pages if the system has them.

    The hardware prefetches within a page, and huge pages cause fewer TLB misses. A step of one row is up to a sixth faster.

    Attributes:
        num_bytes: bytes of all stored tensors, rounded up to cache lines.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._blocks: list[Tensor] = []
        self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """Copies a tensor into this memory and returns the copy."""
        size = -(-tensor.nbytes // _LINE) * _LINE
        if not self._blocks or self._used + size > self._blocks[-1].nbytes:
            self._blocks.append(huge_pages(max(size, _PAGES)))
            self._used = 0
        place = self._blocks[-1][self._used : self._used + tensor.nbytes]
        self._used += size
        self.num_bytes += size
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def huge_pages(num_bytes: int) -> UInt8[Tensor, " n"]:
    """Allocates zeros, on huge pages if the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def blocked(weight: Num[Tensor, "o i"]) -> Num[Tensor, " t _ *more"]:
    """Lays out a weight in the order in which it is read: blocks of 32 outputs, ``[t, i, 32]``.

    In bfloat16, two inputs of each output stand in turn: ``[t, i / 2, 32, 2]``.
    """
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % TILE))
    tiles = padded.unflatten(0, (-1, TILE))
    return (tiles.unflatten(2, (-1, 2)) if weight.dtype == torch.bfloat16 else tiles).transpose(1, 2).contiguous()


def blocked_quantized(weight: Float[Tensor, "o i"]) -> UInt8[Tensor, "t b 576"]:
    """Lays out a weight of four bits as `Block` in `passed.h`: scales and numbers of 32 outputs and 32 inputs."""
    numbers, scales = QuantizedWeight.of(torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % TILE)))
    low, high = numbers.view(-1, 2, TILE // 2, weight.shape[1] // 4, 4).unbind(1)
    halves = (low | high << 4).transpose(1, 2).reshape(len(low), -1, _BLOCK * TILE // 2)
    return torch.cat([scales.view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8), halves], dim=2)
