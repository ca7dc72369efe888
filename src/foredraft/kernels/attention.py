"""Rotary embedding, and attention of tree nodes over their cache, in torch. The decoder and the draft heads share them.

Compiled attention is a part of the compiled decoder (`c/attention.h`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_ANY_LENGTH = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

Rotation = tuple[Float[Tensor, "*p 1 e"], Float[Tensor, "*p 1 e"]]
"""Cosines and signed sines of the position of each row, see `foredraft.models.rope`. Rows of a batch may share them."""


def rotate(x: Float[Tensor, "*n h e"], rotation: Rotation, out: Tensor | None = None) -> Float[Tensor, "*n h e"]:
    """Applies the rotary embedding: rotates each head by the position of its row."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, out=out)


def any_length_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Selects attention kernels that need no plan for each length.

    On recent GPUs torch prefers cuDNN's kernel. That kernel plans for every new length, which costs tens of milliseconds in
    nearly every step.
    """
    return sdpa_kernel(_ANY_LENGTH) if device.type == "cuda" else nullcontext()


def attend(
    query: Float[Tensor, "b n h e"], keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g t e"], mask: Tensor | None
) -> Float[Tensor, "b n he"]:
    """Computes attention of the nodes of each request over its cache.

    Args:
        query: rotated queries, padded to the widest tree.
        keys: rotated keys of each cache and of its new nodes.
        values: their values.
        mask: additive mask, its rows repeated for the query heads that share a key head. None makes every position visible.
    """
    count, width, _, size = query.shape
    groups = keys.shape[1]
    rows = query.view(count, width, groups, -1, size).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(count, groups, -1, size)  # query heads that share a key head become rows
    with any_length_kernels(query.device):
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return out.view(count, groups, -1, width, size).permute(0, 3, 1, 2, 4).reshape(count, width, -1)
