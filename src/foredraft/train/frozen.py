"""The parts of the target that training uses: its embedding and its output layer, frozen, in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import Target
from foredraft.models.checkpoint import ModelError


class Frozen:
    """The target's embedding and output layer (its head). Gradients flow through both to their inputs.

    Attributes:
        weight: weight of the output layer, in float32.

    Raises:
        ModelError: the output layer is not linear.
    """

    def __init__(self, target: Target, hidden: int):
        eye = torch.eye(hidden, dtype=target.dtype, device=target.device)
        self.weight: Float[Tensor, "v d"] = target.head(eye).detach().float().T.contiguous().clone()
        probe = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)).to(eye)
        wanted, got = target.head(probe).float(), self.head(probe.float())
        if (wanted - got).abs().max() > 0.02 * wanted.abs().max():
            raise ModelError(
                "the target's output layer is not linear", "Train a head with its own output layer (medusa, hydra, eagle3)"
            )
        self._target = target

    def embed(self, token_ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Returns the embeddings of tokens, in float32."""
        return self._target.embed(token_ids.flatten()).clone().float().view(*token_ids.shape, -1)

    def head(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Computes the target's logits from its final features."""
        return F.linear(features, self.weight)
