"""Weights of few bits: what their numbers stand for, and the order in which compiled code reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

TILE = 32
"""Number of outputs, and of inputs, of a block."""

SUPER, SMALL = 256, 16
"""Inputs of a super-block, and of the smallest group with a scale of its own."""

_HALF, _STEP = TILE // 2, 4
"""Outputs whose numbers stand in one half of a byte, and inputs of a step."""


class Form(IntEnum):
    """How numbers become weights, see `kernels/c/quantized.h`."""

    PLAIN = 0
    ZEROS = 1
    SHIFTS = 2
    SUPER = 3
    SMALL = 4


@dataclass(frozen=True)
class Quantized:
    """A weight of few bits: ``(numbers - 2 ** (bits - 1)) * scale + shift``.

    Attributes:
        numbers: from 0 to ``2 ** bits - 1``.
        bits: 4, 5, 6 or 8.
        scales: in bfloat16, float16 or float32. One for each group of inputs. For `Form.SUPER` two, d and e, and for
            `Form.SMALL` one, for each 256 inputs.
        form: how scale and shift follow from `scales` and `more`:

            - ``PLAIN``: no shift.
            - ``ZEROS``: the shift is ``-more * scale``; one entry for each group.
            - ``SHIFTS``: the shift is ``zero * scale + more``; one entry of the dtype of `scales` for each group.
            - ``SUPER``: `more` holds f and g for each 32 inputs. The scale is ``d * f``, the shift ``zero * scale - e * g``.
            - ``SMALL``: `more` has an entry for each 16 inputs. The scale is ``scales * more``, without a shift.
    """

    numbers: UInt8[Tensor, "o i"]
    bits: int
    scales: Num[Tensor, "o g *two"]
    form: Form = Form.PLAIN
    more: Num[Tensor, "o h *two"] | None = None

    @staticmethod
    def of(weight: Float[Tensor, "o i"]) -> Quantized:
        """Rounds a weight to four bits, 32 inputs a scale. The number 0 stands for the weight of largest magnitude."""
        blocks = weight.float().unflatten(1, (-1, TILE))
        scales = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).bfloat16()
        steps = torch.where(scales == 0, 0, blocks / scales.float())
        return Quantized((steps.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1), 4, scales[..., 0])

    @property
    def group(self) -> int:
        """Number of inputs that share a scale."""
        inputs = self.numbers.shape[1]
        return {Form.SUPER: TILE, Form.SMALL: SMALL}.get(self.form) or inputs // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the weight in compiled code, without padding."""
        return self.numbers.numel() * self.bits // 8 + self.scales.nbytes + (0 if self.more is None else self.more.nbytes)

    def weight(self) -> Float[Tensor, "o i"]:
        """Returns the weight in float64, without rounding."""
        zero = 2.0 ** (self.bits - 1)
        scales, more = self.scales.double(), None if self.more is None else self.more.double()
        if self.form == Form.SUPER:
            assert more is not None
            wide = scales.repeat_interleave(SUPER // TILE, 1)
            scales = wide[..., 0] * more[..., 0]
            shifts = zero * scales - wide[..., 1] * more[..., 1]
        elif self.form == Form.SMALL:
            assert more is not None
            scales, shifts = scales.repeat_interleave(SUPER // SMALL, 1) * more, torch.zeros(())
        elif more is None:
            shifts = torch.zeros(())
        else:
            shifts = -more * scales if self.form == Form.ZEROS else zero * scales + more
        parts = self.numbers.double().unflatten(1, (-1, self.group)) - zero
        return (parts * scales[..., None] + shifts.expand(scales.shape)[..., None]).flatten(1)

    def is_like(self, other: Quantized) -> bool:
        """Whether both can be parts of one layer."""
        mine, theirs = ((one.bits, one.form, one.group, one.scales.dtype, one.numbers.shape[1]) for one in (self, other))
        return mine == theirs

    def rows(self, begin: int, end: int) -> Quantized:
        """Returns the outputs `begin` to ``end - 1``."""
        more = None if self.more is None else self.more[begin:end]
        return replace(self, numbers=self.numbers[begin:end], scales=self.scales[begin:end], more=more)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Puts the outputs of several weights one after another. They must be alike, see `Quantized.is_like`."""
    more = None if parts[0].more is None else torch.cat([part.more for part in parts if part.more is not None])
    numbers, scales = torch.cat([part.numbers for part in parts]), torch.cat([part.scales for part in parts])
    return replace(parts[0], numbers=numbers, scales=scales, more=more)


def laid_out(weight: Quantized) -> tuple[UInt8[Tensor, "t b n"], Tensor, Tensor | None]:
    """Returns numbers, scales and `more` in the order of `kernels/c/quantized.h`. Outputs are padded to whole blocks."""
    numbers = _padded(weight.numbers)
    tiles = numbers.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)  # [t, b, 32 outputs, 32 inputs]
    steps = tiles.unflatten(3, (-1, _STEP)).transpose(2, 3)  # [t, b, step, output, input]
    if weight.bits == 8:
        blocks = steps.flatten(2)
    else:
        low, high = (steps & 15).split(_HALF, 3)
        parts = [(low | high << 4).flatten(2)]
        more, per = weight.bits - 4, 8 // max(1, weight.bits - 4)  # bits behind the first four, and steps in a byte of them
        if more:
            upper = (steps >> 4).unflatten(2, (-1, per)).unflatten(4, (2, _HALF))  # [t, b, byte, step, half, output, input]
            places = (torch.arange(per, dtype=torch.uint8) * more)[:, None, None, None]
            planes = (upper << places).sum(3, dtype=torch.uint8)  # [t, b, byte, half, output, input]
            parts.append(planes.transpose(2, 3).flatten(2))
        blocks = torch.cat(parts, 2)
    return blocks.contiguous(), _by_tile(weight.scales), None if weight.more is None else _by_tile(weight.more)


@dataclass(frozen=True)
class Stored:
    """A weight in the order of `laid_out`, from which rows can be read again.

    Attributes:
        like: bits and form of the weight; its numbers have no rows.
        outputs: number of rows.
    """

    blocks: UInt8[Tensor, "t b n"]
    scales: Tensor
    more: Tensor | None
    like: Quantized
    outputs: int

    def rows(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n i"]:
        """Returns the weights of some outputs, in float32."""
        tiles, places = ids // TILE, torch.arange(len(ids)) * TILE + ids % TILE
        numbers = unpacked(self.blocks[tiles], self.like.bits, len(ids) * TILE)[places]
        scales, more = (None if part is None else _by_output(part[tiles])[places] for part in (self.scales, self.more))
        assert scales is not None
        return replace(self.like, numbers=numbers, scales=scales, more=more).weight().float()


def _by_output(values: Num[Tensor, "t g *two 32"]) -> Num[Tensor, "o g *two"]:
    return values.movedim(-1, 1).flatten(0, 1)


def _padded(tensor: Tensor) -> Tensor:
    spare = -len(tensor) % TILE
    return torch.cat([tensor, tensor.new_zeros(spare, *tensor.shape[1:])]) if spare else tensor


def _by_tile(values: Num[Tensor, "o g *two"]) -> Num[Tensor, "t g *two 32"]:
    """The outputs of a tile stand beside each other."""
    return _padded(values).unflatten(0, (-1, TILE)).movedim(1, -1).contiguous()


def unpacked(blocks: UInt8[Tensor, "t b n"], bits: int, outputs: int) -> UInt8[Tensor, "o i"]:
    """Returns the numbers that `laid_out` has stored."""
    if bits == 8:
        steps = blocks.unflatten(2, (-1, TILE, _STEP))
    else:
        base = blocks[..., : _HALF * TILE].unflatten(2, (-1, _HALF, _STEP))
        steps = torch.cat([base & 15, base >> 4], 3)
        more, per = bits - 4, 8 // max(1, bits - 4)
        if more:
            planes = blocks[..., _HALF * TILE :].unflatten(2, (2, -1, _HALF, _STEP)).transpose(2, 3)
            places = (torch.arange(per, dtype=torch.uint8) * more)[:, None, None, None]
            upper = planes[:, :, :, None] >> places & (1 << more) - 1  # [t, b, byte, step, half, output, input]
            steps = steps | upper.flatten(4, 5).flatten(2, 3) << 4
    return steps.transpose(2, 3).flatten(3).transpose(1, 2).flatten(2).flatten(0, 1)[:outputs]
