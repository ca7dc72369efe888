"""Draft heads as torch modules. They are used for training, and as the plain version of inference.

The input of a head is a sequence of *pairs*: the embedding e of a committed token and the target's feature f at the token
before it. The last pair of a text is (root, feature before the root). A head thus sees the root although the target has not
run it.

    token       t1     t2     t3    ...   root
    feature     f0     f1     f2    ...   f before the root

EAGLE and FSPAD continue from there by themselves: their prediction of the root's feature is the feature of the next pair.

    EAGLE       h = W_fc [e ; f] + b                                                     Li et al. 2024 (arXiv 2401.15077)
    FSPAD       h = h0 + W_d (SiLU(W_g e) * (W_u RMSNorm(h0))), h0 = W_fc [e ; f] + b    Gui et al. 2024 (arXiv 2408.15562)
    then both   a = h + Attention(h);  out = a + W_down (SiLU(W_gate n) * (W_up n)), n = RMSNorm(a)

FSPAD's W_down has 2 H outputs, and the residual is doubled. The first half goes to the target's head. The second half is
trained to predict the target's next feature and is the input of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.heads.layers import Attend, Gated, Layer, Norm, ResBlock, Shape, WideLayer

TargetEmbedding = Callable[[Tensor], Tensor]
"""The target's own embedding: token ids [*n] -> [*n, d]. It is frozen and shared."""

TargetHead = Callable[[Tensor], Tensor]
"""The target's own head: final features [n, d] -> logits [n, v]. It is frozen and shared."""

FINAL = (-1,)
"""The target's state after its last norm, which is the input of the target's output head."""


class Fusion(nn.Linear):
    """The entry of EAGLE: one linear layer over embedding and feature."""

    def __init__(self, shape: Shape):
        super().__init__(2 * shape.hidden, shape.hidden)

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # type: ignore[override]
        """Returns one vector per position."""
        return super().forward(torch.cat([embedding, feature], dim=-1))


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


class Foretelling(NamedTuple):
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


class FeatureHead(nn.Module):
    """The head of EAGLE. The two parts of FSPAD can be switched on separately."""

    feature_layers: Sequence[int] = FINAL

    def __init__(
        self, shape: Shape, *, feature_sampling: bool = False, partial_alignment: bool = False, qkv_bias: bool = False
    ):
        super().__init__()
        self.fc = FeatureSampling(shape) if feature_sampling else Fusion(shape)
        self.layers = nn.ModuleList([Layer(shape, outputs=2 if partial_alignment else 1, qkv_bias=qkv_bias)])

    def foretellings(self) -> list[Foretelling]:
        """Returns the layers that can be fitted before training."""
        return [Foretelling(self.fc if isinstance(self.fc, Fusion) else self.fc.fc)]

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


def spread(logits: Float[Tensor, "*n w"], token_ids: Int[Tensor, " w"], vocab_size: int) -> Float[Tensor, "*n v"]:
    """Extends logits of some tokens to the whole vocabulary. The other tokens get minus infinity and are never drafted."""
    full = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    full[..., token_ids] = logits
    return full


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

    def foretellings(self) -> list[Foretelling]:
        """Returns the layers that can be fitted before training."""
        return [Foretelling(self.fc, num_embeddings=0)]

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


