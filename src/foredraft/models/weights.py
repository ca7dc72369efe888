"""Whether the tensors of a checkpoint are those that config.json describes: how many layers, which shapes, which numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from foredraft.models.checkpoint import ModelError, StoredTensor, some

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
"""The stack that a tensor belongs to, and its place there."""

_LARGER = 2
"""A model may have so many times the numbers of its file: a head that repeats the embedding is stored once."""


def refuse_other_layers(config: Any, names: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """Raises if the file holds more or fewer layers than the configuration asks for. Looks at names only.

    Args:
        config: of the language model.
        names: of all tensors of the file.
        ignored: patterns of names that the model is known to leave out.

    Raises:
        ModelError: says both numbers.
    """
    patterns = [re.compile(one) for one in ignored]
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        found = _LAYER.match(name)
        if found and not any(pattern.search(name) for pattern in patterns):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), []).append(name)
    wanted, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    counts = {stack: max(layers) + 1 for stack, layers in stacks.items()}
    if not counts or any(wanted <= count <= wanted + more for count in counts.values()):
        return
    stack = max(stacks, key=lambda one: sum(map(len, stacks[one].values())))
    count, said = counts[stack], f"config.json says num_hidden_layers {wanted}, the file holds {counts[stack]} layers"
    if count < wanted:
        last = f"{stack}.{count - 1}."
        missing = sorted(f"{stack}.{count}.{name.removeprefix(last)}" for name in stacks[stack][count - 1])
        raise ModelError(f"the checkpoint lacks {some(missing)} ({said}): copy it again, or check config.json")
    raise ModelError(f"{said} ({stack}.0 to {stack}.{count - 1}): weights and configuration are not of the same model")


def refuse_other_sizes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor | StoredTensor]) -> None:
    """Raises if a model would be far larger than its file. Called before the model is allocated.

    Args:
        expected: parameters of the model, each of them once.

    Raises:
        ModelError: says both sizes.
    """
    wanted = sum(one.numel() for one in expected.values())
    stored = sum(prod(one.shape) for one in weights.values())
    if wanted > _LARGER * stored:
        raise ModelError(f"config.json asks for {wanted} weights, the file holds {stored}: they are not of the same model")


def refuse_other_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor | StoredTensor]) -> None:
    """Raises if a tensor that both have differs in shape.

    Raises:
        ModelError: names the first tensor.
    """
    for name, like in expected.items():
        shape = tuple(weights[name].shape) if name in weights else tuple(like.shape)
        if shape != tuple(like.shape):
            raise ModelError(
                f"the tensor {name!r} has shape {shape} where config.json asks for {tuple(like.shape)}: "
                "weights and configuration are not of the same model"
            )


def refuse_no_floats(weights: Mapping[str, Tensor | StoredTensor], wanted: Collection[str]) -> None:
    """Raises if a weight is stored in whole numbers or in eight bits: its scales are unknown without a quantization_config.

    Args:
        wanted: names of tensors that a model computes with. Others count if their name ends in ``weight``.

    Raises:
        ModelError: names the tensors and the dtype.
    """
    wrong: dict[str, list[str]] = {}
    for name, one in weights.items():
        is_float = one.dtype in _TORCH_FLOATS if isinstance(one, Tensor) else one.dtype_name in _FLOATS
        if not is_float and (name in wanted or name.endswith("weight")):
            wrong.setdefault(str(one.dtype) if isinstance(one, Tensor) else one.dtype_name, []).append(name)
    for dtype, names in wrong.items():
        raise ModelError(
            f"{some(sorted(names))} stored as {dtype}, and config.json has no quantization_config that gives their scale: "
            "give the original checkpoint in bfloat16, float16 or float32"
        )


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, after a look at every number of it.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    if tensor.is_floating_point() and tensor.numel():
        least, largest = torch.aminmax(tensor.detach())  # both are NaN where any number is
        if not bool(torch.isfinite(least) & torch.isfinite(largest)):
            raise ModelError(
                f"the tensor {name!r} holds NaN or infinity in {tensor.dtype}: copy the checkpoint again, load it in a dtype "
                "with a wider range, or go back to an earlier checkpoint of the training"
            )
    return tensor
