"""Rotary positions, and attention of tree nodes to their cache: shared by our decoder and by draft heads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from foredraft.cache import KVPool, Layout

_STEADY = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

Rotation = tuple[Float[Tensor, "*p 1 e"], Float[Tensor, "*p 1 e"]]
"""Cosines and signed sines of the position of each row, see `foredraft.models.rope`; rows of a batch may share them."""


def rotate(x: Float[Tensor, "*n h e"], rotation: Rotation, out: Tensor | None = None) -> Float[Tensor, "*n h e"]:
    """Heads turned by the position of their row."""
    cos, sin = rotation
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin, out=out)


def steady(device: torch.device) -> AbstractContextManager[Any]:
    """Attention by kernels that take any length at once. What torch prefers on recent cards, cuDNN's, makes a plan for every
    length that it has not seen: tens of milliseconds in nearly every step."""
    return sdpa_kernel(_STEADY) if device.type == "cuda" else nullcontext()


def attend(
    index: int, states: Sequence[Float[Tensor, "m _ e"]], mask: Tensor | None, layout: Layout, pool: KVPool
) -> Float[Tensor, "m he"]:
    """Stores the new nodes' keys and values of a layer, and lets the nodes attend to what is there.

    Args:
        states: queries, keys and values, rotated.
        mask: of the padded batch, its rows repeated for the query heads that share a key head; None: all is visible.
    """
    query, key, value = states
    size = query.shape[-1]
    pool.write(index, layout, key, value)
    keys, values = pool.read(index, layout)
    padded = layout.pad(query)  # [B, N, H, E]
    count, width = padded.shape[:2]
    padded = padded.view(count, width, key.shape[1], -1, size).permute(0, 2, 3, 1, 4)
    padded = padded.reshape(count, key.shape[1], -1, size)  # query heads that share a key head become rows
    with steady(query.device):
        out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask)
    out = out.view(count, key.shape[1], -1, width, size).permute(0, 3, 1, 2, 4)
    return layout.unpad(out.reshape(count, width, -1))
