"""Weights in the order in which compiled code reads them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from foredraft.kernels.quantized import TILE, Quantized, Stored, laid_out
from foredraft.kernels.structures import CLinear

NO_WINDOW = 1 << 62
"""Window of a layer in which a token sees all earlier tokens."""

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of the types of a model and of its weights in compiled code."""

_NUMBERS = 3
"""Number of the type of weights of few bits."""

QUANTIZED, FULL = 4, 16
"""Bits of a weight of a draft head: four, or those of its dtype. Quantized weights are read four times as fast as those of 16
bits. Their inputs are rounded to eight bits, and the processor multiplies four pairs of eight bits at once."""

_LINE, _PAGES = 64, 64 << 20
"""Bytes of a cache line, and bytes of one allocation. Pages that are never written take no memory."""


def describe_weight(
    memory: Memory,
    weight: Float[Tensor, "o i"] | Quantized,
    bias: Float[Tensor, " o"] | None,
    bits: int = FULL,
    *,
    is_rounded: bool = True,
) -> CLinear:
    """Lays out a weight and its bias.

    Args:
        bits: `QUANTIZED` rounds a weight in floating point to four bits; `FULL` leaves it as it is.
        is_rounded: whether the inputs of a quantized weight are rounded to eight bits.
    """
    given = None if bias is None else memory.put(bias.float()).data_ptr()
    if isinstance(weight, Tensor) and bits == FULL:
        return CLinear(memory.put(blocked(weight)).data_ptr(), TYPES[weight.dtype], given, *weight.shape)
    return describe_stored(store(memory, weight if isinstance(weight, Quantized) else Quantized.of(weight)), given, is_rounded)


def store(memory: Memory, weight: Quantized) -> Stored:
    """Copies a weight into the memory, in the order in which compiled code reads it."""
    numbers, scales, more = (None if part is None else memory.put(part) for part in laid_out(weight))
    assert numbers is not None
    assert scales is not None
    return Stored(numbers, scales, more, weight.rows(0, 0), len(weight.numbers))


def describe_stored(stored: Stored, bias: int | None, is_rounded: bool) -> CLinear:
    """Describes a stored weight. `bias` is the address of its bias, if it has one."""
    like, more = stored.like, None if stored.more is None else stored.more.data_ptr()
    about = like.bits, int(is_rounded), int(like.form), like.group, TYPES[like.scales.dtype]
    sizes = stored.outputs, like.numbers.shape[1]
    return CLinear(stored.blocks.data_ptr(), _NUMBERS, bias, *sizes, *about, stored.scales.data_ptr(), more)


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
