"""The heads of EAGLE, FSPAD and EAGLE-3, which continue from their own predictions.

Their prediction of the root's feature is the feature of the next pair; see `foredraft.heads.layers` for pairs.

    EAGLE       h = W_fc [e ; f] + b                                                     Li et al. 2024 (arXiv 2401.15077)
    FSPAD       h = h0 + W_d (SiLU(W_g e) * (W_u RMSNorm(h0))), h0 = W_fc [e ; f] + b    Gui et al. 2024 (arXiv 2408.15562)
    then both   a = h + Attention(h);  out = a + W_down (SiLU(W_gate n) * (W_up n)), n = RMSNorm(a)

FSPAD's W_down has 2 H outputs, and the residual is doubled. The first half goes to the target's head. The second half is
trained to predict the target's next feature and is the input of the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.heads.layers import (
    FINAL,
    Attend,
    FittedLinear,
    Fusion,
    Gated,
    Initial,
    Layer,
    Norm,
    Shape,
    TargetEmbedding,
    TargetHead,
    WideLayer,
    spread,
)


class Drafted(NamedTuple):
    """Output of a recurrent head.

    Attributes:
        scored: the state from which draft logits are computed.
        carried: the predicted feature, which is the feature of the next pair.
    """

    scored: Float[Tensor, "*n d"]
    carried: Float[Tensor, "*n d"]


class Readout(NamedTuple):
    """Draft logits before multiplication.

    Attributes:
        states: the states, [n, d].
        weight: the output layer, [w, d].
        token_ids: the token of every row of `weight`; None if row i is token i.
    """

    states: Tensor
    weight: Tensor
    token_ids: Tensor | None


class FeatureSampling(nn.Module):
    """The entry of FSPAD: the fused feature plus a gated perceptron of it. The token's embedding drives the gate."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden)
        self.mlp = Gated(shape.hidden, shape.intermediate, shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Returns the fused vector of each position plus the output of the perceptron."""
        fused = self.fc(torch.cat([embedding, feature], dim=-1))
        return fused + self.mlp(self.post_attention_layernorm(fused), gated_by=embedding)


class FeatureHead(nn.Module):
    """The head of EAGLE. The two parts of FSPAD can be switched on separately."""

    feature_layers: Sequence[int] = FINAL

    def __init__(
        self, shape: Shape, *, feature_sampling: bool = False, partial_alignment: bool = False, qkv_bias: bool = False
    ):
        super().__init__()
        self.fc = FeatureSampling(shape) if feature_sampling else Fusion(shape)
        self.layers = nn.ModuleList([Layer(shape, outputs=2 if partial_alignment else 1, qkv_bias=qkv_bias)])

    def initial(self) -> Initial:
        """Returns the layers whose first weights come from the target."""
        return Initial([FittedLinear(self.fc if isinstance(self.fc, Fusion) else self.fc.fc)])

    def embed(self, token_ids: Int[Tensor, "*n"], target_embed: TargetEmbedding) -> Float[Tensor, "*n d"]:
        """Returns the target's embeddings of tokens."""
        return target_embed(token_ids)

    def fuse(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Converts the target's features to the features of pairs, which are the same here."""
        return features

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"], attend: Attend) -> Drafted:
        """Returns the outputs of the pairs."""
        out = self.layers[0](self.fc(embedding, feature), attend)
        scored, *carried = out.split(embedding.shape[-1], dim=-1)
        return Drafted(scored, carried[0] if carried else scored)

    def logits(self, scored: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n v"]:
        """Returns draft logits, computed with the target's output head."""
        return target_head(scored)

    def readout(self, scored: Float[Tensor, "n d"], target_weight: Float[Tensor, "v d"]) -> Readout:
        """Returns the factors of `logits`, before multiplication."""
        return Readout(scored, target_weight, None)


class Eagle3Head(nn.Module):
    """The head of EAGLE-3: fuses features of three depths, and has a wide layer and its own output head.

    The output head may cover a reduced vocabulary. The output of the layer is the feature of the next pair. If the head is not
    as wide as the target, it has its own embedding.

    Args:
        feature_layers: the layers of the target after which features are taken.
        draft_vocab_size: number of tokens that can be drafted; None is the whole vocabulary.
        own_embedding: whether a head as wide as the target has its own embedding too.
        norm_before_fc: apply one norm to all features, concatenated, before they are fused.
        fc_norm: apply a separate norm to each feature before they are fused.
        norm_before_residual: see `WideLayer`.
        norm_output: apply a norm to the feature of the next pair.

    Attributes:
        d2t: the token id minus the draft id, for each draft id.
        has_only_released_norms: whether the head has only the norms of the released code. Other norms are not compiled.

    Source: EAGLE-3 (arXiv 2503.01840), section 3; the released code. The additional norms follow the speculators format.
    """

    d2t: Int[Tensor, " w"]

    def __init__(
        self,
        shape: Shape,
        *,
        feature_layers: Sequence[int],
        draft_vocab_size: int | None = None,
        own_embedding: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_before_residual: bool = False,
        norm_output: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.feature_layers = tuple(feature_layers)
        self.vocab_size, size = shape.vocab, draft_vocab_size or shape.vocab
        count, narrow = len(self.feature_layers), shape.features != shape.hidden
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden) if own_embedding or narrow else None
        self.input_norm = Norm(count * shape.features, shape.eps) if norm_before_fc else nn.Identity()
        self.fc_norm = nn.ModuleList(Norm(shape.features, shape.eps) for _ in range(count if fc_norm else 0))
        self.fc = nn.Linear(count * shape.features, shape.hidden, bias=False)
        self.norm_output = norm_output
        self.midlayer = WideLayer(shape, norm_before_residual=norm_before_residual, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.has_only_released_norms = not (norm_before_fc or fc_norm or norm_before_residual or norm_output)
        self.norm = Norm(shape.hidden, shape.eps)
        self.lm_head = nn.Linear(shape.hidden, size, bias=False)
        self.register_buffer("d2t", torch.zeros(size, dtype=torch.long))

    @property
    def token_ids(self) -> Int[Tensor, " w"]:
        """The token of every draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def initial(self) -> Initial:
        """Returns the layers whose first weights come from the target."""
        return Initial([FittedLinear(self.fc, num_embeddings=0)], [self.lm_head], self.embed_tokens, self.d2t)

    def embed(self, token_ids: Int[Tensor, "*n"], target_embed: TargetEmbedding) -> Float[Tensor, "*n d"]:
        """Returns embeddings of tokens from the head's own embedding, else from the target's."""
        return target_embed(token_ids) if self.embed_tokens is None else self.embed_tokens(token_ids)

    def fuse(self, features: Float[Tensor, "*n f"]) -> Float[Tensor, "*n d"]:
        """Fuses the features of all layers into one."""
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(self.input_norm(features))

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"], attend: Attend) -> Drafted:
        """Returns the outputs of the pairs."""
        out = self.midlayer(embedding, feature, attend)
        return Drafted(out, self.norm(out) if self.norm_output else out)

    def logits(self, scored: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n v"]:
        """Returns draft logits from the own output head. A token outside the reduced vocabulary is never drafted."""
        logits = self.lm_head(self.norm(scored))
        return logits if logits.shape[-1] == self.vocab_size else spread(logits, self.token_ids, self.vocab_size)

    def readout(self, scored: Float[Tensor, "n d"], target_weight: Float[Tensor, "v d"]) -> Readout:
        """Returns the factors of `logits`, before multiplication."""
        whole = len(self.d2t) == self.vocab_size
        return Readout(self.norm(scored), self.lm_head.weight, None if whole else self.token_ids)
