"""What a recipe is given and gives back. Recipes share it.

The rows of a batch are aligned as in decoding, see `foredraft.heads.layers`: pair j is (token j + 1, feature j).

    pair                  0      1      2
    token                 t1     t2     t3
    feature               f0     f1     f2
    predicted feature     f1     f2     f3
    predicted token       t2     t3     t4

The target's output layer, applied to the predicted feature, gives the distribution of the predicted token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.train import losses
from foredraft.train.attention import Tables
from foredraft.train.batches import Batch
from foredraft.train.frozen import Frozen


class Learned(NamedTuple):
    """Result of a recipe on a batch.

    Attributes:
        loss: the loss to minimise.
        figures: other metrics, as means over the positions of the batch.
    """

    loss: Float[Tensor, ""]
    figures: Mapping[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Lesson:
    """Input of a recipe.

    Attributes:
        head: the head that is trained.
        batch: the texts with the target's features.
        frozen: the target's embedding and output layer.
        rotary: rotary tables of the head's layer.
        options: options of the recipe.
        generator: source of all randomness in this batch. None during evaluation, in which nothing is random.
    """

    head: Any
    batch: Batch
    frozen: Frozen
    rotary: Tables
    options: Mapping[str, Any]
    generator: torch.Generator | None


def shifted(
    values: Float[Tensor, "b t *d"] | Int[Tensor, "b t"] | Bool[Tensor, "b t"], by: int, to: int | None = None
) -> Tensor:
    """Shifts values along the text: ``out[:, j] = values[:, j + by]``, zero beyond the end.

    Args:
        to: length of the result; None: t - 1, the number of pairs.
    """
    length = values.shape[1] - 1 if to is None else to
    out = values.new_zeros(values.shape[0], length, *values.shape[2:])
    part = values[:, by : by + length]
    out[:, : part.shape[1]] = part
    return out


def classified(
    lesson: Lesson,
    states: Float[Tensor, "n d"],
    weight: Float[Tensor, "w d"],
    token_ids: Int[Tensor, " w"] | None,
    wanted: Float[Tensor, "n f"],
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Computes the soft cross-entropy with the target's distribution and, during evaluation, the `agreement` with it.

    Args:
        token_ids: the tokens that can be drafted; None: all tokens. A position whose most likely token cannot be drafted is
            left out, as in EAGLE-3.
    """
    target_weight, known = lesson.frozen.weight, wanted.new_ones(len(wanted))
    if token_ids is not None:
        known = torch.isin(lesson.frozen.head(wanted).argmax(-1), token_ids).float()
        target_weight = target_weight[token_ids]
    loss = losses.distilled(states, weight, wanted, target_weight, known)
    return loss, losses.agreement(states, weight, wanted, target_weight) if lesson.generator is None else {}
