"""Our own decoder for the Llama family. It runs Llama, Mistral, Qwen2 and Qwen3 checkpoints over trees.

Projections are fused, and packed where that is faster, see `foredraft.kernels.linear`. Rotary rows and the additive mask are
made once a step. Keys and values are sliced to the length in use. The arithmetic follows the published models. Only attention
differs: a node attends to its ancestors instead of all earlier tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.cache.blocks import Blocks
from foredraft.cache.layout import Layout
from foredraft.cache.pool import KVCache, KVPool
from foredraft.core.contracts import Scores
from foredraft.core.errors import UserError
from foredraft.core.tree import Ids, TreeBatch
from foredraft.kernels.attention import rotate
from foredraft.kernels.linear import Linear, Norm, can_pack
from foredraft.models.graphs import Capture, Graphs, Masks, cuda_capture
from foredraft.models.groups import in_groups
from foredraft.models.reader import Reader
from foredraft.models.rope import DYNAMIC, LONG, context_of, rotary_tables

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that this decoder runs."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", LONG, DYNAMIC)
"""Values of ``rope_type`` that `foredraft.models.rope` makes tables for."""

_WINDOWED = ("mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose published model reads ``sliding_window``."""

_LEAST_ROWS = ((1 << 21, 6), (1 << 18, 4), (0, 1))
"""Least entries of a projection -> least number of rows. Packed weights that exceed the CPU's cache are read faster by a few
rows than by one."""

_EXTRA_ROWS = 512
"""Number of padding rows that cost about as much as one more forward. Only attention runs padding rows."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `q_norm` and `k_norm` are None if the model has none, and `window` is None for full attention."""

    input_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    post_norm: Norm
    gate_up: Linear
    down: Linear
    window: int | None


