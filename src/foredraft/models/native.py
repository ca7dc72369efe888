"""Runs the Llama family on a CPU with compiled kernels, `kernels/c/decoder.h`.

Weights are stored in the order in which they are read, and a forward is one call. The result of a node does not depend on the
other nodes of the step, bit for bit, so a tree gives the same logits as plain decoding. The torch decoder
(`foredraft.models.llama`) computes the same and runs everywhere else. A test compares the two.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.cache.blocks import Blocks
from foredraft.cache.layout import among_new
from foredraft.cache.pool import KVCache, KVPool
from foredraft.core.chains import Chains, ChainWish
from foredraft.core.contracts import Scores
from foredraft.core.tree import Ids, TreeBatch
from foredraft.kernels import library
from foredraft.kernels.laws import as_arguments
from foredraft.kernels.layouts import TYPES, Memory, blocked, describe_stored, store
from foredraft.kernels.quantized import TILE, Quantized, Stored
from foredraft.kernels.structures import CChains, CLayer, CLinear, CModel, CResidual, CStep
from foredraft.models.files import FULL_INPUTS, ROUNDED_INPUTS
from foredraft.models.llama import head_dim_of, window_of
from foredraft.models.packed import describe_layer
from foredraft.models.reader import Reader
from foredraft.models.rope import context_of, frequencies

ONE_THREAD_BYTES = 1 << 20
"""Models up to this size run on one thread. Larger ones gain from a second: a chain of six drafts takes 0.47 ms with one thread
and 0.38 ms with two (the bundled head, 1.7 MB, on two cores)."""

_WORD = 8
"""Bytes of an integer argument of the decoder."""


def can_run(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether this decoder runs a model that `foredraft.models.llama` supports.

    It needs the compiled code, a dtype of `TYPES` on a CPU, and widths that are multiples of `TILE`.
    """
    widths = (config.hidden_size, config.intermediate_size, head_dim_of(config))
    fits = dtype in TYPES and device.type == "cpu" and all(width % TILE == 0 for width in widths)
    return fits and library() is not None


