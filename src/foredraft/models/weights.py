"""Checks the tensors of a checkpoint against config.json: number of layers, shapes, dtypes and finite values."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from foredraft.models.checkpoint import ModelError, Stored, some

_log = logging.getLogger("foredraft")

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
"""Matches the name of a layer's tensor: the name of the stack, then the index of the layer."""

_LARGER = 2
"""Largest ratio of a model's size to its file. A head that repeats the embedding is stored once."""


def refuse_other_layers(config: Any, names: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """Refuses a file with more or fewer layers than the configuration. Reads names only.

    Args:
        config: configuration of the language model.
        names: names of all tensors of the file.
        ignored: patterns of names that the model does not load.

    Raises:
        ModelError: the numbers of layers differ. The message says both.
    """
    patterns = [re.compile(pattern) for pattern in ignored]
    stacks: dict[str, dict[int, list[str]]] = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer and not any(pattern.search(name) for pattern in patterns):
            stacks.setdefault(layer[1], {}).setdefault(int(layer[2]), []).append(name)
    wanted, more = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    counts = {stack: max(layers) + 1 for stack, layers in stacks.items()}
    if not counts or any(wanted <= count <= wanted + more for count in counts.values()):
        return
    stack = max(stacks, key=lambda name: sum(map(len, stacks[name].values())))
    count, numbers = counts[stack], f"config.json says num_hidden_layers {wanted}, the file holds {counts[stack]} layers"
    if count < wanted:
        last = f"{stack}.{count - 1}."
        missing = sorted(f"{stack}.{count}.{name.removeprefix(last)}" for name in stacks[stack][count - 1])
        raise ModelError(f"the checkpoint lacks {some(missing)} ({numbers})", "copy it again, or check config.json")
    raise ModelError(f"{numbers} ({stack}.0 to {stack}.{count - 1}): weights and configuration are not of the same model")


_COMPUTED = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|_extra_state)$")
"""Names of tensors that older checkpoints hold and that a model computes itself: frequencies and causal masks."""

_CHANGED = re.compile(r"lora_|\.(weight_scale\w*|qweight|qzeros|scales|g_idx|absmax|weight_packed)$")
"""Names of tensors that change other weights: adapters, and the scales of quantised weights."""


def check_unused(names: Iterable[str], layers: Collection[str]) -> None:
    """Refuses an adapter or scales in the file, and reports other tensors of a layer that the model does not use.

    Args:
        names: names of the tensors that the model does not use.
        layers: names of the model's layers, such as ``model.layers.0``. Tensors of other parts are ignored.

    Raises:
        ModelError: an unused tensor changes other weights. The message names it.
    """
    found = [name for name in names if (layer := _LAYER.match(name)) and f"{layer[1]}.{layer[2]}" in layers]
    if changed := sorted(name for name in found if _CHANGED.search(name)):
        raise ModelError(
            f"the checkpoint holds {some(changed)}: an adapter or a quantisation was not merged into the weights",
            "give the original checkpoint, or merge it",
        )
    if unused := sorted(name for name in found if not _COMPUTED.search(name)):
        _log.warning("the checkpoint holds %s, which a model with this config.json does not use", some(unused))


def refuse_other_sizes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor | Stored]) -> None:
    """Refuses a model that would be far larger than its file. It is called before the model is allocated.

    Args:
        expected: parameters of the model, each of them once.
        weights: tensors of the file.

    Raises:
        ModelError: the model is too large. The message says both sizes.
    """
    wanted = sum(parameter.numel() for parameter in expected.values())
    stored = sum(prod(tensor.shape) for tensor in weights.values())
    if wanted > _LARGER * stored:
        raise ModelError(f"config.json asks for {wanted} weights, the file holds {stored}: they are not of the same model")


def refuse_other_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor | Stored]) -> None:
    """Refuses weights that differ in shape from the model. Ignores tensors that the file lacks.

    Raises:
        ModelError: a shape differs. The message names the first such tensor.
    """
    for name, like in expected.items():
        shape = tuple(weights[name].shape) if name in weights else tuple(like.shape)
        if shape != tuple(like.shape):
            raise ModelError(
                f"the tensor {name!r} has shape {shape} where config.json asks for {tuple(like.shape)}: weights and "
                "configuration are not of the same model"
            )


def is_float(weight: Tensor | Stored) -> bool:
    """Whether a tensor holds floating-point numbers of 16 bits or more, or fewer bits together with their scales."""
    if getattr(weight, "has_scales", False):
        return True
    return weight.dtype in _TORCH_FLOATS if isinstance(weight, Tensor) else weight.dtype_name in _FLOATS


def refuse_no_floats(weights: Mapping[str, Tensor | Stored], wanted: Collection[str]) -> None:
    """Refuses weights in integers or in eight bits. Without a quantization_config their scales are unknown.

    Args:
        weights: tensors of the file.
        wanted: names of the tensors that the model uses. Other tensors are checked if their name ends in ``weight``.

    Raises:
        ModelError: a weight has such a dtype. The message names the weights and the dtype.
    """
    wrong: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if not is_float(weight) and (name in wanted or name.endswith("weight")):
            wrong.setdefault(str(weight.dtype) if isinstance(weight, Tensor) else weight.dtype_name, []).append(name)
    for dtype, names in wrong.items():
        raise ModelError(
            f"the checkpoint holds {some(sorted(names))} stored as {dtype}, and config.json has no quantization_config that "
            "gives their scale",
            "give the original checkpoint in bfloat16, float16 or float32",
        )


def finite(name: str, tensor: Tensor) -> Tensor:
    """Checks every entry of a tensor and returns the tensor.

    Raises:
        ModelError: the tensor holds NaN or infinity.
    """
    if tensor.is_floating_point() and tensor.numel():
        least, largest = torch.aminmax(tensor.detach())  # both are NaN if any entry is NaN
        if not bool(torch.isfinite(least) & torch.isfinite(largest)):
            raise ModelError(
                f"the tensor {name!r} holds NaN or infinity in {tensor.dtype}",
                "copy the checkpoint again, load it in a dtype with a wider range, or use an earlier checkpoint of the "
                "training",
            )
    return tensor
