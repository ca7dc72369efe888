"""Reads checkpoints that AWQ, GPTQ and compressed-tensors have packed: their tensors as weights of few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from foredraft.kernels.quantized import TILE, Form, Quantized
from foredraft.models.checkpoint import ModelError, Stored

_WORD = 32
"""Bits of a word, which holds several numbers, the first in its lowest bits."""

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of AWQ of each of eight neighbouring columns."""


def _numbers(words: Int[Tensor, "r c"], bits: int, order: tuple[int, ...] = ()) -> Int[Tensor, "r n"]:
    """The numbers of the words of each row."""
    count = _WORD // bits
    places = torch.tensor(order or range(count)) * bits
    return (words.to(torch.int32)[..., None] >> places.to(torch.int32) & (1 << bits) - 1).flatten(-2)


def _quantized(numbers: Tensor, bits: int, scales: Tensor, zeros: Tensor | None) -> Quantized:
    """A weight from numbers [o, i], scales [o, g], and the numbers [o, g] that stand for 0; None: half of the range."""
    middle = 1 << (bits - 1)
    numbers, scales = numbers.to(torch.uint8).contiguous(), scales.contiguous()
    if zeros is None or bool((zeros == middle).all()):
        return Quantized(numbers, bits, scales)
    shifts = zeros.to(torch.int32) - middle
    if int(shifts.abs().max()) > 127:
        raise ModelError("a number that stands for 0 lies outside the range", "copy the checkpoint again")
    return Quantized(numbers, bits, scales, Form.ZEROS, shifts.to(torch.int8).contiguous())


