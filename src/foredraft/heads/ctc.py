"""The head of the CTC-based drafter, and of `parallel`: one layer fills all slots at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foredraft.core.errors import UserError
from foredraft.heads.layers import FINAL, Attend, FittedLinear, Fusion, Initial, Layer, Shape, TargetHead


class CtcHead(nn.Module):
    """One decoder layer over the target's features that fills L slots at once. A slot holds a token or a blank.

    A pair enters the layer as in EAGLE, and the state of the last pair is the first slot. Slot k > 1 has its own linear layer
    over the last pair as its entry. Slots attend to all pairs and to the slots before them. Without `blank`, slot k is the
    token k positions after the root, as in Medusa.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), section 3. docs/drafters/ctc.md describes what the paper leaves open.

    Raises:
        ValueError: `num_slots` is below 2.
    """

    feature_layers: Sequence[int] = FINAL

    def __init__(self, shape: Shape, *, num_slots: int = 6, blank: bool = True):
        super().__init__()
        if num_slots < 2:
            raise UserError(f"num_slots must be at least 2, got {num_slots}")
        self.fc = Fusion(shape)
        self.ahead = nn.ModuleList(Fusion(shape) for _ in range(num_slots - 1))
        self.layers = nn.ModuleList([Layer(shape)])
        self.blank = nn.Linear(shape.hidden, 1) if blank else None

    def initial(self) -> Initial:
        """Returns the layers whose first weights come from the target."""
        return Initial([FittedLinear(entry, ahead=1 + k) for k, entry in enumerate([self.fc, *self.ahead])])

    @property
    def num_slots(self) -> int:
        """L, the number of slots."""
        return len(self.ahead) + 1

    def enter(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Returns the entries of pairs."""
        return self.fc(embedding, feature)

    def enter_ahead(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k d"]:
        """Returns the entries of the slots that follow each pair, from the second slot on."""
        return torch.stack([entry(embedding, feature) for entry in self.ahead], dim=-2)

    def forward(self, entries: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Applies the layer to entries of pairs and slots."""
        return self.layers[0](entries, attend)

    def logits(self, states: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n w"]:
        """Returns logits of slots: those of the target's output head and, as the last entry, that of the blank."""
        logits = target_head(states)
        return logits if self.blank is None else torch.cat([logits, self.blank(states).to(logits.dtype)], dim=-1)
