"""Rotary embedding and attention over the cache of a tree. Our decoder and the draft heads share them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foredraft.cache.layout import Layout
from foredraft.cache.pool import KVPool

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
    index: int, states: Sequence[Float[Tensor, "m _ e"]], mask: Tensor | None, layout: Layout, pool: KVPool
) -> Float[Tensor, "m he"]:
    """Stores the keys and values of the new nodes, then computes attention of the new nodes over the cache.

    Args:
        index: index of the layer.
        states: queries, keys and values of the new nodes. Queries and keys are rotated.
        mask: additive mask of the padded batch, its rows repeated for the query heads that share a key head. None makes every
            position visible.
        layout: places of the new nodes in the batch and in the pool.
        pool: keys and values of all requests.
    """
    query, key, value = states
    size = query.shape[-1]
    pool.write(index, layout, key, value)
    keys, values = pool.read(index, layout)
    padded = layout.pad(query)  # [B, N, H, E]
    count, width = padded.shape[:2]
    padded = padded.view(count, width, key.shape[1], -1, size).permute(0, 2, 3, 1, 4)
    padded = padded.reshape(count, key.shape[1], -1, size)  # query heads that share a key head become rows
    with any_length_kernels(query.device):
        out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask)
    out = out.view(count, key.shape[1], -1, width, size).permute(0, 3, 1, 2, 4)
    return layout.unpad(out.reshape(count, width, -1))
