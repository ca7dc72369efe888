"""Attention of draft heads during training, over whole texts. During decoding, heads use `foredraft.drafters.pairs`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.heads.layers import Attend
from foredraft.kernels.attention import rotate
from foredraft.models.rope import rotary_tables

Tables = tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]


def tables(config: Any, device: torch.device) -> Tables:
    """Computes the rotary cos and sin tables of a head's layer, in float32, for every position that it supports."""
    return rotary_tables(config, config.max_position_embeddings, torch.float32, device)


def unrolled(rotary: Tables) -> Attend:
    """Returns the attention of a head that runs several times over a text and reads its own features of the run before.

    The returned function keeps the keys and values of all runs, so each training batch needs a new one. The first run
    (run 0) is causal. In run j, row r stands for a draft of j tokens after pair r, at position r + j. It attends to the rows
    up to r of run 0 and to row r of runs 1 to j.

    Source: training-time test, EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    past: list[tuple[Tensor, Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        run, length, group = len(past), query.shape[1], query.shape[2] // key.shape[2]
        cos, sin = (table[run : run + length, None].to(query.dtype) for table in rotary)
        query, key = rotate(query, (cos, sin)), rotate(key, (cos, sin))
        past.append((key, value))
        if run == 0:
            heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)
        keys, values = ([pair[i].repeat_interleave(group, dim=2) for pair in past] for i in (0, 1))
        scores = torch.einsum("bqhe,bkhe->bhqk", query, keys[0])
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        own = torch.stack([(query * own_key).sum(-1) for own_key in keys[1:]], dim=-1).transpose(1, 2)  # [b, h, q, run]
        weights = (torch.cat([scores, own], dim=-1) * query.shape[-1] ** -0.5).float().softmax(-1).to(query.dtype)
        out = torch.einsum("bhqk,bkhe->bqhe", weights[..., :length], values[0])
        out = out + sum(
            weights[..., length + i].transpose(1, 2)[..., None] * own_value for i, own_value in enumerate(values[1:])
        )
        return out.flatten(2)

    return attend


def with_slots(rotary: Tables, length: int, anchors: Int[Tensor, "b a"], num_slots: int) -> Attend:
    """Returns the attention of a text's pairs, followed by the slots of some of the pairs (anchors).

    A pair attends to the pairs up to itself. Slot k of an anchor attends to the pairs up to the anchor and to the slots of the
    same anchor up to k. Scores between the slots of different anchors are never computed.
    """
    places = torch.arange(length, device=anchors.device).expand(len(anchors), -1)
    behind = (anchors[:, :, None] + 1 + torch.arange(num_slots, device=anchors.device)).flatten(1)
    cos, sin = (table[torch.cat([places, behind], dim=1)][:, :, None] for table in rotary)
    hidden = (places[:, None] > anchors[:, :, None])[:, None, :, None]  # [b, 1, a, 1, t]
    later = torch.ones(num_slots, num_slots, dtype=torch.bool, device=anchors.device).triu(1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rotation = cos.to(query.dtype), sin.to(query.dtype)
        query, key = rotate(query, rotation), rotate(key, rotation)
        q, k, v = (rows[:, :length].transpose(1, 2) for rows in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        query = query[:, length:].unflatten(1, (-1, num_slots))
        key, value = (rows.repeat_interleave(query.shape[3] // rows.shape[2], dim=2) for rows in (key, value))
        own_key, own_value = (rows[:, length:].unflatten(1, (-1, num_slots)) for rows in (key, value))
        over_pairs = torch.einsum("balhe,bthe->bhalt", query, key[:, :length]).masked_fill(hidden, -torch.inf)
        over_own = torch.einsum("balhe,bamhe->bhalm", query, own_key).masked_fill(later, -torch.inf)
        weights = (torch.cat([over_pairs, over_own], dim=-1) * query.shape[-1] ** -0.5).float().softmax(-1).to(query.dtype)
        slots = torch.einsum("bhalt,bthe->balhe", weights[..., :length], value[:, :length])
        slots = slots + torch.einsum("bhalm,bamhe->balhe", weights[..., length:], own_value)
        return torch.cat([out, slots.flatten(1, 2).flatten(2)], dim=1)

    return attend
