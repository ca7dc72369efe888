"""The arguments of `kernels/decoder.c`: its structures, and weights in the order in which it reads them.

The structures have the same fields, in the same order, as those in `kernels/passed.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import NamedTuple

import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor

from foredraft.models.reader import Reader

TILE = 32
"""Number of outputs of a linear layer whose weights are interleaved. All widths but the vocabulary size must be multiples."""

NO_WINDOW = 1 << 62
"""Window of a layer in which a token sees all earlier tokens."""

FEW, FULL = 4, 16
"""Bits of a weight. Weights of four bits are read four times as fast. Their inputs are rounded to eight bits, and the processor
multiplies four pairs of eight bits at once."""

_BLOCK = 32
"""Number of inputs whose four-bit weights share one scale. Each output has its own scales."""

_LINE, _PAGES = 64, 64 << 20
"""Bytes of a cache line, and bytes of one allocation. Pages that are never written take no memory."""

_at, _whole, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CLinear(ctypes.Structure):
    """A linear layer. `blocked` lays out its weight, or `blocked_few` if `few` is 1."""

    _fields_ = (("weight", _at), ("few", _whole), ("bias", _at), ("outputs", _whole), ("inputs", _whole))


class CResidual(ctypes.Structure):
    """A residual block. If `skip` has no weight, its inputs are added unchanged."""

    _fields_ = (("linear", CLinear), ("skip", CLinear))


class CLayer(ctypes.Structure):
    """A decoder layer. A norm that is None is skipped."""

    _fields_ = (
        *((name, _at) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, CLinear) for name in ("qkv", "output", "gate", "up", "down")),
        ("window", _whole),
    )


class CEntry(ctypes.Structure):
    """The part of a draft head that combines an embedding and a feature."""

    _fields_ = (
        ("fc", CLinear),
        ("norm", _at),
        *((name, CLinear) for name in ("gate", "up", "down")),
        ("feature_norm", _at),
        ("ahead", CLinear),
    )


class CModel(ctypes.Structure):
    """A model: sizes, weights and layers."""

    _fields_ = (
        *((name, _whole) for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp", "num_layers")),
        *((name, _real) for name in ("eps", "rotary_scale")),
        *((name, _at) for name in ("frequencies", "embedding", "tied", "layers", "norm")),
        ("head", CLinear),
        ("vocabulary", _whole),
        ("token_ids", _at),
        ("blank", CLinear),
        ("entry", CEntry),
    )


class CStep(ctypes.Structure):
    """The arguments of one forward."""

    _fields_ = (
        ("num_trees", _whole),
        *((name, _at) for name in ("tokens", "parents", "offsets", "lengths", "slots", "first")),
        ("num_rows", _whole),
        *((name, _at) for name in ("rows", "logits")),
        ("num_features", _whole),
        *((name, _at) for name in ("feature_layers", "features", "keys", "values")),
        *((name, _whole) for name in ("layer_stride", "slot_stride", "head_stride", "threads")),
        *((name, _at) for name in ("given", "num_given", "carried")),
        ("num_slots", _whole),
    )


def describe_linear(memory: Memory, read: Reader, *names: str, bits: int = FULL) -> CLinear:
    """Fuses linear layers into one for `decoder.c`, with weights of `FEW` or `FULL` bits."""
    return describe_weight(memory, read.tensor(*names), read.bias(*names), bits)


def describe_weight(memory: Memory, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, bits: int) -> CLinear:
    """Lays out a weight and its bias for `decoder.c`, with weights of `FEW` or `FULL` bits."""
    laid_out = blocked_few(weight) if bits == FEW else blocked(weight)
    given = None if bias is None else memory.put(bias).data_ptr()
    return CLinear(memory.put(laid_out).data_ptr(), int(bits == FEW), given, *weight.shape)


class FewBits(NamedTuple):
    """Weights of four bits. The weight of output o and input i is ``(numbers[o, i] - 8) * scales[o, i // 32]``."""

    numbers: UInt8[Tensor, "o i"]
    scales: Float[Tensor, "o b"]

    @staticmethod
    def of(weight: Float[Tensor, "o i"]) -> FewBits:
        """Rounds a weight to four bits. The number 0 stands for the weight of largest magnitude in a block."""
        blocks = weight.float().unflatten(1, (-1, _BLOCK))
        scales = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).bfloat16()
        steps = torch.where(scales == 0, 0, blocks / scales.float())
        return FewBits((steps.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1), scales[..., 0])


def describe_layer(memory: Memory, read: Reader, at: str, window: int | None, bits: int = FULL) -> CLayer:
    """Describes the decoder layer with the name `at` for `decoder.c`."""

    def norm(name: str) -> int | None:
        return memory.put(read.tensor(f"{at}.{name}")).data_ptr() if read.has(f"{at}.{name}") else None

    def linear(*names: str) -> CLinear:
        return describe_linear(memory, read, *(f"{at}.{name}_proj" for name in names), bits=bits)

    return CLayer(
        norm("input_layernorm"),
        norm("self_attn.q_norm"),
        norm("self_attn.k_norm"),
        norm("post_attention_layernorm"),
        linear(*(f"self_attn.{name}" for name in "qkv")),
        linear("self_attn.o"),
        linear("mlp.gate"),
        linear("mlp.up"),
        linear("mlp.down"),
        window or NO_WINDOW,
    )


class Memory:
    """Stores tensors one after another, on huge pages if the system has them.

    Huge pages cause fewer TLB misses when weights are streamed, which makes a step of twelve rows a fifth faster.

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
            self._blocks.append(_pages(max(size, _PAGES)))
            self._used = 0
        place = self._blocks[-1][self._used : self._used + tensor.nbytes]
        self._used += size
        self.num_bytes += size
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _pages(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def blocked(weight: Num[Tensor, "o i"]) -> Num[Tensor, "t half 32 2"]:
    """Lays out a weight in the order in which it is read: blocks of 32 outputs, with two inputs of each output in turn."""
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % TILE))
    return padded.view(-1, TILE, inputs // 2, 2).transpose(1, 2).contiguous()


def blocked_few(weight: Float[Tensor, "o i"]) -> UInt8[Tensor, "t b 576"]:
    """Lays out a weight of four bits as `Block` in `passed.h`: scales and numbers of 32 outputs and 32 inputs."""
    numbers, scales = FewBits.of(torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % TILE)))
    low, high = numbers.view(-1, 2, TILE // 2, weight.shape[1] // 4, 4).unbind(1)
    halves = (low | high << 4).transpose(1, 2).reshape(len(low), -1, _BLOCK * TILE // 2)
    return torch.cat([scales.view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8), halves], dim=2)
