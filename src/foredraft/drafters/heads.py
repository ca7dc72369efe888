"""Draft heads as modules: what is trained, and the plain version of what runs. HEADS names every one.

A head is given *pairs*: the embedding e of a committed token and the target's feature f at the token before it. The last pair
of a text is (root, feature before the root), so a head knows the root although the target has not run it.

    token       t1     t2     t3    ...   root
    feature     f0     f1     f2    ...   f before the root

EAGLE and FSPAD go on from there by themselves: what they say about the root's feature is the feature of the next pair.

    EAGLE       h = W_fc [e ; f] + b                                                     Li et al. 2024 (arXiv 2401.15077)
    FSPAD       h = h0 + W_d (SiLU(W_g e) * (W_u RMSNorm(h0))), h0 = W_fc [e ; f] + b    Gui et al. 2024 (arXiv 2408.15562)
    then both   a = h + Attention(h);  out = a + W_down (SiLU(W_gate n) * (W_up n)), n = RMSNorm(a)

FSPAD's W_down gives 2 H outputs and the residual is doubled: the first half goes to the target's head, the second is
regressed on the target's next feature and fed to the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.drafters.layers import Attend, Gated, Layer, Norm, ResBlock, Shape, WideLayer

TargetEmbedding = Callable[[Tensor], Tensor]
"""The target's own embedding: token ids [*n] -> [*n, d]. It is frozen and shared."""

TargetHead = Callable[[Tensor], Tensor]
"""The target's own head: final features [n, d] -> logits [n, v]. It is frozen and shared."""

FINAL = (-1,)
"""The target's state after its last norm, which its head is applied to."""


class Fusion(nn.Linear):
    """EAGLE's entry: one linear layer over embedding and feature."""

    def __init__(self, shape: Shape):
        super().__init__(2 * shape.hidden, shape.hidden)

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:  # type: ignore[override]
        """One vector for each position from features and embedding."""
        return super().forward(torch.cat([embedding, feature], dim=-1))


class FeatureSampling(nn.Module):
    """FSPAD's entry: the fused feature, and a gated perceptron on it whose gate is driven by the token's embedding."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.fc = nn.Linear(2 * shape.hidden, shape.hidden)
        self.mlp = Gated(shape.hidden, shape.intermediate, shape.hidden)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The fused vector of each position, corrected by the perceptron that the embedding gates."""
        fused = self.fc(torch.cat([embedding, feature], dim=-1))
        return fused + self.mlp(self.post_attention_layernorm(fused), gated_by=embedding)


class Foretelling(NamedTuple):
    """A linear layer that says by itself what the target's final feature will be, so that it can be fitted before training.

    Attributes:
        linear: an `nn.Linear`; its inputs are the pair's features and embeddings side by side.
        ahead: which feature is foretold: that so many places behind the pair's own.
        num_embeddings: of the pair's token and those after it.
        features_first: or the embeddings are.
    """

    linear: Any
    ahead: int = 1
    num_embeddings: int = 1
    features_first: bool = False


class Drafted(NamedTuple):
    """What a recurrent head says: the state that becomes a law, and the feature that the next pair is given."""

    scored: Float[Tensor, "*n d"]
    carried: Float[Tensor, "*n d"]


class Readout(NamedTuple):
    """Draft logits as states [n, d] and an output layer [w, d], with the token of every row of it; None: row i is token i."""

    states: Tensor
    weight: Tensor
    token_ids: Tensor | None


