"""Compiled heads: runs the layers of EAGLE, FSPAD, EAGLE-3 and parallel slots on a CPU with `kernels/c/decoder.h`.

One call computes a level of the tree, or all slots. `foredraft.heads` holds the plain version. A test compares the two.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.cache.pool import KVCache
from foredraft.core.chains import Chains, ChainWish
from foredraft.core.contracts import Target
from foredraft.core.tree import Ids, TreeBatch
from foredraft.heads.ctc import CtcHead
from foredraft.heads.eagle import Eagle3Head, FeatureHead
from foredraft.heads.hydra import HydraHeads
from foredraft.heads.layers import ResBlock, Shape
from foredraft.kernels.layouts import FULL, QUANTIZED, TILE, TYPES, Memory, describe_weight
from foredraft.kernels.structures import CEntry, CLayer, CLinear, CModel, CResidual
from foredraft.models.native import ONE_THREAD_BYTES, can_run, draw_chains, run_linear, run_residuals, run_step
from foredraft.models.packed import describe_layer, describe_linear
from foredraft.models.reader import Reader
from foredraft.models.rope import frequencies

LayerHead = FeatureHead | Eagle3Head | CtcHead | HydraHeads
"""Heads with one decoder layer. The layer of Hydra reads the target's features, and Hydra's heads read its output. The other
heads share the target's embedding or output head."""


def can_compile(head: Any, config: Any, target: Target) -> bool:
    """Whether compiled code can run this head. It needs a head with one layer and a target that is compiled too."""
    can_share = target.shared is not None and isinstance(head, LayerHead)
    has_other_norms = isinstance(head, Eagle3Head) and not head.has_only_released_norms
    has_no_layer = isinstance(head, HydraHeads) and head.prefix is None
    fits = can_share and not has_other_norms and not has_no_layer
    return fits and can_run(config, target.dtype, torch.device("cpu"))