class NativeTarget:
    """A Llama-family model as a `Target`, run by compiled code; see `can_run`.

    Args:
        config: the model's Transformers configuration.
        weights: the state dict, under the names of the Transformers checkpoint.
        dtype: dtype of the weights, keys and values, one of `TYPES`.
        threads: number of threads. None is torch's number, or 1 for a model of at most `ONE_THREAD_BYTES`.
        max_len: length in tokens of the longest text, see `foredraft.models.rope.context_of`.
        activations: ``int8`` rounds the inputs of weights of few bits to eight bits. ``bf16`` leaves them as they are.

    Raises:
        ValueError: a weight is missing.
    """

    device, has_own_threads = torch.device("cpu"), True

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Any],
        dtype: torch.dtype = torch.bfloat16,
        *,
        threads: int | None = None,
        max_len: int | None = None,
        activations: str = FULL_INPUTS,
    ):
        code = library()
        assert code is not None, "ask can_run first"
        self.config, self.dtype = config, dtype
        self.vocab_size: int = config.vocab_size
        self.max_len: int = context_of(config, max_len)
        self.activations = activations
        self._memory = Memory()
        self._model = self._describe(config, Reader(config, weights, self.dtype, self.device, packed=False))
        self.num_weight_bytes = self._memory.num_bytes - self._unread_bytes
        self._threads = threads or (torch.get_num_threads() if self._memory.num_bytes > ONE_THREAD_BYTES else 1)

    def new_pool(self, blocks: int | Blocks) -> KVPool:
        """Returns a pool; see `foredraft.core.contracts.Target`."""
        model = self._model
        return KVPool(blocks, model.num_layers, model.kv_heads, model.head_dim, self.dtype, self.device)

    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Returns the input embeddings of tokens."""
        if isinstance(table := self._head if self._embedding is None else self._embedding, Stored):
            return table.rows(token_ids).to(self.dtype)
        return table[token_ids // TILE, :, token_ids % TILE].flatten(1) if self._embedding is None else table[token_ids]

    def head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Returns the logits, in float32, of features after the last norm."""
        return run_linear(self._model.head, features.to(self.dtype), self._threads)

    def forward(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        rows: Ids | None = None,
        *,
        start: Sequence[int] | None = None,
        feature_layers: Sequence[int] = (),
    ) -> Scores:
        """Runs the new nodes of every tree; see `foredraft.core.contracts.Target`. Logits are float32.

        Args:
            feature_layers: states to return, concatenated. 0 is the embedding, i is the state after i layers, and -1 is the
                state after the final norm.
        """
        return run_step(self._model, batch, caches, rows, start, feature_layers, threads=self._threads)

    def draw_chains(self, batch: TreeBatch, caches: Sequence[KVCache], wish: ChainWish) -> Chains:
        """Draws a chain after each chain of `batch`; see `foredraft.core.chains.DrawChains`."""
        return draw_chains(self._model, batch, caches, wish, threads=self._threads)

    def _describe(self, config: Any, read: Reader) -> CModel:
        """Describes the model for `decoder.h`."""
        tied, is_rounded = not read.has("lm_head"), self.activations == ROUNDED_INPUTS
        [head] = read.weights("model.embed_tokens" if tied else "lm_head")
        self._head, output = self._table(head, is_rounded)
        self._embedding, table, before = None, output, self._memory.num_bytes
        if not tied:
            [embedding] = read.weights("model.embed_tokens")
            if isinstance(embedding, Tensor):
                self._embedding = self._memory.put(embedding)
            else:
                self._embedding, table = self._table(embedding, is_rounded)
        self._unread_bytes = self._memory.num_bytes - before
        rotary = frequencies(config, self.max_len)
        turns = self._memory.put(rotary.frequencies.contiguous())
        described = [
            describe_layer(self._memory, read, f"model.layers.{i}", window_of(config, i), is_rounded=is_rounded)
            for i in range(config.num_hidden_layers)
        ]
        layers = (CLayer * len(described))(*described)
        self._layers = layers  # keeps the memory alive that the model points to
        return CModel(
            type=TYPES[self.dtype],
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim_of(config),
            mlp=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            eps=config.rms_norm_eps,
            rotary_scale=rotary.scaling,
            frequencies=turns.data_ptr(),
            embedding=self._embedding.data_ptr() if isinstance(self._embedding, Tensor) else None,
            tied=table,
            layers=ctypes.addressof(layers),
            norm=self._memory.put(read.tensor("model.norm").float()).data_ptr(),
            head=output,
            vocabulary=output.outputs,
        )

    def _table(self, weight: Tensor | Quantized, is_rounded: bool) -> tuple[Any, CLinear]:
        """Stores a weight whose rows are read again. Returns it, and the layer that it is."""
        if isinstance(weight, Quantized):
            stored = store(self._memory, weight)
            return stored, describe_stored(stored, None, is_rounded)
        laid_out = self._memory.put(blocked(weight))
        return laid_out, CLinear(laid_out.data_ptr(), TYPES[self.dtype], None, *weight.shape)

    @property
    def head_weight(self) -> Float[Tensor, "v d"]:
        """Weight of the head."""
        if isinstance(self._head, Stored):
            return self._head.rows(torch.arange(self.vocab_size)).to(self.dtype)
        return self._head.transpose(1, 2).flatten(2).flatten(0, 1)[: self.vocab_size]

    @property
    def shared(self) -> dict[str, Any]:
        """Fields of `CModel` that a draft head shares."""
        return {name: getattr(self._model, name) for name in ("embedding", "tied", "head", "vocabulary")}


