"""The heads of Medusa: one for each position after the root, over the feature before the root."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.heads.layers import FINAL, FittedLinear, Initial, ResBlock, Shape, spread


class MedusaHeads(nn.Module):
    """The heads of Medusa. Head k predicts the token k + 1 positions after the root, independently of the tokens between.

    Each head applies residual blocks to the feature before the root. A linear layer follows, over the whole vocabulary or over
    the `draft_vocab_size` tokens of `token_map`.

    Source: Medusa (arXiv 2401.10774), section 2.1.1.
    """

    feature_layers: Sequence[int] = FINAL
    token_map: Int[Tensor, " w"] | None

    def __init__(self, shape: Shape, *, num_heads: int = 4, num_layers: int = 1, draft_vocab_size: int | None = None):
        super().__init__()
        self.vocab_size, size = shape.vocab, draft_vocab_size or shape.vocab
        self.register_buffer("token_map", torch.arange(size) if draft_vocab_size else None)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(shape.hidden) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(shape.hidden, size, bias=False) for _ in range(num_heads))

    @property
    def token_ids(self) -> Int[Tensor, " w"] | None:
        """The token of every draft id; None if draft ids are token ids."""
        return self.token_map

    def initial(self) -> Initial:
        """Returns the layers whose first weights come from the target."""
        fitted = [FittedLinear(linear, ahead=1 + k, num_embeddings=0) for k, linear in enumerate(self.lm_heads)]
        return Initial(fitted, self.lm_heads)

    @property
    def num_slots(self) -> int:
        """Number of tokens drafted at once."""
        return len(self.blocks)

    def forward(self, feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k v"]:
        """Returns logits of every slot."""
        logits = torch.stack([head(block(feature)) for block, head in zip(self.blocks, self.lm_heads, strict=True)], dim=-2)
        return logits if self.token_map is None else spread(logits, self.token_map, self.vocab_size)