class CompiledLinear(nn.Module):
    """A linear layer that runs in compiled code.

    Attributes:
        described: the layer as the C code reads it.
        threads: number of threads.
    """

    def __init__(self, plain: nn.Linear, memory: Memory, threads: int, bits: int):
        super().__init__()
        self._memory, self.threads = memory, threads
        self.described = describe(plain, memory, bits)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Applies the linear layer."""
        return run_linear(self.described, x.flatten(0, -2), self.threads).to(x.dtype).unflatten(0, x.shape[:-1])


class CompiledBlocks(nn.Module):
    """A sequence of residual blocks, run in one call. Their running sum is not rounded between blocks."""

    def __init__(self, plain: Sequence[ResBlock], memory: Memory, threads: int, bits: int):
        super().__init__()
        self._memory, self._threads = memory, threads
        pairs = [[describe(linear, memory, bits) for linear in (block.linear, block.res_connection)] for block in plain]
        self._blocks = (CResidual * len(pairs))(*(CResidual(*pair) for pair in pairs))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n d"]:
        """Returns the output of the last block."""
        return run_residuals(self._blocks, x.flatten(0, -2), self._threads).unflatten(0, x.shape[:-1])


def describe(plain: nn.Linear | nn.Identity, memory: Memory, bits: int) -> CLinear:
    """Describes a linear layer in the form that compiled code reads. A layer without a weight is the identity."""
    if not isinstance(plain, nn.Linear):
        return CLinear()
    return describe_weight(memory, plain.weight.detach(), None if plain.bias is None else plain.bias.detach(), bits)


def compile_linears(head: nn.Module, target: Target, bits: int) -> None:
    """Replaces linear layers and residual blocks of a head by compiled ones, if their widths allow it.

    Does nothing if the target is not compiled.
    """
    if target.shared is None:
        return
    memory, threads = Memory(), torch.get_num_threads()
    if sum(weight.numel() for weight in head.parameters()) * bits <= 8 * ONE_THREAD_BYTES:
        threads = 1
    _compile_inside(head, memory, threads, bits)


def _compile_inside(parent: nn.Module, *how: Any) -> None:
    for name, child in [*parent.named_children()]:
        fits = all(linear.in_features % TILE == 0 for linear in child.modules() if isinstance(linear, nn.Linear))
        blocks = [block for block in child.children() if isinstance(block, ResBlock)]
        if fits and isinstance(child, nn.Linear):
            setattr(parent, name, CompiledLinear(child, *how))
        elif fits and isinstance(child, nn.Sequential) and len(blocks) == len(child):
            setattr(parent, name, CompiledBlocks(blocks, *how))
        else:
            _compile_inside(child, *how)


class CompiledHead:
    """A compiled head of one layer. It shares the embedding and output head of a compiled target unless it has its own.

    Args:
        head: the plain head, in bfloat16.
        config: the Llama configuration of its layer.
        target: the compiled target.
        threads: number of threads. None is torch's number of threads, or 1 for a small head.
        bits: bits of a stored weight, 4 or 16.

    Attributes:
        threads: number of threads in use.
    """

    def __init__(self, head: LayerHead, config: Any, target: Any, *, threads: int | None = None, bits: int = QUANTIZED):
        self._memory, self._target = Memory(), target  # keeps the shared weights alive
        self._bits = bits
        read = Reader(config, head.state_dict(), target.dtype, torch.device("cpu"), packed=False)
        shape, rotary = Shape.of(config), frequencies(config, config.max_position_embeddings)
        at = "midlayer" if isinstance(head, Eagle3Head) else "prefix" if isinstance(head, HydraHeads) else "layers.0"
        self._layers = (CLayer * 1)(describe_layer(self._memory, read, at, None, bits))
        self._fc = self._linear(read, "fc") if isinstance(head, Eagle3Head) else None
        own = self._own(head, read)
        self._model = CModel(
            type=TYPES[target.dtype],
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            mlp=shape.intermediate,
            num_layers=1,
            eps=shape.eps,
            rotary_scale=rotary.scaling,
            frequencies=self._memory.put(rotary.frequencies.contiguous()).data_ptr(),
            layers=ctypes.addressof(self._layers),
            **(target.shared if "head" in own else self._shared()) | own,
        )
        self.threads = threads or (torch.get_num_threads() if self._memory.num_bytes > ONE_THREAD_BYTES else 1)

    def _own(self, head: LayerHead, read: Reader) -> dict[str, Any]:
        """The fields of `CModel` that belong to the head itself: the entry of pairs and the output head."""
        if isinstance(head, HydraHeads):
            return {"head": CLinear(), "vocabulary": 0}
        if isinstance(head, Eagle3Head):
            return self._wide(read, head.token_ids)
        return self._parallel(read, head) if isinstance(head, CtcHead) else {"entry": self._entry(read)}

    def _entry(self, read: Reader) -> CEntry:
        """The entry of EAGLE and FSPAD."""
        if not read.has("fc.fc"):
            return CEntry(self._linear(read, "fc"))
        norm = self._put(read, "fc.post_attention_layernorm")
        linears = (self._linear(read, f"fc.mlp.{name}_proj") for name in ("gate", "up", "down"))
        return CEntry(self._linear(read, "fc.fc"), norm, *linears)

    def _wide(self, read: Reader, token_ids: Int[Tensor, " w"]) -> dict[str, Any]:
        """The fields of `CModel` that EAGLE-3 sets."""
        own = {
            "entry": CEntry(feature_norm=self._put(read, "midlayer.hidden_norm")),
            "norm": self._put(read, "norm"),
            "head": self._linear(read, "lm_head"),
            "token_ids": self._memory.put(token_ids).data_ptr(),
        }
        return own | (
            {"embedding": self._memory.put(read.tensor("embed_tokens")).data_ptr()} if read.has("embed_tokens") else {}
        )

    def _parallel(self, read: Reader, head: CtcHead) -> dict[str, Any]:
        """The fields of `CModel` that parallel slots set."""
        entry = CEntry(self._linear(read, "fc"), ahead=self._linear(read, *(f"ahead.{k}" for k in range(len(head.ahead)))))
        if head.blank is None:
            return {"entry": entry}
        blank = self._linear(read, "blank")
        return {"entry": entry, "blank": blank, "vocabulary": self._target.vocab_size + 1}

    def _shared(self) -> dict[str, Any]:
        """The fields of `CModel` that the target shares. Its output head is stored with the same number of bits as the rest."""
        if self._bits == FULL:
            return self._target.shared
        head = describe_weight(self._memory, self._target.head_weight, None, self._bits)
        return {**self._target.shared, "head": head}

    def _linear(self, read: Reader, *names: str) -> CLinear:
        return describe_linear(self._memory, read, *names, bits=self._bits)

    def _put(self, read: Reader, name: str) -> int:
        return self._memory.put(read.tensor(name).float()).data_ptr()

    @property
    def linears(self) -> list[CLinear]:
        """The matrix products of a forward, in the order of their execution."""
        entry, layer, model = self._model.entry, self._layers[0], self._model
        before = (entry.fc, entry.gate, entry.up, entry.down, entry.ahead)
        inside = (*layer.qkv, layer.output, layer.gate, layer.up, layer.down)
        return [linear for linear in (*before, *inside, model.head, model.blank) if linear.weight]

    def fuse(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """Converts the target's features to the features of pairs."""
        return features if self._fc is None else run_linear(self._fc, features, self.threads).to(features.dtype)

    def __call__(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        given: Sequence[Float[Tensor, "_ d"]],
        start: Sequence[int] | None,
        rows: Ids,
        carried: Sequence[Float[Tensor, "_ d"]] = (),
    ) -> Float[Tensor, "r v"]:
        """Returns draft logits (float32) at the packed nodes `rows`; see `foredraft.models.native.run_step`."""
        features = [rows_given.contiguous() for rows_given in given]
        step = {"threads": self.threads, "given": features, "carried": carried}
        return run_step(self._model, batch, caches, rows, start, **step).logits

    def draw_chains(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        given: Sequence[Float[Tensor, "_ d"]],
        carried: Sequence[Float[Tensor, "_ d"]],
        wish: ChainWish,
    ) -> Chains:
        """Draws a chain after each chain of pairs. The arguments are those of a call."""
        features = [rows_given.contiguous() for rows_given in given]
        return draw_chains(self._model, batch, caches, wish, threads=self.threads, given=features, carried=carried)

    def read(self, batch: TreeBatch, caches: Sequence[KVCache], given: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "b d"]:
        """Returns the output of the layer at the end of each chain of features."""
        outputs = [torch.empty_like(features) for features in given]
        self(batch, caches, given, None, batch.offsets[1:] - 1, outputs)
        return torch.stack([output[-1] for output in outputs])

    def fill(
        self, batch: TreeBatch, caches: Sequence[KVCache], given: Sequence[Float[Tensor, "_ d"]], rows: Ids, num_slots: int
    ) -> Float[Tensor, "r w"]:
        """Returns logits (float32) at the packed nodes `rows` of chains of pairs, each followed by `num_slots` slots."""
        features = [rows_given.contiguous() for rows_given in given]
        step = {"threads": self.threads, "given": features, "num_slots": num_slots}
        return run_step(self._model, batch, caches, rows, None, **step).logits