def run_step(
    model: CModel,
    batch: TreeBatch,
    caches: Sequence[KVCache],
    rows: Ids | None,
    start: Sequence[int] | None,
    feature_layers: Sequence[int] = (),
    *,
    threads: int,
    given: Sequence[Float[Tensor, "_ d"]] = (),
    carried: Sequence[Float[Tensor, "_ d"]] = (),
    num_slots: int = 0,
    chains: CChains | None = None,
) -> Scores:
    """Runs one forward of `decoder.h`; see `foredraft.core.contracts.Target`.

    Args:
        model: the model, described for `decoder.h`.
        batch: the trees.
        caches: the cache of each tree, all in one pool.
        rows: packed nodes whose logits are returned. None means all new nodes.
        start: number of nodes of each tree that ran before. None means none.
        feature_layers: states to return, see `NativeTarget.forward`.
        threads: number of threads.
        given: for a draft head, the features of the first nodes of each tree. Contiguous.
        carried: for a draft head, a table per tree that receives the output features of its nodes. A node behind the `given`
            ones reads the feature of its parent there. Contiguous; empty if nobody reads them.
        num_slots: number of nodes at the end of every tree that are slots to be filled. They take no feature.
        chains: chains to draw after the trees. The logits are then those from which their last tokens were drawn.

    Raises:
        MemoryError: the step does not fit into memory.
    """
    code = library()
    assert code is not None
    pool, num_trees = caches[0].pool, len(batch)
    lengths, offsets = [cache.length for cache in caches], batch.bounds
    first = [0] * num_trees if start is None else list(start)
    ahead = chains.depth if chains else 0
    ends = [length + end - begin + ahead for length, begin, end in zip(lengths, offsets, offsets[1:], strict=False)]
    pool.reserve(caches, ends)
    count = offsets[-1] - sum(first)
    wanted = range(count) if rows is None else among_new(rows, batch.offsets, first).tolist()
    logits = torch.empty(len(wanted), model.vocabulary)
    features = torch.empty(count, len(feature_layers) * model.hidden, dtype=pool.kv.dtype) if feature_layers else None
    blocks = [cache.blocks for cache in caches]
    per_tree = lengths, first, [*chain.from_iterable(blocks)], [*accumulate(map(len, blocks[:-1]), initial=0)]
    tables = [part.data_ptr() for part in given], [part.shape[0] for part in given], [part.data_ptr() for part in carried]
    nodes = batch.tokens.tolist(), batch.parents.tolist(), offsets
    _alive, begin = _side_by_side(*nodes, *per_tree, wanted, feature_layers, *tables)
    scored = len(wanted), begin[7], logits.data_ptr()
    returned = len(feature_layers), begin[8], None if features is None else features.data_ptr()
    of_head = begin[9] if given else None, begin[10], begin[11] if carried else None, num_slots
    step = CStep(num_trees, *begin[:7], *scored, *returned, *pool.address, threads, *of_head)
    given_to = ctypes.byref(model), ctypes.byref(step)
    if code.chains(*given_to, ctypes.byref(chains)) if chains else code.forward(*given_to):
        raise MemoryError(f"not enough memory for a step of {count} tokens")
    return Scores(logits, features)


def draw_chains(model: CModel, batch: TreeBatch, caches: Sequence[KVCache], wish: ChainWish, **step: Any) -> Chains:
    """Draws a chain after each chain of `batch`, with the options `step` of `run_step`."""
    kept, uniforms = min(wish.kept, model.vocabulary), None if wish.uniforms is None else np.array(wish.uniforms())
    tokens = np.empty((len(batch), wish.depth), np.int64)
    laws = torch.empty(0 if uniforms is None else tokens.size, kept)
    ids = torch.empty(laws.shape, dtype=torch.int64) if kept < model.vocabulary else None
    numbers, places = None if uniforms is None else uniforms.ctypes.data, None if ids is None else ids.data_ptr()
    limits = as_arguments(**wish.limits)
    chains = CChains(wish.depth, kept, numbers, *limits, tokens.ctypes.data, laws.data_ptr(), places)
    run_step(model, batch, caches, batch.offsets[1:] - 1, None, chains=chains, **step)
    return Chains(tokens.tolist(), laws, ids)


def _side_by_side(*parts: Sequence[int]) -> tuple[array[int], list[int]]:
    """Copies integers into one array, whose address is read once. Returns the array and the address of each part."""
    numbers = array("q", chain.from_iterable(parts))
    begin, _ = numbers.buffer_info()
    return numbers, list(accumulate((_WORD * len(part) for part in parts[:-1]), initial=begin))


def run_linear(layer: CLinear, x: Float[Tensor, "n i"], threads: int) -> Float[Tensor, "n o"]:
    """Runs a linear layer on inputs in the type of the model. Outputs are float32.

    Raises:
        MemoryError: the layer does not fit into memory.
    """
    code, x = library(), x.contiguous()
    assert code is not None
    out = torch.empty(len(x), layer.outputs)
    if code.linear(ctypes.byref(layer), TYPES[x.dtype], x.data_ptr(), len(x), out.data_ptr(), threads):
        raise MemoryError(f"not enough memory for a linear layer of {len(x)} rows")
    return out


def run_residuals(blocks: ctypes.Array[CResidual], x: Float[Tensor, "n i"], threads: int) -> Float[Tensor, "n d"]:
    """Runs residual blocks one after another. All blocks have outputs of one width.

    Inputs and outputs have the type of the model; the sums between blocks are float32.

    Raises:
        MemoryError: the blocks do not fit into memory.
    """
    code, x = library(), x.contiguous()
    assert code is not None
    out = torch.empty(len(x), blocks[0].linear.outputs, dtype=x.dtype)
    if code.residuals(blocks, len(blocks), TYPES[x.dtype], x.data_ptr(), len(x), out.data_ptr(), threads):
        raise MemoryError(f"not enough memory for residual blocks of {len(x)} rows")
    return out
