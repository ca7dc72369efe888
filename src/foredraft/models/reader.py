"""Reads the weights of a checkpoint by name and makes layers of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foredraft.core.errors import UserError
from foredraft.kernels.linear import Linear, Norm, make_linear, make_norm
from foredraft.kernels.quantized import Quantized, joined
from foredraft.models.weights import finite


def _read(weight: Any) -> Tensor | Quantized:
    """Loads a weight that is still in its file."""
    return weight if isinstance(weight, Tensor | Quantized) else weight.read()


def _numbers(weight: Any) -> Tensor:
    found = _read(weight)
    return found.weight() if isinstance(found, Quantized) else found


class Reader:
    """Reads weights by name. Every weight is copied, so a later change of the originals has no effect.

    Args:
        config: the model's configuration. Supplies the epsilon of norms and the model type in messages.
        weights: the weights, under the names of the Transformers checkpoint: tensors, `Quantized`, or what reads one by `read`.
        dtype: dtype of the copies.
        device: device of the copies.
        packed: whether linear layers use packed weights.
    """

    def __init__(self, config: Any, weights: Mapping[str, Any], dtype: torch.dtype, device: torch.device, packed: bool):
        self._config, self._weights, self._packed = config, weights, packed
        self._to = {"dtype": dtype, "device": device}

    def weights(self, *names: str) -> list[Tensor | Quantized]:
        """Returns the weights of linear layers, neighbours in one part where they are stored alike."""
        parts: list[list[Quantized]] = []
        for name in names:
            self._check(name, "weight")
            found = _read(self._weights[f"{name}.weight"])
            if not isinstance(found, Quantized):
                return [self.tensor(*names)]
            finite(f"{name}.weight", found.scales)
            if parts and parts[-1][-1].is_like(found):
                parts[-1].append(found)
            else:
                parts.append([found])
        return [part[0] if len(part) == 1 else joined(part) for part in parts]

    def _check(self, name: str, kind: str) -> None:
        if f"{name}.{kind}" not in self._weights:
            raise UserError(
                f"the checkpoint lacks the tensor '{name}.{kind}'",
                f"check that the checkpoint is complete and of type {self._config.model_type}",
            )

    def tensor(self, *names: str, kind: str = "weight") -> Tensor:
        """Returns a copy of the tensors ``name.kind``, concatenated in their first dimension.

        Weights of few bits become numbers of the reader's dtype.

        Raises:
            ValueError: a tensor is missing, or holds NaN or infinity.
        """
        for name in names:
            self._check(name, kind)
        alone = len(names) == 1  # concatenation copies anyway
        keys = [f"{name}.{kind}" for name in names]
        tensors = [finite(key, _numbers(self._weights[key]).to(**self._to, copy=alone)) for key in keys]
        return tensors[0] if alone else torch.cat(tensors)

    def has(self, name: str, kind: str = "weight") -> bool:
        """Returns whether the tensor ``name.kind`` exists."""
        return f"{name}.{kind}" in self._weights

    def bias(self, *names: str) -> Tensor | None:
        """Returns the biases of linear layers fused into one, or None if the layers have no bias."""
        return self.tensor(*names, kind="bias") if self.has(names[0], "bias") else None

    def linear(self, *names: str) -> Linear:
        """Fuses linear layers into one."""
        return self.make(self.tensor(*names), self.bias(*names))

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Makes a linear layer of a weight and a bias."""
        return make_linear(weight, bias, packed=self._packed)

    def norm(self, name: str) -> Norm:
        """Makes the RMSNorm with this name."""
        return make_norm(self.tensor(name), self._config.rms_norm_eps)

    def norm_if_any(self, name: str) -> Norm | None:
        """Makes the RMSNorm with this name, or returns None if the model has no such norm."""
        return self.norm(name) if self.has(name) else None