class FeatureHead(nn.Module):
    """EAGLE's head, with FSPAD's two parts switched on or off one by one."""

    feature_layers: Sequence[int] = FINAL

    def __init__(
        self, shape: Shape, *, feature_sampling: bool = False, partial_alignment: bool = False, qkv_bias: bool = False
    ):
        super().__init__()
        self.fc = FeatureSampling(shape) if feature_sampling else Fusion(shape)
        self.layers = nn.ModuleList([Layer(shape, outputs=2 if partial_alignment else 1, qkv_bias=qkv_bias)])

    def foretellings(self) -> list[Foretelling]:
        """What can be fitted."""
        return [Foretelling(self.fc if isinstance(self.fc, Fusion) else self.fc.fc)]

    def embed(self, token_ids: Int[Tensor, "*n"], target_embed: TargetEmbedding) -> Float[Tensor, "*n d"]:
        """Embeddings of tokens: the target's."""
        return target_embed(token_ids)

    def fuse(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What a pair is given of the target's features: all."""
        return features

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"], attend: Attend) -> Drafted:
        """The pairs' outputs."""
        out = self.layers[0](self.fc(embedding, feature), attend)
        scored, *carried = out.split(embedding.shape[-1], dim=-1)
        return Drafted(scored, carried[0] if carried else scored)

    def logits(self, scored: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n v"]:
        """Draft logits by the target's head."""
        return target_head(scored)

    def readout(self, scored: Float[Tensor, "n d"], target_weight: Float[Tensor, "v d"]) -> Readout:
        """`logits`, not yet multiplied."""
        return Readout(scored, target_weight, None)


def spread(logits: Float[Tensor, "*n w"], token_ids: Int[Tensor, " w"], vocab_size: int) -> Float[Tensor, "*n v"]:
    """Logits of some tokens as those of all; the others are never drafted."""
    full = logits.new_full((*logits.shape[:-1], vocab_size), -torch.inf)
    full[..., token_ids] = logits
    return full


class Eagle3Head(nn.Module):
    """Features of three depths fused into one; a wide layer; a head of its own over a reduced vocabulary. The feature is
    carried on as it comes out of the layer. A head that is not as wide as the target has an embedding of its own.

    Args:
        feature_layers: the target's layers after which features are taken.
        draft_vocab_size: tokens that can be drafted.
        own_embedding: a head as wide as the target has one too.
        norm_before_fc, fc_norm: a norm over all features side by side, or one over each, before they are fused.
        norm_before_residual: see `WideLayer`.
        norm_output: the feature is carried on normed.

    Attributes:
        d2t: what to add to a draft id to get the token id.
        has_only_released_norms: none of the norms beside those of the released code; others are not compiled.

    Source: EAGLE-3 (arXiv 2503.01840), section 3; the released code. All norms beside its own: the speculators format.
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
        """What can be fitted."""
        return [Foretelling(self.fc, num_embeddings=0)]

    def embed(self, token_ids: Int[Tensor, "*n"], target_embed: TargetEmbedding) -> Float[Tensor, "*n d"]:
        """Embeddings of tokens: its own, or else the target's."""
        return target_embed(token_ids) if self.embed_tokens is None else self.embed_tokens(token_ids)

    def fuse(self, features: Float[Tensor, "*n f"]) -> Float[Tensor, "*n d"]:
        """One feature of the three."""
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(self.input_norm(features))

    def forward(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"], attend: Attend) -> Drafted:
        """The pairs' outputs."""
        out = self.midlayer(embedding, feature, attend)
        return Drafted(out, self.norm(out) if self.norm_output else out)

    def logits(self, scored: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n v"]:
        """Draft logits by the own head; a token outside the reduced vocabulary is never drafted."""
        logits = self.lm_head(self.norm(scored))
        return logits if logits.shape[-1] == self.vocab_size else spread(logits, self.token_ids, self.vocab_size)

    def readout(self, scored: Float[Tensor, "n d"], target_weight: Float[Tensor, "v d"]) -> Readout:
        """`logits`, not yet multiplied."""
        whole = len(self.d2t) == self.vocab_size
        return Readout(self.norm(scored), self.lm_head.weight, None if whole else self.token_ids)


class MedusaHeads(nn.Module):
    """Head k says the token k + 1 places after the root, whatever stands between: residual blocks on the feature before the
    root, then a linear layer over the vocabulary, or over the `draft_vocab_size` tokens of `token_map`.

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
        """The token of every draft id; None: all tokens, in their order."""
        return self.token_map

    def foretellings(self) -> list[Foretelling]:
        """What can be fitted."""
        return [Foretelling(one, ahead=1 + k, num_embeddings=0) for k, one in enumerate(self.lm_heads)]

    @property
    def num_slots(self) -> int:
        """Tokens drafted at once."""
        return len(self.blocks)

    def forward(self, feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k v"]:
        """Logits of every slot."""
        logits = torch.stack([head(block(feature)) for block, head in zip(self.blocks, self.lm_heads, strict=True)], dim=-2)
        return logits if self.token_map is None else spread(logits, self.token_map, self.vocab_size)


class HydraHeads(nn.Module):
    """Head i is given the feature and the embeddings of the root and of the i tokens drafted behind it.

    With `prefix_attention`, the feature has been through a decoder layer that sees those of all committed tokens (Hydra++).
    In the released heads it has a norm before and one behind it (`prefix_norms`), and output layers a bias (`head_bias`).

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
        """What can be fitted."""
        entries = [one[0].res_connection for one in self.blocks]  # type: ignore[index]
        return [Foretelling(one, 1 + i, 1 + i, features_first=True) for i, one in enumerate(entries)]

    @property
    def num_slots(self) -> int:
        """Deepest node that has a law, plus 1."""
        return len(self.blocks)

    def read(self, feature: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """Features as the heads are given them."""
        return feature if self.prefix is None else self.prefix_norm(self.prefix(feature, attend))

    def state(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n d"]:
        """What the output layer of head i is applied to; `embeddings` of its i + 1 tokens side by side."""
        return self.blocks[i](torch.cat([feature, embeddings], dim=-1))

    def forward(self, i: int, feature: Float[Tensor, "*n d"], embeddings: Float[Tensor, "*n k"]) -> Float[Tensor, "*n v"]:
        """Logits of head i."""
        return self.lm_heads[i](self.state(i, feature, embeddings))


class CtcHead(nn.Module):
    """One decoder layer over the target's features that fills L slots at once, over the vocabulary and a blank.

    A pair enters as in EAGLE, and the state of the last one is the first slot; slot k > 1 enters by a linear layer of its own
    over the last pair. Slots see all pairs and the slots before them. With `blank` off there is none: slot k is the token k
    places after the root, as in Medusa.

    Source: Wen, Gui, Feng 2024 (arXiv 2412.00061), section 3. What the paper leaves open is said in docs/drafters/ctc.md.

    Raises:
        ValueError: fewer than 2 slots.
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
        """What can be fitted."""
        return [Foretelling(one, ahead=1 + k) for k, one in enumerate([self.fc, *self.ahead])]

    @property
    def num_slots(self) -> int:
        """L."""
        return len(self.ahead) + 1

    def enter(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Entries of pairs."""
        return self.fc(embedding, feature)

    def enter_ahead(self, embedding: Float[Tensor, "*n d"], feature: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k d"]:
        """Entries of the slots behind pairs, from the second on."""
        return torch.stack([one(embedding, feature) for one in self.ahead], dim=-2)

    def forward(self, entries: Float[Tensor, "*n d"], attend: Attend) -> Float[Tensor, "*n d"]:
        """The layer, over entries of pairs and slots."""
        return self.layers[0](entries, attend)

    def logits(self, states: Float[Tensor, "n d"], target_head: TargetHead) -> Float[Tensor, "n w"]:
        """Logits of slots: those of the target's head and, last, of the blank."""
        logits = target_head(states)
        return logits if self.blank is None else torch.cat([logits, self.blank(states).to(logits.dtype)], dim=-1)


class HeadRow(NamedTuple):
    """One kind of head.

    Attributes:
        options: what makes the method out of the class.
        sizes: those of its layer that may be others than the target's.
        converted: options that released checkpoints have, and training does not offer.
    """

    cls: type[nn.Module]
    options: Mapping[str, Any]
    sizes: Sequence[str] = ()
    converted: Sequence[str] = ()

    def make(self, shape: Shape, **options: Any) -> Any:
        """A head with fresh weights.

        Raises:
            TypeError: an option that it does not have.
        """
        return self.cls(shape, **{**self.options, **options})


_INNER = ("intermediate", "heads", "kv_heads", "head_dim")

HEADS: dict[str, HeadRow] = {
    "eagle": HeadRow(FeatureHead, {}, _INNER, ("qkv_bias",)),
    "fspad": HeadRow(FeatureHead, {"feature_sampling": True, "partial_alignment": True}, _INNER, ("qkv_bias",)),
    "eagle3": HeadRow(
        Eagle3Head,
        {},
        ("hidden", *_INNER),
        ("own_embedding", "norm_before_fc", "fc_norm", "norm_before_residual", "norm_output", "qkv_bias", "qk_norm"),
    ),
    "medusa": HeadRow(MedusaHeads, {}, converted=("draft_vocab_size",)),
    "hydra": HeadRow(HydraHeads, {}, _INNER, ("prefix_norms", "head_bias")),
    "parallel": HeadRow(CtcHead, {"blank": False}, _INNER),
    "ctc": HeadRow(CtcHead, {}, _INNER),
}
