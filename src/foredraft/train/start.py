"""Where heads begin: output layers as the target's, entries fitted to foretell its features, everything between silent.

A head that begins so is the best linear guess of what it is to say; its layers learn what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.drafters.heads import Foretelling
from foredraft.train.batches import Batch
from foredraft.train.frozen import Frozen
from foredraft.train.shards import Text

FITTED_TOKENS = 65_536
"""Positions that the entries are fitted on."""

_RIDGE = 1e-3
"""Added to the diagonal, as a share of its mean."""

_SILENT = ("o_proj", "down_proj")
"""Last matrices of residual branches: zero at first."""


def token_counts(texts: Sequence[Text], target: Any) -> Int[Tensor, " v"]:
    """How often every token stands in an answer."""
    counts = torch.zeros(target.vocab_size, dtype=torch.long)
    for text in texts:
        counts += torch.bincount(text.ids[text.answer].long(), minlength=target.vocab_size)
    return counts.to(target.device)


@torch.no_grad()
def begin(head: Any, frozen: Frozen, counts: Int[Tensor, " v"], batches: list[Batch]) -> None:
    """Gives a head its first weights.

    Args:
        counts: how often every token stands in an answer; a reduced vocabulary is that of the most frequent ones.
        batches: texts that the entries are fitted on.
    """
    if hasattr(head, "d2t"):
        inner = directions(frozen.weight, head.lm_head.in_features)
        chosen = counts.argsort(descending=True, stable=True)[: len(head.d2t)].sort().values
        head.d2t.copy_(chosen - torch.arange(len(chosen), device=chosen.device))
        head.lm_head.weight.copy_(frozen.weight[chosen] @ inner)
    if getattr(head, "embed_tokens", None) is not None:
        every = frozen.embed(torch.arange(len(counts), device=counts.device))
        head.embed_tokens.weight.copy_(every @ directions(every, head.embed_tokens.embedding_dim))
    for one in getattr(head, "lm_heads", ()):
        one.weight.copy_(frozen.weight)
    for name, module in head.named_modules():
        if name.endswith(_SILENT):
            nn.init.zeros_(module.weight)
    for one in head.foretellings():
        matrix, bias = fitted(one, frozen, batches)
        if one.linear.out_features == len(frozen.weight):
            matrix = frozen.weight @ matrix
        elif one.linear.out_features != len(matrix):
            matrix = directions(frozen.weight, one.linear.out_features).T @ matrix
        one.linear.weight.copy_(matrix)
        if one.linear.bias is not None:
            one.linear.bias.copy_(bias)


def directions(rows: Float[Tensor, "n d"], width: int) -> Float[Tensor, "d w"]:
    """The `width` directions in which rows differ most (zeros where there are fewer); the identity at their own width."""
    if rows.shape[1] == width:
        return torch.eye(width).to(rows)
    centred = (rows - rows.mean(0)).double()
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    return F.pad(vectors.to(rows), (0, width - vectors.shape[1]))


def fitted(one: Foretelling, frozen: Frozen, batches: list[Batch]) -> tuple[Float[Tensor, "d i"], Float[Tensor, " d"]]:
    """The ridge regression of the target's final feature `one.ahead` places on, over the positions of answers."""
    gram = moment = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        length = batch.ids.shape[1] - one.ahead
        if length < 1:
            continue
        embeddings = [frozen.embed(batch.ids[:, 1 + k : 1 + k + length]) for k in range(one.num_embeddings)]
        features = [batch.features[:, :length]]
        parts = [*features, *embeddings] if one.features_first else [*embeddings, *features]
        mask = batch.answer[:, one.ahead :]
        given = F.pad(torch.cat(parts, dim=-1)[mask], (0, 1), value=1.0).double()
        gram = gram + given.T @ given
        moment = moment + given.T @ batch.final[:, one.ahead :][mask].double()
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, moment).T.float()
    return solution[:, :-1], solution[:, -1]