class Packed(NamedTuple):
    """A packed weight in a checkpoint, which `read` loads.

    Attributes:
        parts: its tensors, by the end of their names.
        shape: outputs and inputs.
        make: makes the weight of the loaded tensors.
    """

    name: str
    parts: Mapping[str, Stored]
    shape: tuple[int, int]
    make: Callable[[Mapping[str, Tensor]], Quantized]
    dtype_name: str = "packed"
    has_scales: bool = True

    def read(self) -> Quantized:
        """Loads the weight.

        Raises:
            ModelError: its tensors do not fit each other, or a group of inputs cannot be read.
        """
        try:
            weight = self.make({name: stored.read() for name, stored in self.parts.items()})
            group, inputs = weight.group, self.shape[1]
            fits = tuple(weight.numbers.shape) == self.shape and weight.scales.shape == (self.shape[0], inputs // group)
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            raise ModelError(f"the tensors of {self.name!r} do not fit each other ({error})", "copy them again") from None
        if not fits or inputs % group:
            raise ModelError(f"the tensors of {self.name!r} do not fit each other", "copy them again")
        if group % TILE:
            raise ModelError(
                f"{self.name!r} has groups of {group} inputs, which cannot be read", f"give groups of a multiple of {TILE}"
            )
        return weight


def _refuse_order(name: str, order: Tensor | None, inputs: int, groups: int) -> None:
    """Refuses inputs whose groups are not neighbours."""
    if order is not None and not torch.equal(order.long(), torch.arange(inputs) // (inputs // groups)):
        raise ModelError(
            f"the groups of {name!r} follow the order of activations (act-order), which cannot be read",
            "give a checkpoint that was packed without it (desc_act false)",
        )


def _awq(name: str, parts: Mapping[str, Stored], about: Mapping[str, Any]) -> Packed:
    inputs, words = parts["qweight"].shape

    def make(found: Mapping[str, Tensor]) -> Quantized:
        numbers, zeros = (_numbers(found[key], 4, _AWQ_ORDER).T for key in ("qweight", "qzeros"))
        return _quantized(numbers, 4, found["scales"].T, zeros)

    if about.get("version", "gemm") != "gemm" or about.get("bits", 4) != 4:
        raise ModelError("only AWQ of the version gemm with four bits can be read", "give such a checkpoint, or a GGUF file")
    return Packed(name, parts, (words * 8, inputs), make)


def _gptq(name: str, parts: Mapping[str, Stored], about: Mapping[str, Any]) -> Packed:
    bits = about.get("bits", 4)
    rows, outputs = parts["qweight"].shape
    inputs = rows * (_WORD // bits) if bits in (4, 8) else 0

    def make(found: Mapping[str, Tensor]) -> Quantized:
        _refuse_order(name, found.get("g_idx"), inputs, len(found["scales"]))
        numbers, zeros = _numbers(found["qweight"].T, bits), _numbers(found["qzeros"], bits).T
        middle = 1 << (bits - 1)
        stands_for_less = bool((zeros == middle - 1).all()) or (  # files are often wrong about their version
            about.get("checkpoint_format") != "gptq_v2" and not bool((zeros == middle).all())
        )
        return _quantized(numbers, bits, found["scales"].T, zeros + 1 if stands_for_less else zeros)

    if bits not in (4, 8):
        raise ModelError(f"GPTQ with {bits} bits cannot be read", "give a checkpoint with 4 or 8 bits")
    return Packed(name, parts, (outputs, inputs), make)


def _compressed(name: str, parts: Mapping[str, Stored], about: Mapping[str, Any]) -> Packed:
    outputs, words = parts["weight_packed"].shape
    schemes = [group.get("weights") or {} for group in (about.get("config_groups") or {}).values()]
    bits = {scheme.get("num_bits") for scheme in schemes}
    if about.get("format") != "pack-quantized" or len(bits) != 1 or not bits <= {4, 8}:
        raise ModelError(
            f"compressed-tensors of the format {about.get('format')!r} with {sorted(map(str, bits))} bits cannot be read",
            "give pack-quantized weights of 4 or 8 bits",
        )
    [num_bits] = bits
    assert isinstance(num_bits, int)
    inputs = words * (_WORD // num_bits)

    def make(found: Mapping[str, Tensor]) -> Quantized:
        scales, zeros = found["weight_scale"], found.get("weight_zero_point")
        _refuse_order(name, found.get("weight_g_idx"), inputs, scales.shape[1])
        packed = None if zeros is None else _numbers(zeros.T, num_bits).T[:outputs]
        return _quantized(_numbers(found["weight_packed"], num_bits), num_bits, scales, packed)

    return Packed(name, parts, (outputs, inputs), make)


class Packing(NamedTuple):
    """A way to pack weights: the tensor that every packed weight has, the ends of all names, and what reads them."""

    main: str
    ends: tuple[str, ...]
    read: Callable[[str, Mapping[str, Stored], Mapping[str, Any]], Packed]


PACKINGS = {
    "awq": Packing("qweight", ("qweight", "qzeros", "scales"), _awq),
    "gptq": Packing("qweight", ("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "compressed-tensors": Packing(
        "weight_packed",
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        _compressed,
    ),
}
"""Value of ``quant_method`` in config.json -> how its weights are packed."""


def packing_of(config: Any) -> dict[str, Any] | None:
    """Takes ``quantization_config`` out of a configuration, if it is of `PACKINGS`. Returns it, or None."""
    about = getattr(config, "quantization_config", None)
    about = about if isinstance(about, dict | None) else about.to_dict()
    if about is None or about.get("quant_method") not in PACKINGS:
        return None
    del config.quantization_config
    return dict(about)


def unpacked_weights(weights: Mapping[str, Stored], about: Mapping[str, Any]) -> dict[str, Stored]:
    """Returns the weights of a checkpoint, those of few bits under the names of the weights that they stand for.

    Args:
        about: ``quantization_config`` of config.json; its ``quant_method`` is one of `PACKINGS`.

    Raises:
        ModelError: a packed weight lacks a tensor, or its variant cannot be read.
    """
    packing = PACKINGS[about["quant_method"]]
    groups: dict[str, dict[str, Stored]] = {}
    rest: dict[str, Stored] = {}
    stems = {name.removesuffix(f".{packing.main}") for name in weights if name.endswith(f".{packing.main}")}
    for name, stored in weights.items():
        stem, _, end = name.rpartition(".")
        if stem in stems and end in packing.ends:
            groups.setdefault(stem, {})[end] = stored
        else:
            rest[name] = stored
    if not groups:
        raise ModelError(
            f"config.json says that the checkpoint is quantised by {about['quant_method']}, but it holds no {packing.main}",
            "correct config.json, or copy the checkpoint again",
        )
    needed = [end for end in packing.ends if end in ("qzeros", "scales", "weight_scale")]
    for stem, parts in groups.items():
        if missing := [end for end in needed if end not in parts]:
            raise ModelError(f"the checkpoint lacks '{stem}.{missing[0]}'", "copy it again")
        rest[f"{stem}.weight"] = packing.read(f"{stem}.weight", parts, about)
    return rest