class MedusaHeads(nn.Module):
    """The heads of Medusa. Head k predicts the token k + 1 positions after the root, independently of the tokens between.

    Each head applies residual blocks to the feature before the root. A linear layer follows, over the whole vocabulary or over
    the `draft_vocab_size` tokens of `token_map`.

    Source: Medusa (arXiv 2401.10774), section 2.1.1.
    """

    feature_layers: Sequence[int] = FINAL
    token_map: Int[Tensor, " w"] | None

    def __init__(self, shape: Shape, *, num_heads: int = 4, num_layers: int = 1, draft_vocab_size: int | None = None):
        super().__init__()
        self.vocab_size, size = shape.vocab, draft_vocab_size or shape.vocab
        self.register_buffer("token_map", torch.arange(size) if draft_vocab_size else None)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(shape.hidden) for _ in range(num_layers))) for _ in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(shape.hidden, size, bias=False) for _ in range(num_heads))

    @property
    def token_ids(self) -> Int[Tensor, " w"] | None:
        """The token of every draft id; None if draft ids are token ids."""
        return self.token_map

    def foretellings(self) -> list[Foretelling]:
        """Returns the layers that can be fitted before training."""
        return [Foretelling(linear, ahead=1 + k, num_embeddings=0) for k, linear in enumerate(self.lm_heads)]

    @property
    def num_slots(self) -> int:
        """Number of tokens drafted at once."""
        return len(self.blocks)

    def forward(self, feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k v"]:
        """Returns logits of every slot."""
        logits = torch.stack([head(block(feature)) for block, head in zip(self.blocks, self.lm_heads, strict=True)], dim=-2)
        return logits if self.token_map is None else spread(logits, self.token_map, self.vocab_size)


class HydraHeads(nn.Module):
    """The heads of Hydra. Head i reads the feature, and the embeddings of the root and of the i tokens drafted after it.

    With `prefix_attention` (Hydra++), a decoder layer first transforms the feature. That layer attends to the features of all
    committed tokens. In the released heads, it has a norm before it and one after it (`prefix_norms`), and the output layers
    have a bias (`head_bias`).

    Source: Hydra (arXiv 2402.05109), section 3; Hydra++: section 4; the released code.
    """

    feature_layers: Sequence[int] = FINAL

    def __init__(
        self,
        shape: Shape,
        *,
        num_heads: int = 4,
        num_layers: int = 4,
        prefix_attention: bool = True,
        prefix_norms: bool = False,
        head_bias: bool = False,
    ):
        super().__init__()
        self.prefix = Layer(shape, input_norm=prefix_norms) if prefix_attention else None
        self.prefix_norm = Norm(shape.hidden, shape.eps) if prefix_norms else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                ResBlock(shape.hidden, (i + 2) * shape.hidden), *(ResBlock(shape.hidden) for _ in range(num_layers - 1))
            )
            for i in range(num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(shape.hidden, shape.vocab, bias=head_bias) for _ in range(num_heads))

    def foretellings(self) -> list[Foretelling]:
        """Returns the layers that can be fitted before training."""
        entries = [blocks[0].res_connection for blocks in self.blocks]  # type: ignore[index]
        return [Foretelling(entry, 1 + i, 1 + i, features_first=True) for i, entry in enumerate(entries)]

    @property
    def num_slots(self) -> int:
        """Number of heads, which is the largest depth of a tree."""
        return len(self.blocks)

    def read(self, feature: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Converts features to the input of the heads."""
        return feature if self.prefix is None else self.prefix_norm(self.prefix(feature, attend))

    def state(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n d"]:
        """Returns the input of the output layer of head i. `embeddings` are those of its i + 1 tokens, concatenated."""
        return self.blocks[i](torch.cat([feature, embeddings], dim=-1))

    def forward(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n v"]:
        """Returns the logits of head i."""
        return self.lm_heads[i](self.state(i, feature, embeddings))


class CtcHead(nn.Module):
    """One decoder layer over the target's features that fills L slots at once. A slot holds a token or a blank.

    A pair enters the layer as in EAGLE, and the state of the last pair is the first slot. Slot k > 1 has its own linear layer
    over the last pair as its entry. Slots attend to all pairs and to the slots before them. Without `blank`, slot k is the
    token k positions after the root, as in Medusa.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), section 3. docs/drafters/ctc.md describes what the paper leaves open.

    Raises:
        ValueError: `num_slots` is below 2.
    """

    feature_layers: Sequence[int] = FINAL

    def __init__(self, shape: Shape, *, num_slots: int = 6, blank: bool = True):
        super().__init__()
        if num_slots < 2:
            raise ValueError(f"num_slots must be at least 2, got {num_slots}")
        self.fc = Fusion(shape)
        self.ahead = nn.ModuleList(Fusion(shape) for _ in range(num_slots - 1))
        self.layers = nn.ModuleList([Layer(shape)])
        self.blank = nn.Linear(shape.hidden, 1) if blank else None

    def foretellings(self) -> list[Foretelling]:
        """Returns the layers that can be fitted before training."""
        return [Foretelling(entry, ahead=1 + k) for k, entry in enumerate([self.fc, *self.ahead])]

    @property
    def num_slots(self) -> int:
        """L, the number of slots."""
        return len(self.ahead) + 1

    def enter(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Returns the entries of pairs."""
        return self.fc(embedding, feature)

    def enter_ahead(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k d"]:
        """Returns the entries of the slots that follow each pair, from the second slot on."""
        return torch.stack([entry(embedding, feature) for entry in self.ahead], dim=-2)

    def forward(self, entries: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Applies the layer to entries of pairs and slots."""
        return self.layers[0](entries, attend)

    def logits(self, states: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n w"]:
        """Returns logits of slots: those of the target's output head and, as the last entry, that of the blank."""
        logits = target_head(states)
        return logits if self.blank is None else torch.cat([logits, self.blank(states).to(logits.dtype)], dim=-1)
