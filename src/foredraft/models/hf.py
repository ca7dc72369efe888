"""Runs Transformers causal language models whose layers are softmax attention with rotary or learned positions.

The model's own code runs. It receives the positions of the nodes, a mask of ancestors, and our pool of keys and values behind
the interface of `transformers.Cache`. Models that are known not to run over trees are refused by name. All others are tried
when they are loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from foredraft.cache.blocks import Blocks
from foredraft.cache.layout import Layout
from foredraft.cache.pool import KVCache, KVPool
from foredraft.core.contracts import Scores
from foredraft.core.errors import UserError
from foredraft.core.tree import Ids, TreeBatch
from foredraft.kernels.attention import any_length_kernels
from foredraft.models.check import agree, refuse_unsupported
from foredraft.models.groups import in_groups
from foredraft.models.rope import context_of, held, hold

_EXTRA_ROWS = {"cpu": 32, "cuda": 256}
"""Number of padding rows that cost about as much as one more forward. All layers run padding rows."""


class _KVShape(NamedTuple):
    """Number of heads and head size of the keys and the values of one layer. They may differ from the configuration."""

    key: tuple[int, int]
    value: tuple[int, int]


class _TreeCache(Cache):
    """A `transformers.Cache` for one forward. `update` writes the new nodes into the pool and returns all keys and values."""

    def __init__(self, pool: KVPool, layout: Layout, shapes: Sequence[_KVShape]):
        super().__init__(layers=[])
        self._pool, self._layout, self._shapes = pool, layout, shapes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._pool.write(layer_idx, self._layout, self._packed(key_states), self._packed(value_states))
        key, value = self._pool.read(layer_idx, self._layout)
        shape = self._shapes[layer_idx]
        return key[:, : shape.key[0], :, : shape.key[1]], value[:, : shape.value[0], :, : shape.value[1]]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._layout.length - self._layout.width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._layout.length, 0

    def _packed(self, states: Float[Tensor, "b h n e"]) -> Float[Tensor, "m g f"]:
        """Returns the states of the nodes without padding, with zeros up to the heads and the head size of the pool."""
        heads, size = states.shape[1], states.shape[3]
        packed = self._layout.unpad(states.transpose(1, 2).flatten(2)).unflatten(1, (heads, size))
        missing = self._pool.kv.shape[2] - heads, self._pool.kv.shape[5] - size
        return F.pad(packed, (0, missing[1], 0, missing[0])) if any(missing) else packed


class HFTarget:
    """A Transformers causal language model as a `Target`.

    Weights are never written. The model is put into evaluation mode. Its attention is set to sdpa, or to eager if it does not
    support sdpa. Its experts are set to eager in float64. Nothing else of the model changes. During a forward, rotary
    frequencies that depend on the length of a text are fixed to those for `max_len`.

    Args:
        model: a loaded model, on one device.
        max_len: length in tokens of the longest text, see `foredraft.models.rope.context_of`.

    Raises:
        ValueError: the model has layers that cannot run over trees, or a layer without keys and values of its own.
    """

    has_own_threads, shared = False, None

    def __init__(self, model: PreTrainedModel, max_len: int | None = None):
        refuse_unsupported(model.config)
        self.model: Any = model.eval()
        self.config: Any = model.config.get_text_config(decoder=True)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.max_len: int = context_of(self.config, max_len)
        self._extra_rows = _EXTRA_ROWS.get(self.device.type, _EXTRA_ROWS["cuda"])
        self._held = hold(model, self.max_len)
        _choose_kernels(model, self.config)
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.num_weight_bytes = sum(weight.nbytes for weight in model.parameters())
        if embedding.weight is not head.weight:
            self.num_weight_bytes -= embedding.weight.nbytes
        self._windows = _windows(self.config)
        self._layers = _decoder_layers(model, self.config.num_hidden_layers)
        parameters = inspect.signature(model.forward).parameters
        self._keeps_some_logits = "logits_to_keep" in parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"  # renamed in Transformers 5.24
        try:
            self._probe()
        except ValueError:
            raise
        except Exception as error:
            kind = f"model type {self.config.model_type!r} in {self.dtype}"
            raise UserError(f"cannot run {kind} ({type(error).__name__}: {error})") from error

    @torch.inference_mode()
    def _probe(self) -> None:
        """Runs one token. Finds the shapes of keys and values, the vocabulary size, and whether `head` gives the logits."""
        cache = DynamicCache()
        token_ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self._captured([-1]) as states, held(self._held):
            logits = self.model(input_ids=token_ids, use_cache=True, **{self._cache_name: cache}).logits[0]
        kept: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        if len(kept) != len(self._layers) or any(key is None or not key.numel() for key, _ in kept):
            raise UserError(
                f"cannot run model type {self.config.model_type!r} over token trees: some of its {len(self._layers)} layers "
                "keep no keys and values of their own",
                "choose a model whose layers are all softmax attention",
            )
        self._shapes = [_KVShape((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in kept]
        self.vocab_size: int = logits.shape[-1]
        rows = len(self.model.get_input_embeddings().weight)
        if rows < self.vocab_size:
            raise UserError(f"the model's embedding has {rows} rows, but its head gives logits of {self.vocab_size} tokens")
        self._has_head = agree(self._head(states[-1][0]), logits)

    def new_pool(self, blocks: int | Blocks) -> KVPool:
        """Returns a pool wide enough for every layer; see `foredraft.core.contracts.Target`."""
        heads, sizes = zip(*(part for shape in self._shapes for part in shape), strict=True)
        return KVPool(blocks, len(self._shapes), max(heads), max(sizes), self.dtype, self.device)

    @torch.inference_mode()
    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Returns the input embeddings of tokens, without learned positions."""
        return self.model.get_input_embeddings()(token_ids)

    @torch.inference_mode()
    def head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Returns the logits of features after the last norm, with the model's scaling and soft capping.

        Raises:
            ValueError: the model computes its logits from its last norm in an unknown way.
        """
        if not self._has_head:
            raise UserError(
                f"the head of model type {self.config.model_type!r} cannot run by itself",
                "choose a drafter that does not share the target's head",
            )
        return self._head(features)

    def _head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        logits = self.model.get_output_embeddings()(features)
        logits = logits * (getattr(self.config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

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
            feature_layers: states to return, concatenated. 0 is the input of the first layer, i is the state after i layers,
                and -1 is the state after the final norm.
        """
        return in_groups(partial(self._forward, feature_layers), batch, caches, rows, start, self._extra_rows)

    def _forward(self, feature_layers: Sequence[int], pool: KVPool, layout: Layout, rows: Ids | None) -> Scores:
        """Runs trees that are padded to the widest of them."""
        new = slice(None) if rows is None else layout.rows_of(rows)
        request, column = layout.request[new], layout.column[new]
        kept, inverse = column.unique(return_inverse=True) if len(column) else (column.new_zeros(1), column)
        some = self._keeps_some_logits and len(kept) < layout.width
        with self._captured(feature_layers) as states, any_length_kernels(self.device), held(self._held):
            logits = self.model(
                input_ids=_padded(layout, layout.token_ids),
                position_ids=_padded(layout, layout.positions),
                attention_mask=self._masks(layout),
                use_cache=True,
                **{self._cache_name: _TreeCache(pool, layout, self._shapes)},
                **({"logits_to_keep": kept} if some else {}),
            ).logits
        features = [layout.unpad(states[i]) for i in feature_layers]
        return Scores(logits[request, inverse if some else column], torch.cat(features, dim=-1) if features else None)

    @torch.inference_mode()
    def plain(self, token_ids: Sequence[int]) -> Float[Tensor, "t v"]:
        """Returns the logits of a plain call, without our cache, mask and positions. `forward` must agree with them."""
        with held(self._held):
            return self.model(input_ids=torch.tensor([list(token_ids)], device=self.device), use_cache=False).logits[0]

    def _masks(self, layout: Layout) -> Any:
        """Returns one mask for all layers, or one for each type. It is never None: the model would make a causal mask."""
        masks = {}
        for kind, window in self._windows.items():
            mask = layout.mask(self.dtype, self.device, window)
            shape = len(layout.lengths), 1, layout.width, layout.length
            masks[kind] = torch.zeros(shape, dtype=self.dtype, device=self.device) if mask is None else mask
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @contextmanager
    def _captured(self, feature_layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collects the states of `feature_layers`, [B, N, D], while the model runs."""
        states: dict[int, Tensor] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            states[0] = args[0] if args else kwargs["hidden_states"]

        def after(i: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                states[i] = output if isinstance(output, Tensor) else output[0]

            return hook

        handles = []
        for i in set(feature_layers):
            if i == 0:
                handles.append(self._layers[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                module = self.model.get_decoder() if i == -1 else self._layers[i - 1]
                handles.append(module.register_forward_hook(after(i)))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def _padded(layout: Layout, values: Int[Tensor, " m"]) -> Int[Tensor, "b n"]:
    """Returns integers of the new nodes as a padded batch. Padding is 0."""
    padded = values.new_zeros(len(layout.lengths), layout.width)
    padded[layout.request, layout.column] = values
    return padded


def _windows(config: Any) -> dict[str, int | None]:
    """Returns the window of each type of layer. Without a list of layers, all layers have the window of the configuration."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}


def _choose_kernels(model: PreTrainedModel, config: Any) -> None:
    """Sets attention to sdpa if the model supports it, else to eager. Sets experts to eager in float64.

    A model that caps its attention scores needs eager: some versions of Transformers run it in sdpa, which omits the cap.
    Grouped experts do not support float64.
    """
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    wanted = "sdpa" if model._supports_sdpa and not capped else "eager"
    if config._attn_implementation not in (wanted, "eager"):
        model.set_attn_implementation(wanted)
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def _decoder_layers(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """Returns the decoder layers: the outermost list of `count` modules."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(f"cannot find the {count} decoder layers of {type(model).__name__}")
