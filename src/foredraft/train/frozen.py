"""What training uses of the target: its embedding and its head, frozen, in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.models.checkpoint import ModelError


class Frozen:
    """The target's embedding and head as functions that gradients pass.

    Attributes:
        weight: of the head.

    Raises:
        ModelError: the head is not linear.
    """

    def __init__(self, target: Any, hidden: int):
        eye = torch.eye(hidden, dtype=target.dtype, device=target.device)
        self.weight: Float[Tensor, "v d"] = target.head(eye).detach().float().T.contiguous().clone()
        probe = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)).to(eye)
        wanted, got = target.head(probe).float(), self.head(probe.float())
        if (wanted - got).abs().max() > 0.02 * wanted.abs().max():
            raise ModelError(
                "the target's head is not linear: train a head with an output layer of its own (medusa, hydra, eagle3)"
            )
        self._target = target

    def embed(self, token_ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Embeddings of tokens."""
        return self._target.embed(token_ids.flatten()).clone().float().view(*token_ids.shape, -1)

    def head(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Logits of final features."""
        return F.linear(features, self.weight)

    @torch.no_grad()
    def probs(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """The target's law after its own features."""
        return self.head(features).float().softmax(-1)