class LlamaTarget:
    """A Llama-family model as a `Target`.

    Args:
        config: the model's Transformers configuration.
        weights: the state dict, under the names of the Transformers checkpoint.
        dtype: dtype of the weights and of the computation.
        device: device of the weights and of the computation.
        packed: whether linear layers use packed weights. None uses them where `can_pack` holds.
        max_len: length in tokens of the longest text, see `foredraft.models.rope.context_of`.

    Attributes:
        head: the language-model head. It maps features after the last norm to logits.
        graphs: the CUDA graphs of the model, or None on a CPU.

    Raises:
        ValueError: the decoder does not support the configuration, or a weight is missing.
    """

    has_own_threads, shared = False, None

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        *,
        packed: bool | None = None,
        max_len: int | None = None,
    ):
        reason = unsupported(config)
        if reason:
            raise UserError(f"cannot run this model with the Llama decoder: {reason}")
        self.config = config
        self.vocab_size: int = config.vocab_size
        self.max_len: int = context_of(config, max_len)
        self.dtype, self.device, self._extra_rows = dtype, device, _EXTRA_ROWS
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads or config.num_attention_heads
        self._group, self._head_dim = self._heads // self._kv_heads, head_dim_of(config)
        self.packed = can_pack(dtype, device) if packed is None else packed
        read = Reader(config, weights, dtype, device, self.packed)
        self._embedding = read.tensor("model.embed_tokens")
        self.num_weight_bytes = sum(prod(weight.shape) for weight in weights.values()) * dtype.itemsize
        if "lm_head.weight" in weights:
            self.num_weight_bytes -= self._embedding.nbytes
        self._norm = read.norm("model.norm")
        self.head: Linear = read.linear("lm_head") if "lm_head.weight" in weights else read.make(self._embedding)
        self._layers = [_load_layer(i, config, read) for i in range(config.num_hidden_layers)]
        self._windows = tuple({layer.window for layer in self._layers})
        size = config.hidden_size * config.intermediate_size if self.packed else 0
        self._least_rows = next(rows for least, rows in _LEAST_ROWS if size >= least)
        self._cos, self._sin = rotary_tables(config, self.max_len, dtype, device)
        self.graphs = self.make_graphs(cuda_capture()) if device.type == "cuda" else None

    def make_graphs(self, capture: Capture) -> Graphs:
        """Makes the forwards of fixed shape of this model, see `foredraft.models.graphs`."""
        return Graphs(self._compute, capture, self._group, self.dtype, self._windows)

    def new_pool(self, blocks: int | Blocks) -> KVPool:
        """Returns a pool; see `foredraft.core.contracts.Target`."""
        return KVPool(blocks, len(self._layers), self._kv_heads, self._head_dim, self.dtype, self.device)

    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Returns the input embeddings of tokens."""
        return F.embedding(token_ids, self._embedding)

    @torch.inference_mode()
    def forward(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        rows: Ids | None = None,
        *,
        start: Sequence[int] | None = None,
        feature_layers: Sequence[int] = (),
    ) -> Scores:
        """Runs the new nodes of every tree; see `foredraft.core.contracts.Target`.

        Args:
            feature_layers: states to return, concatenated. 0 is the embedding, i is the state after i layers, and -1 is the
                state after the final norm.
        """
        return in_groups(partial(self._forward, feature_layers), batch, caches, rows, start, self._extra_rows)

    def _forward(self, feature_layers: Sequence[int], pool: KVPool, layout: Layout, rows: Ids | None) -> Scores:
        """Runs trees that are padded to the widest of them."""
        scores = self.graphs(layout, pool, feature_layers, rows=rows) if self.graphs is not None else None
        if scores is None:
            masks = layout.masks(self._windows, self.dtype, self._group)
            scores = self._compute(layout, pool, masks, feature_layers, rows=rows)
        return scores

    def _compute(
        self,
        layout: Layout,
        pool: KVPool,
        masks: Masks,
        feature_layers: Sequence[int],
        given: Tensor | None = None,
        *,
        rows: Ids | None = None,
    ) -> Scores:
        rotation = self._cos[layout.positions][:, None], self._sin[layout.positions][:, None]
        hidden = self._padded(self.embed(layout.token_ids))
        states = {0: hidden}
        for i, layer in enumerate(self._layers):
            look = partial(pool.attend, i, mask=masks[layer.window], layout=layout)
            hidden = self._run_layer(layer, hidden, rotation, layout.count, look)
            if i + 1 in feature_layers:
                states[i + 1] = hidden
        if -1 in feature_layers:
            states[-1] = self._norm(hidden)
        count = layout.count
        features = torch.cat([states[i][:count] for i in feature_layers], dim=-1) if feature_layers else None
        hidden = hidden[:count] if rows is None else hidden[layout.rows_of(rows)]
        return Scores(self.head(self._norm(hidden)), features)

    def _padded(self, states: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        """Repeats the first row until there are enough rows for the packed kernels. The results of these rows are not used."""
        missing = self._least_rows - states.shape[0]
        return states if missing <= 0 else torch.cat([states, states[:1].expand(missing, -1)])

    def _run_layer(
        self,
        layer: Layer,
        hidden: Float[Tensor, "m d"],
        rotation: tuple[Tensor, Tensor],
        count: int,
        look: Callable[..., Tensor],
    ) -> Float[Tensor, "m d"]:
        """Runs one layer. `look` computes the attention of `count` nodes from their queries, keys and values."""
        qkv = layer.qkv(layer.input_norm(hidden))[:count].view(count, -1, self._head_dim)
        queries, keys = self._heads, self._kv_heads
        qk = qkv[:, : queries + keys]
        if layer.q_norm is not None and layer.k_norm is not None:
            torch.cat([layer.q_norm(qk[:, :queries]), layer.k_norm(qk[:, queries:])], dim=1, out=qk)
        rotate(qk, rotation, out=qk)
        hidden = layer.out(self._padded(look(qkv.split([queries, keys, keys], dim=1))), hidden)
        gate, up = layer.gate_up(layer.post_norm(hidden)).chunk(2, dim=-1)
        return layer.down(F.silu(gate).mul_(up), hidden)


def unsupported(config: Any) -> str | None:
    """Returns why this decoder cannot run a model with this configuration, or None if it can."""
    if config.model_type not in FAMILY:
        return f"model_type is {config.model_type!r}, not one of {', '.join(FAMILY)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        return f"rope_type is {kind!r}, not one of {', '.join(_ROPE_TYPES)}"
    if kind != "default" and (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        return "only a part of each head is rotated"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act!r}, not 'silu'"
    return None


def head_dim_of(config: Any) -> int:
    """Returns the size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_of(config: Any, index: int) -> int | None:
    """Returns how many tokens a token sees in a layer, itself included. None means all."""
    if config.model_type not in _WINDOWED:
        return None
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def _load_layer(index: int, config: Any, read: Reader) -> Layer:
    at = f"model.layers.{index}"
    return Layer(
        input_norm=read.norm(f"{at}.input_layernorm"),
        qkv=read.linear(*(f"{at}.self_attn.{name}_proj" for name in "qkv")),
        q_norm=read.norm_if_any(f"{at}.self_attn.q_norm"),
        k_norm=read.norm_if_any(f"{at}.self_attn.k_norm"),
        out=read.linear(f"{at}.self_attn.o_proj"),
        post_norm=read.norm(f"{at}.post_attention_layernorm"),
        gate_up=read.linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
        down=read.linear(f"{at}.mlp.down_proj"),
        window=window_of(config, index),
    )
