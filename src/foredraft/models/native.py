"""The Llama family in bfloat16 on a CPU, by `compiled/decoder.c`: weights laid out as they are read, one call a forward.

What a node gets does not depend on what else is in the step, bit for bit: a tree gives the very logits of plain decoding. The
torch decoder (`foredraft.models.llama`) computes the same and runs everywhere else; a test equates the two.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from foredraft.cache import KVCache, KVPool, among_new
from foredraft.compiled import library
from foredraft.models.llama import Reader, head_dim_of, window_of
from foredraft.protocols import Scores
from foredraft.tree import Ids, TreeBatch

TILE = 32
"""Outputs of a linear layer whose weights stand side by side; every width but the vocabulary's must be a multiple of it."""

NO_WINDOW = 1 << 62

ONE_THREAD_BYTES = 8 << 20
"""Models up to this size run on one thread: a second one saves at most a tenth of a step of 0.1 ms (3 MB of weights, two
cores), and when it is late the step waits for it."""

FEW, FULL = 4, 16
"""Bits of a weight. Four are read four times as fast; inputs are then rounded to eight, of which the processor multiplies four
pairs at once."""

_BLOCK = 32
"""Inputs whose weights of four bits have one scale, for every output."""

_WORD = 8
"""Bytes of the whole numbers that the decoder is given."""

_LINE, _PAGES = 64, 64 << 20
"""Bytes that are read at once, and bytes asked of the system at once; what is not written costs nothing."""

_at, _whole, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CLinear(ctypes.Structure):
    """A linear layer, its weight laid out by `blocked`, or by `blocked_few`."""

    _fields_ = (("weight", _at), ("few", _whole), ("bias", _at), ("outputs", _whole), ("inputs", _whole))


class CResidual(ctypes.Structure):
    """A residual block; without a weight of `skip`, its inputs are passed by as they are."""

    _fields_ = (("linear", CLinear), ("skip", CLinear))


class CLayer(ctypes.Structure):
    """A decoder layer; what is None there is left out."""

    _fields_ = (
        *((name, _at) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, CLinear) for name in ("qkv", "output", "gate", "up", "down")),
        ("window", _whole),
    )


class CEntry(ctypes.Structure):
    """How a draft head takes in an embedding and a feature."""

    _fields_ = (
        ("fc", CLinear),
        ("norm", _at),
        *((name, CLinear) for name in ("gate", "up", "down")),
        ("feature_norm", _at),
        ("ahead", CLinear),
    )


class CModel(ctypes.Structure):
    """A model."""

    _fields_ = (
        *((name, _whole) for name in ("hidden", "heads", "kv_heads", "head_dim", "mlp", "num_layers")),
        *((name, _real) for name in ("eps", "rotary_scale")),
        *((name, _at) for name in ("frequencies", "embedding", "tied", "layers", "norm")),
        ("head", CLinear),
        ("vocabulary", _whole),
        ("token_ids", _at),
        ("blank", CLinear),
        ("entry", CEntry),
    )


class CStep(ctypes.Structure):
    """One forward."""

    _fields_ = (
        ("num_trees", _whole),
        *((name, _at) for name in ("tokens", "parents", "offsets", "lengths", "slots", "first")),
        ("num_rows", _whole),
        *((name, _at) for name in ("rows", "logits")),
        ("num_features", _whole),
        *((name, _at) for name in ("feature_layers", "features", "keys", "values")),
        *((name, _whole) for name in ("layer_stride", "slot_stride", "head_stride", "threads")),
        *((name, _at) for name in ("given", "num_given", "carried")),
        ("num_slots", _whole),
    )


