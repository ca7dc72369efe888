"""Initial weights of draft heads.

Output layers are copied from the target. Input layers are fitted to predict the target's features. The residual branches
between them start at zero. A head therefore starts as the best linear prediction, and its layers learn the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.core.contracts import Target
from foredraft.heads.layers import FittedLinear
from foredraft.train.batches import Batch
from foredraft.train.frozen import Frozen
from foredraft.train.texts import Text

FITTED_TOKENS = 65_536
"""Number of positions on which the input layers are fitted."""

_RIDGE = 1e-3
"""Ridge term that is added to the diagonal, as a share of the diagonal's mean."""

_SILENT = ("o_proj", "down_proj")
"""Names of the last matrices of residual branches. They start at zero."""


def token_counts(texts: Sequence[Text], target: Target) -> Int[Tensor, " v"]:
    """Counts how often each token occurs in the answers."""
    counts = torch.zeros(target.vocab_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.ids[text.answer].long(), minlength=target.vocab_size)
    return counts.to(target.device)


@torch.no_grad()
def begin(head: Any, frozen: Frozen, counts: Int[Tensor, " v"], batches: list[Batch]) -> None:
    """Sets the initial weights of a head, in place.

    Args:
        counts: how often each token occurs in the answers. A reduced draft vocabulary holds the most frequent tokens.
        batches: texts on which the input layers are fitted.
    """
    start, rows = head.initial(), frozen.weight
    if start.d2t is not None:
        chosen = counts.argsort(descending=True, stable=True)[: len(start.d2t)].sort().values
        start.d2t.copy_(chosen - torch.arange(len(chosen), device=chosen.device))
        rows = rows[chosen]
    if start.embedding is not None:
        every = frozen.embed(torch.arange(len(counts), device=counts.device))
        start.embedding.weight.copy_(every @ directions(every, start.embedding.embedding_dim))
    for layer in start.outputs:
        narrower = layer.in_features != rows.shape[1]
        layer.weight.copy_(rows @ directions(frozen.weight, layer.in_features) if narrower else rows)
    for name, module in head.named_modules():
        if name.endswith(_SILENT):
            nn.init.zeros_(module.weight)
    for prediction in start.fitted:
        linear = prediction.linear
        matrix, bias = fitted(prediction, frozen, batches)
        if linear.out_features == len(frozen.weight):
            matrix = frozen.weight @ matrix
        elif linear.out_features != len(matrix):
            matrix = directions(frozen.weight, linear.out_features).T @ matrix
        linear.weight.copy_(matrix)
        if linear.bias is not None:
            linear.bias.copy_(bias)


def directions(rows: Float[Tensor, "n d"], width: int) -> Float[Tensor, "d w"]:
    """Computes the `width` directions in which the rows vary most (their principal components), one per column.

    Missing directions are zero where `width` exceeds d. The result is the identity where `width` equals d.
    """
    if rows.shape[1] == width:
        return torch.eye(width).to(rows)
    centred = (rows - rows.mean(0)).double()
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    return F.pad(vectors.to(rows), (0, width - vectors.shape[1]))


def fitted(prediction: FittedLinear, frozen: Frozen, batches: list[Batch]) -> tuple[Float[Tensor, "d i"], Float[Tensor, " d"]]:
    """Fits a head's linear input layer by ridge regression, over the positions of answers.

    It predicts the target's final feature `prediction.ahead` positions later.

    Returns:
        The weight and the bias.
    """
    gram = moment = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        length = batch.ids.shape[1] - prediction.ahead
        if length < 1:
            continue
        embeddings = [frozen.embed(batch.ids[:, 1 + k : 1 + k + length]) for k in range(prediction.num_embeddings)]
        features = [batch.features[:, :length]]
        parts = [*features, *embeddings] if prediction.features_first else [*embeddings, *features]
        mask = batch.answer[:, prediction.ahead :]
        given = F.pad(torch.cat(parts, dim=-1)[mask], (0, 1), value=1.0).double()
        gram = gram + given.T @ given
        moment = moment + given.T @ batch.final[:, prediction.ahead :][mask].double()
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, moment).T.float()
    return solution[:, :-1], solution[:, -1]
