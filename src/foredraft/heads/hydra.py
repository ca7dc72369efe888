"""The heads of Hydra: one for each position after the root, over a feature and the tokens drafted before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foredraft.heads.layers import FINAL, Attend, FittedLinear, Initial, Layer, Norm, ResBlock, Shape


class HydraHeads(nn.Module):
    """The heads of Hydra. Head i reads the feature, and the embeddings of the root and of the i tokens drafted after it.

    With `prefix_attention` (Hydra++), a decoder layer first transforms the feature. That layer attends to the features of all
    committed tokens. In the released heads, it has a norm before it and one after it (`prefix_norms`), and the output layers
    have a bias (`head_bias`).

    Source: Hydra (arXiv 2402.05109), section 3; Hydra++: section 4; the released code.
    """

    feature_layers: Sequence[int] = FINAL

    def __init__(
        self,
        shape: Shape,
        *,
        num_heads: int = 4,
        num_layers: int = 4,
        prefix_attention: bool = True,
        prefix_norms: bool = False,
        head_bias: bool = False,
    ):
        super().__init__()
        self.prefix = Layer(shape, input_norm=prefix_norms) if prefix_attention else None
        self.prefix_norm = Norm(shape.hidden, shape.eps) if prefix_norms else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ResBlock(shape.hidden, (i + 2) * shape.hidden), *(ResBlock(shape.hidden) for _ in range(num_layers - 1))
            )
            for i in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(shape.hidden, shape.vocab, bias=head_bias) for _ in range(num_heads))

    def initial(self) -> Initial:
        """Returns the layers whose first weights come from the target."""
        entries = [blocks[0].res_connection for blocks in self.blocks]  # type: ignore[index]
        fitted = [FittedLinear(entry, 1 + i, 1 + i, features_first=True) for i, entry in enumerate(entries)]
        return Initial(fitted, self.lm_heads)

    @property
    def num_slots(self) -> int:
        """Number of heads, which is the largest depth of a tree."""
        return len(self.blocks)

    def read(self, feature: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Converts features to the input of the heads."""
        return feature if self.prefix is None else self.prefix_norm(self.prefix(feature, attend))

    def state(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n d"]:
        """Returns the input of the output layer of head i. `embeddings` are those of its i + 1 tokens, concatenated."""
        return self.blocks[i](torch.cat([feature, embeddings], dim=-1))

    def forward(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n v"]:
        """Returns the logits of head i."""
        return self.lm_heads[i](self.state(i, feature, embeddings))
