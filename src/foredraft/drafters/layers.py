"""Layers of draft heads. Parameter names are those of the released checkpoints; attention is passed in, so that the same layers
train on whole texts and draft on trees behind a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [*n, h, e], key [*n, k, e], value [*n, k, e]), not rotated -> [*n, h * e]."""


@dataclass(frozen=True)
class Shape:
    """Widths of a head; those of the target unless a checkpoint says otherwise. `vocab` is the target's, and so is
    `target_hidden`, the width of its features; None: the head's own."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    vocab: int
    target_hidden: int | None = None

    @property
    def features(self) -> int:
        """Width of one of the target's features."""
        return self.target_hidden or self.hidden

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Transformers configuration."""
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=getattr(config, "rms_norm_eps", 1e-6),
            vocab=config.vocab_size,
            target_hidden=getattr(config, "target_hidden_size", None),
        )


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Root-mean-square normalisation of the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections around an attention that is passed in; with biases (Qwen2) or norms of queries and keys (Qwen3)."""

    def __init__(self, shape: Shape, inputs: int, *, qkv_bias: bool = False, qk_norm: bool = False):
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(inputs, shape.heads * shape.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(inputs, shape.kv_heads * shape.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(inputs, shape.kv_heads * shape.head_dim, bias=qkv_bias)
        self.q_norm = Norm(shape.head_dim, shape.eps) if qk_norm else nn.Identity()
        self.k_norm = Norm(shape.head_dim, shape.eps) if qk_norm else nn.Identity()
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Float[Tensor, "*n i"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Attention of the new rows to all earlier ones."""
        query, key, value = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(query), self.k_norm(key), value))


class Gated(nn.Module):
    """SiLU-gated perceptron; `gated_by` drives the gate with something else than the input."""

    def __init__(self, hidden: int, intermediate: int, outputs: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, outputs, bias=False)

    def forward(self, x: Float[Tensor, "*n d"], gated_by: Float[Tensor, "*n d"] | None = None) -> Float[Tensor, "*n o"]:
        """The gated feed-forward part (SwiGLU)."""
        return self.down_proj(F.silu(self.gate_proj(x if gated_by is None else gated_by)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer without a norm before its attention (EAGLE's convention) unless `input_norm`; with `outputs` 2, its
    residual is doubled."""

    def __init__(self, shape: Shape, outputs: int = 1, *, input_norm: bool = False, qkv_bias: bool = False):
        super().__init__()
        self.outputs = outputs
        self.input_layernorm = Norm(shape.hidden, shape.eps) if input_norm else nn.Identity()
        self.self_attn = Attention(shape, shape.hidden, qkv_bias=qkv_bias)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Gated(shape.hidden, shape.intermediate, outputs * shape.hidden)

    def forward(self, x: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n o"]:
        """One decoder layer: attention, then the feed-forward part, each with its residual."""
        x = x + self.self_attn(self.input_layernorm(x), attend)
        return torch.cat([x] * self.outputs, dim=-1) + self.mlp(self.post_attention_layernorm(x))


class WideLayer(nn.Module):
    """EAGLE-3's layer: attention over [norm of the embedding ; norm of the feature], the residual on the feature (with
    `norm_before_residual`, on its norm).

    Source: EAGLE-3 (arXiv 2503.01840), section 3.1; the released code.
    """

    def __init__(self, shape: Shape, *, norm_before_residual: bool = False, qkv_bias: bool = False, qk_norm: bool = False):
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.hidden_norm = Norm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape, 2 * shape.hidden, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Gated(shape.hidden, shape.intermediate, shape.hidden)

    def forward(
        self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"], attend: Attend
    ) -> Float[Tensor, "*n d"]:
        """One decoder layer whose attention reads two inputs side by side."""
        normed = self.hidden_norm(feature)
        x = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        x = (normed if self.norm_before_residual else feature) + self.self_attn(x, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class ResBlock(nn.Module):
    """x + SiLU(W x), W zero at first; a block that takes more inputs than it gives passes them by a linear layer.

    Source: Medusa (arXiv 2401.10774), section 2.1.1; Hydra (arXiv 2402.05109), section 3.
    """

    def __init__(self, size: int, inputs: int | None = None):
        super().__init__()
        self.linear = nn.Linear(inputs or size, size)
        self.res_connection = nn.Linear(inputs, size) if inputs is not None and inputs != size else nn.Identity()
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n d"]:
        """The input plus SiLU of a linear layer of it."""
        return self.res_connection(x) + F.silu(self.linear(x))
