"""Weights of a checkpoint by name, in the dtype and on the device that they run in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foredraft.models.linear import Linear, Norm, make_linear, make_norm
from foredraft.models.weights import finite


class Reader:
    """Weights by name, turned into what runs them. Everything is copied: a later change of the weights has no effect.

    Args:
        config: of the model, for its norms and messages.
        weights: by the names of the Transformers checkpoint.
        dtype, device: what the copies are in.
        packed: whether linear layers run on packed weights.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
    ):
        self._config, self._weights, self._packed = config, weights, packed
        self._to = {"dtype": dtype, "device": device}

    def tensor(self, *names: str, kind: str = "weight") -> Tensor:
        """A copy of the tensors called ``name.kind``, one below the other.

        Raises:
            ValueError: there is none, or one holds NaN or infinity.
        """
        for name in names:
            if f"{name}.{kind}" not in self._weights:
                raise ValueError(
                    f"the checkpoint lacks the tensor '{name}.{kind}': is it complete, and of type {self._config.model_type}?"
                )
        alone = len(names) == 1  # what is put together is copied by that
        found = [finite(name, self._weights[name].to(**self._to, copy=alone)) for name in (f"{one}.{kind}" for one in names)]
        return found[0] if alone else torch.cat(found)

    def has(self, name: str, kind: str = "weight") -> bool:
        """Whether there is a tensor called ``name.kind``."""
        return f"{name}.{kind}" in self._weights

    def bias(self, *names: str) -> Tensor | None:
        """The biases of linear layers fused into one; None where they have none."""
        return self.tensor(*names, kind="bias") if self.has(names[0], "bias") else None

    def linear(self, *names: str) -> Linear:
        """Linear layers fused into one."""
        return self.make(self.tensor(*names), self.bias(*names))

    def make(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A linear layer of given weights."""
        return make_linear(weight, bias, packed=self._packed)

    def norm(self, name: str) -> Norm:
        """A norm."""
        return make_norm(self.tensor(name), self._config.rms_norm_eps)

    def norm_if_any(self, name: str) -> Norm | None:
        """A norm that some models have."""
        return self.norm(name) if self.has(name) else None
