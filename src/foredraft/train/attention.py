"""The attention of heads while they are trained on whole texts; at work they attend through `foredraft.drafters.pairs`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.drafters.layers import Attend
from foredraft.models.attention import rotate
from foredraft.models.rope import rotary_tables

Tables = tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]


def tables(config: Any, device: torch.device) -> Tables:
    """Rotary tables of a head's layer."""
    return rotary_tables(config, config.max_position_embeddings, torch.float32, device)


def unrolled(rotary: Tables) -> Attend:
    """Attention of a head that is run several times over a text, its own features fed back: the first run is causal; in run j
    the row at r
    stands for a draft of j tokens behind pair r, at position r + j. It sees the pairs up to r and its own row of the runs
    before.

    Source: training-time test, EAGLE-3 (arXiv 2503.01840), section 3.2.
    """
    past: list[tuple[Tensor, Tensor]] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        run, length, group = len(past), query.shape[1], query.shape[2] // key.shape[2]
        cos, sin = (one[run : run + length, None].to(query.dtype) for one in rotary)
        query, key = rotate(query, (cos, sin)), rotate(key, (cos, sin))
        past.append((key, value))
        if run == 0:
            heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(2)
        keys, values = ([one[i].repeat_interleave(group, dim=2) for one in past] for i in (0, 1))
        scores = torch.einsum("bqhe,bkhe->bhqk", query, keys[0])
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        own = torch.stack([(query * one).sum(-1) for one in keys[1:]], dim=-1).transpose(1, 2)  # [b, h, q, run]
        weights = (torch.cat([scores, own], dim=-1) * query.shape[-1] ** -0.5).float().softmax(-1).to(query.dtype)
        out = torch.einsum("bhqk,bkhe->bqhe", weights[..., :length], values[0])
        out = out + sum(weights[..., length + i].transpose(1, 2)[..., None] * one for i, one in enumerate(values[1:]))
        return out.flatten(2)

    return attend


def masked(rotary: Tables, positions: Int[Tensor, "b q"], visible: Bool[Tensor, "b q q"]) -> Attend:
    """Attention by an explicit mask."""
    cos, sin = (one[positions][:, :, None] for one in rotary)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rotation = cos.to(query.dtype), sin.to(query.dtype)
        query, key = rotate(query, rotation), rotate(key, rotation)
        heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(*heads, attn_mask=visible[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def slot_rows(length: int, anchors: Int[Tensor, "b a"], num_slots: int) -> tuple[Int[Tensor, "b q"], Bool[Tensor, "b q q"]]:
    """Positions of a text's pairs and, behind them, of slots for some of the pairs, and who sees whom.

    A pair sees the pairs up to itself; slot k of an anchor sees the pairs up to the anchor and the anchor's slots up to k.
    """
    batch, count = anchors.shape
    slots = torch.arange(num_slots, device=anchors.device)
    owner = torch.arange(count, device=anchors.device).repeat_interleave(num_slots)
    until = torch.cat([torch.arange(length, device=anchors.device).expand(batch, -1), anchors[:, owner]], dim=1)
    visible = torch.zeros(batch, until.shape[1], until.shape[1], dtype=torch.bool, device=anchors.device)
    visible[:, :, :length] = torch.arange(length, device=anchors.device) <= until[:, :, None]
    within = (owner[:, None] == owner) & (slots.repeat(count)[:, None] >= slots.repeat(count))
    visible[:, length:, length:] = within
    return torch.cat([until[:, :length], until[:, length:] + 1 + slots.repeat(count)], dim=1), visible


def with_slots(rotary: Tables, length: int, anchors: Int[Tensor, "b a"], num_slots: int) -> Attend:
    """Attention of `slot_rows`, as `masked` has it, without rows that are masked out: pairs among themselves, slots over the
    pairs and over their own anchor's slots."""
    places = torch.arange(length, device=anchors.device).expand(len(anchors), -1)
    behind = (anchors[:, :, None] + 1 + torch.arange(num_slots, device=anchors.device)).flatten(1)
    cos, sin = (one[torch.cat([places, behind], dim=1)][:, :, None] for one in rotary)
    hidden = (places[:, None] > anchors[:, :, None])[:, None, :, None]  # [b, 1, a, 1, t]
    later = torch.ones(num_slots, num_slots, dtype=torch.bool, device=anchors.device).triu(1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rotation = cos.to(query.dtype), sin.to(query.dtype)
        query, key = rotate(query, rotation), rotate(key, rotation)
        q, k, v = (one[:, :length].transpose(1, 2) for one in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        query = query[:, length:].unflatten(1, (-1, num_slots))
        key, value = (one.repeat_interleave(query.shape[3] // one.shape[2], dim=2) for one in (key, value))
        own_key, own_value = (one[:, length:].unflatten(1, (-1, num_slots)) for one in (key, value))
        over_pairs = torch.einsum("balhe,bthe->bhalt", query, key[:, :length]).masked_fill(hidden, -torch.inf)
        over_own = torch.einsum("balhe,bamhe->bhalm", query, own_key).masked_fill(later, -torch.inf)
        weights = (torch.cat([over_pairs, over_own], dim=-1) * query.shape[-1] ** -0.5).float().softmax(-1).to(query.dtype)
        slots = torch.einsum("bhalt,bthe->balhe", weights[..., :length], value[:, :length])
        slots = slots + torch.einsum("bhalm,bamhe->balhe", weights[..., length:], own_value)
        return torch.cat([out, slots.flatten(1, 2).flatten(2)], dim=1)

    return attend
