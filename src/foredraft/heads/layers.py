"""Layers that several draft heads share. Parameter names are those of the released checkpoints.

The attention is an argument. The same layers can thus train on whole texts and draft trees behind a cache.

The input of a head is a sequence of *pairs*: the embedding e of a committed token and the target's feature f at the token
before it. The last pair of a text is (root, feature before the root). A head thus sees the root although the target has not
run it.

    token       t1     t2     t3    ...   root
    feature     f0     f1     f2    ...   f before the root
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [*n, h, e], key [*n, k, e], value [*n, k, e]), not rotated -> [*n, h * e]."""

TargetEmbedding = Callable[[Tensor], Tensor]
"""The target's own embedding: token ids [*n] -> [*n, d]. It is frozen and shared."""

TargetHead = Callable[[Tensor], Tensor]
"""The target's own head: final features [n, d] -> logits [n, v]. It is frozen and shared."""

FINAL = (-1,)
"""The target's state after its last norm, which is the input of the target's output head."""


@dataclass(frozen=True)
class Shape:
    """Widths of a head. They equal those of the target unless the checkpoint sets others.

    Attributes:
        vocab: vocabulary size of the target.
        target_hidden: width of the target's features; None if it equals `hidden`.
    """

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
        """Width of a feature of the target."""
        return self.target_hidden or self.hidden

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Reads the widths from a Transformers configuration."""
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
    """RMSNorm: root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Normalises the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """The projections around an attention function. Options add biases (Qwen2) or norms of queries and keys (Qwen3)."""

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
        """Applies attention from the new rows to all rows that `attend` makes visible."""
        query, key, value = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.q_norm(query), self.k_norm(key), value))


class Gated(nn.Module):
    """A perceptron with a SiLU gate (SwiGLU). An argument `gated_by` drives the gate in place of the input."""

    def __init__(self, hidden: int, intermediate: int, outputs: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, outputs, bias=False)

    def forward(self, x: Float[Tensor, "*n d"], gated_by: Float[Tensor, "*n d"] | None = None) -> Float[Tensor, "*n o"]:
        """Applies the perceptron."""
        return self.down_proj(F.silu(self.gate_proj(x if gated_by is None else gated_by)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer. As in EAGLE, it has no norm before its attention unless `input_norm` is set.

    With `outputs` 2, the output is twice as wide and the residual is added to both halves.
    """

    def __init__(self, shape: Shape, outputs: int = 1, *, input_norm: bool = False, qkv_bias: bool = False):
        super().__init__()
        self.outputs = outputs
        self.input_layernorm = Norm(shape.hidden, shape.eps) if input_norm else nn.Identity()
        self.self_attn = Attention(shape, shape.hidden, qkv_bias=qkv_bias)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Gated(shape.hidden, shape.intermediate, outputs * shape.hidden)

    def forward(self, x: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n o"]:
        """Applies attention and then the feed-forward part, each with its residual."""
        x = x + self.self_attn(self.input_layernorm(x), attend)
        return torch.cat([x] * self.outputs, dim=-1) + self.mlp(self.post_attention_layernorm(x))


class WideLayer(nn.Module):
    """The layer of EAGLE-3: attention over [norm of the embedding ; norm of the feature].

    The residual is the feature, or the norm of the feature with `norm_before_residual`.

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
        """Applies the layer. Its attention reads both inputs, concatenated."""
        normed = self.hidden_norm(feature)
        x = torch.cat([self.input_layernorm(embedding), normed], dim=-1)
        x = (normed if self.norm_before_residual else feature) + self.self_attn(x, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class ResBlock(nn.Module):
    """A residual block: x + SiLU(W x + b), with W initialised to zero.

    If the input is wider than the output, a linear layer replaces the residual connection.

    Source: Medusa (arXiv 2401.10774), section 2.1.1; Hydra (arXiv 2402.05109), section 3.
    """

    def __init__(self, size: int, inputs: int | None = None):
        super().__init__()
        self.linear = nn.Linear(inputs or size, size)
        self.res_connection = nn.Linear(inputs, size) if inputs is not None and inputs != size else nn.Identity()
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n d"]:
        """Applies the block."""
        return self.res_connection(x) + F.silu(self.linear(x))


class Fusion(nn.Linear):
    """The entry of EAGLE: one linear layer over embedding and feature."""

    def __init__(self, shape: Shape):
        super().__init__(2 * shape.hidden, shape.hidden)

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # type: ignore[override]
        """Returns one vector per position."""
        return super().forward(torch.cat([embedding, feature], dim=-1))


class FittedLinear(NamedTuple):
    """A linear layer that predicts a later feature of the target by itself. It can therefore be fitted before training.

    Attributes:
        linear: an `nn.Linear` whose inputs are the features and embeddings of a pair, concatenated.
        ahead: the predicted feature is this many positions after the pair's own feature.
        num_embeddings: number of embeddings in the input: those of the pair's token and of the tokens after it.
        features_first: whether the features come before the embeddings in the input.
    """

    linear: Any
    ahead: int = 1
    num_embeddings: int = 1
    features_first: bool = False


class Initial(NamedTuple):
    """The layers of a head whose first weights come from the target. Every head has a method `initial` that returns them.

    Attributes:
        fitted: layers that are fitted.
        outputs: output layers, which start as the target's.
        embedding: the head's own embedding, which starts as the target's; None if it has none.
        d2t: if the output layers cover a reduced vocabulary that is chosen before training: token id minus draft id.
    """

    fitted: Sequence[FittedLinear]
    outputs: Iterable[Any] = ()
    embedding: Any = None
    d2t: Tensor | None = None


def spread(logits: Float[Tensor, "*n w"], token_ids: Int[Tensor, " w"], vocab_size: int) -> Float[Tensor, "*n v"]:
    """Extends logits of some tokens to the whole vocabulary. The other tokens get minus infinity and are never drafted."""
    full = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    full[..., token_ids] = logits
    return full