def can_run(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this decoder runs a model that `foredraft.models.llama` runs: in bfloat16 on a CPU, with even widths."""
    widths = (config.hidden_size, config.intermediate_size, head_dim_of(config))
    fits = dtype == torch.bfloat16 and device.type == "cpu" and all(width % TILE == 0 for width in widths)
    return fits and library() is not None


class NativeTarget:
    """A Llama-family model behind the `Target` contract; see `can_run` and the module's text.

    Args:
        config: the model's Transformers configuration.
        weights: its state dict, under the names of the Transformers checkpoint.
        threads: None is what torch uses, or one for a very small model.

    Raises:
        ValueError: a weight is missing.
    """

    dtype, device, has_own_threads = torch.bfloat16, torch.device("cpu"), True

    def __init__(self, config: PretrainedConfig, weights: Mapping[str, Tensor], *, threads: int | None = None):
        code = library()
        assert code is not None, "ask can_run first"
        self.config = config
        self.vocab_size: int = config.vocab_size
        self.max_len: int = config.max_position_embeddings
        self._memory = Memory()
        self._model = self._describe(config, Reader(config, weights, self.dtype, self.device, packed=False))
        self.num_weight_bytes = self._memory.num_bytes - (0 if self._embedding is None else self._embedding.nbytes)
        self._threads = threads or (torch.get_num_threads() if self._memory.num_bytes > ONE_THREAD_BYTES else 1)

    def new_pool(self, num_slots: int, max_len: int) -> KVPool:
        """Caches for `num_slots` requests. `max_len` is advice: slots grow as they are used."""
        return KVPool(
            num_slots=num_slots,
            num_layers=self._model.num_layers,
            num_heads=self._model.kv_heads,
            head_dim=self._model.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    def embed(self, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Input embeddings."""
        if self._embedding is not None:
            return self._embedding[token_ids]
        return self._head[token_ids // TILE, :, token_ids % TILE].flatten(1)

    def head(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits (float32) of final features, those after the last norm."""
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
        """Runs the new nodes of every tree; see `foredraft.protocols.Target`. Logits are float32.

        Args:
            feature_layers: states to return, side by side: 0 is the embedding, i the state after i layers, -1 the state
                after the final norm.
        """
        return run_step(self._model, batch, caches, rows, start, feature_layers, threads=self._threads)

    def _describe(self, config: PretrainedConfig, read: Reader) -> CModel:
        """The model as `decoder.c` wants it."""
        tied = not read.has("lm_head")
        head = read.tensor("model.embed_tokens" if tied else "lm_head")
        self._embedding = None if tied else self._memory.put(read.tensor("model.embed_tokens"))
        self._head = self._memory.put(blocked(head))
        rotary: Any = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        frequencies = self._memory.put(rotary.inv_freq.float().contiguous())
        described = [
            describe_layer(self._memory, read, f"model.layers.{i}", window_of(config, i))
            for i in range(config.num_hidden_layers)
        ]
        layers = (CLayer * len(described))(*described)
        self._layers = layers  # lives as long as the model, which points to it
        return CModel(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim_of(config),
            mlp=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            eps=config.rms_norm_eps,
            rotary_scale=rotary.attention_scaling,
            frequencies=frequencies.data_ptr(),
            embedding=None if self._embedding is None else self._embedding.data_ptr(),
            tied=self._head.data_ptr(),
            layers=ctypes.addressof(layers),
            norm=self._memory.put(read.tensor("model.norm")).data_ptr(),
            head=CLinear(self._head.data_ptr(), 0, None, *head.shape),
            vocabulary=len(head),
        )

    @property
    def head_weight(self) -> Float[Tensor, "v d"]:
        """That of the head."""
        return self._head.transpose(1, 2).flatten(2).flatten(0, 1)[: self.vocab_size]

    @property
    def shared(self) -> dict[str, Any]:
        """What a draft head shares: fields of `CModel`."""
        return {name: getattr(self._model, name) for name in ("embedding", "tied", "head", "vocabulary")}


def describe_linear(memory: Memory, read: Reader, *names: str, bits: int = FULL) -> CLinear:
    """Linear layers fused into one, as `decoder.c` reads it, with weights of `FEW` or `FULL` bits."""
    return describe_weight(memory, read.tensor(*names), read.bias(*names), bits)


def describe_weight(memory: Memory, weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None, bits: int) -> CLinear:
    """The same of a weight."""
    laid_out = blocked_few(weight) if bits == FEW else blocked(weight)
    given = None if bias is None else memory.put(bias).data_ptr()
    return CLinear(memory.put(laid_out).data_ptr(), int(bits == FEW), given, *weight.shape)


class FewBits(NamedTuple):
    """Weights of four bits: the weight of output o and input i is ``(numbers[o, i] - 8) * scales[o, i // 32]``."""

    numbers: UInt8[Tensor, "o i"]
    scales: Float[Tensor, "o b"]

    @staticmethod
    def of(weight: Float[Tensor, "o i"]) -> FewBits:
        """The number 0 is the largest weight of a block, whichever sign it has."""
        blocks = weight.float().unflatten(1, (-1, _BLOCK))
        scales = (blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8).bfloat16()
        steps = torch.where(scales == 0, 0, blocks / scales.float())
        return FewBits((steps.round() + 8).clamp(0, 15).to(torch.uint8).flatten(1), scales[..., 0])


def describe_layer(memory: Memory, read: Reader, at: str, window: int | None, bits: int = FULL) -> CLayer:
    """The decoder layer called `at`, as `decoder.c` reads it."""

    def norm(name: str) -> int | None:
        return memory.put(read.tensor(f"{at}.{name}")).data_ptr() if read.has(f"{at}.{name}") else None

    def linear(*names: str) -> CLinear:
        return describe_linear(memory, read, *(f"{at}.{name}_proj" for name in names), bits=bits)

    return CLayer(
        norm("input_layernorm"),
        norm("self_attn.q_norm"),
        norm("self_attn.k_norm"),
        norm("post_attention_layernorm"),
        linear(*(f"self_attn.{name}" for name in "qkv")),
        linear("self_attn.o"),
        linear("mlp.gate"),
        linear("mlp.up"),
        linear("mlp.down"),
        window or NO_WINDOW,
    )


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
) -> Scores:
    """One forward of `decoder.c`; see `foredraft.protocols.Target`.

    Args:
        given, carried: of a draft head, per tree: the features of its first nodes, and a table with room for what its nodes
            carry on, which a node behind those has from its parent; both contiguous. No tables: nobody asks.
        num_slots: the last nodes of every tree that are slots to be filled, and are given no feature.

    Raises:
        MemoryError: there is no room for the step.
    """
    code = library()
    assert code is not None
    pool, num_trees = caches[0].pool, len(batch)
    lengths, offsets = [cache.length for cache in caches], batch.offsets.tolist()
    first = [0] * num_trees if start is None else list(start)
    pool.reserve(max(length + end - begin for length, begin, end in zip(lengths, offsets, offsets[1:], strict=False)))
    count = offsets[-1] - sum(first)
    wanted = np.arange(count) if rows is None else among_new(rows, batch.offsets, first)
    logits = torch.empty(len(wanted), model.vocabulary)
    features = torch.empty(count, len(feature_layers) * model.hidden, dtype=torch.bfloat16) if feature_layers else None
    per_tree = lengths, [cache.slot for cache in caches], first
    tables = [one.data_ptr() for one in given], [len(one) for one in given], [one.data_ptr() for one in carried]
    nodes = batch.tokens.tolist(), batch.parents.tolist(), offsets
    _alive, begin = _side_by_side(*nodes, *per_tree, wanted.tolist(), feature_layers, *tables)
    keys, (pairs_stride, layer_stride, slot_stride, head_stride, _, _) = pool.kv.data_ptr(), pool.kv.stride()
    step = CStep(
        num_trees,
        *begin[:6],
        len(wanted),
        begin[6],
        logits.data_ptr(),
        len(feature_layers),
        begin[7],
        None if features is None else features.data_ptr(),
        keys,
        keys + pairs_stride * pool.kv.element_size(),
        layer_stride,
        slot_stride,
        head_stride,
        threads,
        begin[8] if given else None,
        begin[9],
        begin[10] if carried else None,
        num_slots,
    )
    if code.foredraft_forward(ctypes.byref(model), ctypes.byref(step)):
        raise MemoryError(f"no memory for a step of {count} tokens")
    return Scores(logits, features)


def _side_by_side(*parts: Sequence[int]) -> tuple[array[int], list[int]]:
    """Whole numbers in one array, of which the address is asked for once, and the address of each part in it."""
    numbers = array("q", chain.from_iterable(parts))
    begin, _ = numbers.buffer_info()
    return numbers, list(accumulate((_WORD * len(one) for one in parts[:-1]), initial=begin))


def run_linear(layer: CLinear, x: Float[Tensor, "n i"], threads: int) -> Float[Tensor, "n o"]:
    """A linear layer of `decoder.c` on inputs in bfloat16; what it gives is float32."""
    code, x = library(), x.contiguous()
    assert code is not None
    out = torch.empty(len(x), layer.outputs)
    given = ctypes.byref(layer), _whole(1), _at(x.data_ptr()), _whole(len(x)), _at(out.data_ptr()), _whole(threads)
    if code.foredraft_linears(*given):
        raise MemoryError(f"no memory for a linear layer of {len(x)} rows")
    return out


def run_residuals(blocks: ctypes.Array[CResidual], x: Float[Tensor, "n i"], threads: int) -> Float[Tensor, "n d"]:
    """Residual blocks of `decoder.c` one after another, all as wide, in bfloat16; between them sums are float32."""
    code, x = library(), x.contiguous()
    assert code is not None
    out = torch.empty(len(x), blocks[0].linear.outputs, dtype=torch.bfloat16)
    given = blocks, _whole(len(blocks)), _at(x.data_ptr()), _whole(len(x)), _at(out.data_ptr()), _whole(threads)
    if code.foredraft_residuals(*given):
        raise MemoryError(f"no memory for residual blocks of {len(x)} rows")
    return out


class Memory:
    """Keeps tensors one after another on huge pages, where the system has them: streaming weights then misses few of the
    processor's page entries, which makes a step of twelve rows a fifth faster."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._blocks: list[Tensor] = []
        self._used = 0

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, alive as long as this."""
        size = -(-tensor.nbytes // _LINE) * _LINE
        if not self._blocks or self._used + size > self._blocks[-1].nbytes:
            self._blocks.append(_pages(max(size, _PAGES)))
            self._used = 0
        place = self._blocks[-1][self._used : self._used + tensor.nbytes]
        self._used += size
        self.num_bytes += size
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _pages(num_bytes: int) -> Tensor:
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def blocked(weight: Num[Tensor, "o i"]) -> Num[Tensor, "t half 32 2"]:
    """A weight in the order in which it is read: for 32 outputs, two entries of each of them after another."""
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % TILE))
    return padded.view(-1, TILE, inputs // 2, 2).transpose(1, 2).contiguous()


def blocked_few(weight: Float[Tensor, "o i"]) -> UInt8[Tensor, "t b 576"]:
    """The same of weights of four bits, as `Block` in `decoder.c`: for 32 outputs, scales and numbers of 32 inputs each."""
    numbers, scales = FewBits.of(torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % TILE)))
    low, high = numbers.view(-1, 2, TILE // 2, weight.shape[1] // 4, 4).unbind(1)
    halves = (low | high << 4).transpose(1, 2).reshape(len(low), -1, _BLOCK * TILE // 2)
    return torch.cat([scales.view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous().view(torch.uint8), halves], dim=2)
