"""The layers of EAGLE, FSPAD, EAGLE-3 and parallel slots in bfloat16 on a CPU, by `compiled/decoder.c`: one call a level of
the tree, or one for all slots. `foredraft.drafters.heads` is the plain version; a test equates the two."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foredraft.cache import KVCache
from foredraft.drafters.heads import CtcHead, Eagle3Head, FeatureHead, HydraHeads
from foredraft.drafters.layers import ResBlock, Shape
from foredraft.models.native import ONE_THREAD_BYTES, NativeTarget, can_run, run_linear, run_residuals, run_step
from foredraft.models.packed import (
    FEW,
    FULL,
    TILE,
    CEntry,
    CLayer,
    CLinear,
    CModel,
    CResidual,
    Memory,
    describe_layer,
    describe_linear,
    describe_weight,
)
from foredraft.models.reader import Reader
from foredraft.models.rope import frequencies
from foredraft.tree import Ids, TreeBatch

LayerHead = FeatureHead | Eagle3Head | CtcHead | HydraHeads
"""Heads with one decoder layer. Hydra's takes the target's features, and its heads read what comes out; the others share the
target's embedding or head."""


def can_compile(head: Any, config: Any, target: Any) -> bool:
    """Whether the compiled layer runs this head: one of one layer, beside a target that is compiled too."""
    is_native = isinstance(target, NativeTarget) and isinstance(head, LayerHead)
    has_other_norms = isinstance(head, Eagle3Head) and not head.has_only_released_norms
    has_no_layer = isinstance(head, HydraHeads) and head.prefix is None
    fits = is_native and not has_other_norms and not has_no_layer
    return fits and can_run(config, torch.bfloat16, torch.device("cpu"))


class CompiledLinear(nn.Module):
    """A linear layer in bfloat16 by `compiled/decoder.c`.

    Attributes:
        described, threads: what is run, and on how many.
    """

    def __init__(self, plain: nn.Linear, memory: Memory, threads: int, bits: int):
        super().__init__()
        self._memory, self.threads = memory, threads
        self.described = describe(plain, memory, bits)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """A linear layer."""
        return run_linear(self.described, x.flatten(0, -2), self.threads).to(x.dtype).unflatten(0, x.shape[:-1])


class CompiledBlocks(nn.Module):
    """Residual blocks in bfloat16, one after another in one call; what they add up is not rounded on the way."""

    def __init__(self, plain: Sequence[ResBlock], memory: Memory, threads: int, bits: int):
        super().__init__()
        self._memory, self._threads = memory, threads
        both = [[describe(linear, memory, bits) for linear in (one.linear, one.res_connection)] for one in plain]
        self._blocks = (CResidual * len(both))(*(CResidual(*pair) for pair in both))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n d"]:
        """The last one's output."""
        return run_residuals(self._blocks, x.flatten(0, -2), self._threads).unflatten(0, x.shape[:-1])


def describe(plain: nn.Linear | nn.Identity, memory: Memory, bits: int) -> CLinear:
    """A linear layer as `decoder.c` reads it; one without a weight is the identity."""
    if not isinstance(plain, nn.Linear):
        return CLinear()
    return describe_weight(memory, plain.weight.detach(), None if plain.bias is None else plain.bias.detach(), bits)


def compile_linears(head: nn.Module, target: Any, bits: int) -> None:
    """Puts compiled layers in the place of linear ones and of residual blocks, beside a target that is compiled too, where
    their widths allow it."""
    if not isinstance(target, NativeTarget):
        return
    memory, threads = Memory(), torch.get_num_threads()
    if sum(one.numel() for one in head.parameters()) * bits <= 8 * ONE_THREAD_BYTES:
        threads = 1
    _compile_inside(head, memory, threads, bits)


def _compile_inside(parent: nn.Module, *how: Any) -> None:
    for name, one in [*parent.named_children()]:
        fits = all(linear.in_features % TILE == 0 for linear in one.modules() if isinstance(linear, nn.Linear))
        blocks = [block for block in one.children() if isinstance(block, ResBlock)]
        if fits and isinstance(one, nn.Linear):
            setattr(parent, name, CompiledLinear(one, *how))
        elif fits and isinstance(one, nn.Sequential) and len(blocks) == len(one):
            setattr(parent, name, CompiledBlocks(blocks, *how))
        else:
            _compile_inside(one, *how)


class CompiledHead:
    """A head of one layer that shares the embedding and the head of a compiled target, as far as it has none of its own.

    Args:
        head: in bfloat16.
        config: the Llama configuration of its layer.
        threads: None is what torch uses, or one for a small head.
        bits: of a weight, 4 or 16.

    Attributes:
        threads: those that it runs on.
    """

    def __init__(self, head: LayerHead, config: Any, target: NativeTarget, *, threads: int | None = None, bits: int = FEW):
        self._memory, self._target = Memory(), target  # the target lives as long as what is shared with it
        self._bits = bits
        read = Reader(config, head.state_dict(), torch.bfloat16, torch.device("cpu"), packed=False)
        shape, rotary = Shape.of(config), frequencies(config, config.max_position_embeddings)
        at = "midlayer" if isinstance(head, Eagle3Head) else "prefix" if isinstance(head, HydraHeads) else "layers.0"
        self._layers = (CLayer * 1)(describe_layer(self._memory, read, at, None, bits))
        self._fc = self._linear(read, "fc") if isinstance(head, Eagle3Head) else None
        own = self._own(head, read)
        self._model = CModel(
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
        """What of a model is the head's own: how pairs enter, and what is scored with."""
        if isinstance(head, HydraHeads):
            return {"head": CLinear(), "vocabulary": 0}
        if isinstance(head, Eagle3Head):
            return self._wide(read, head.token_ids)
        return self._parallel(read, head) if isinstance(head, CtcHead) else {"entry": self._entry(read)}

    def _entry(self, read: Reader) -> CEntry:
        """EAGLE's and FSPAD's."""
        if not read.has("fc.fc"):
            return CEntry(self._linear(read, "fc"))
        norm = self._put(read, "fc.post_attention_layernorm")
        linears = (self._linear(read, f"fc.mlp.{name}_proj") for name in ("gate", "up", "down"))
        return CEntry(self._linear(read, "fc.fc"), norm, *linears)

    def _wide(self, read: Reader, token_ids: Int[Tensor, " w"]) -> dict[str, Any]:
        """What of a model is EAGLE-3's own."""
        own = {
            "entry": CEntry(feature_norm=self._put(read, "midlayer.hidden_norm")),
            "norm": self._put(read, "norm"),
            "head": self._linear(read, "lm_head"),
            "token_ids": self._memory.put(token_ids).data_ptr(),
        }
        return own | ({"embedding": self._put(read, "embed_tokens")} if read.has("embed_tokens") else {})

    def _parallel(self, read: Reader, head: CtcHead) -> dict[str, Any]:
        """What of a model is that of parallel slots."""
        entry = CEntry(self._linear(read, "fc"), ahead=self._linear(read, *(f"ahead.{k}" for k in range(len(head.ahead)))))
        if head.blank is None:
            return {"entry": entry}
        blank = self._linear(read, "blank")
        return {"entry": entry, "blank": blank, "vocabulary": self._target.vocab_size + 1}

    def _shared(self) -> dict[str, Any]:
        """What is the target's; its head in as few bits as the rest."""
        if self._bits == FULL:
            return self._target.shared
        head = describe_weight(self._memory, self._target.head_weight, None, self._bits)
        return {**self._target.shared, "head": head}

    def _linear(self, read: Reader, *names: str) -> CLinear:
        return describe_linear(self._memory, read, *names, bits=self._bits)

    def _put(self, read: Reader, name: str) -> int:
        return self._memory.put(read.tensor(name)).data_ptr()

    @property
    def linears(self) -> list[CLinear]:
        """The matrix products of a forward, in their order."""
        entry, layer, model = self._model.entry, self._layers[0], self._model
        before = (entry.fc, entry.gate, entry.up, entry.down, entry.ahead)
        inside = (layer.qkv, layer.output, layer.gate, layer.up, layer.down)
        return [one for one in (*before, *inside, model.head, model.blank) if one.weight]

    def fuse(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """What pairs are given of the target's features."""
        return features if self._fc is None else run_linear(self._fc, features, self.threads).bfloat16()

    def __call__(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        given: Sequence[Float[Tensor, "_ d"]],
        start: Sequence[int] | None,
        rows: Ids,
        carried: Sequence[Float[Tensor, "_ d"]] = (),
    ) -> Float[Tensor, "r v"]:
        """Draft logits (float32) at the packed nodes `rows`; see `foredraft.models.native.run_step`."""
        features = [one.contiguous() for one in given]
        step = {"threads": self.threads, "given": features, "carried": carried}
        return run_step(self._model, batch, caches, rows, start, **step).logits

    def read(self, batch: TreeBatch, caches: Sequence[KVCache], given: Sequence[Float[Tensor, "_ d"]]) -> Float[Tensor, "b d"]:
        """What comes out of the layer at the end of each chain of features."""
        out = [torch.empty_like(one) for one in given]
        self(batch, caches, given, None, batch.offsets[1:] - 1, out)
        return torch.stack([one[-1] for one in out])

    def fill(
        self, batch: TreeBatch, caches: Sequence[KVCache], given: Sequence[Float[Tensor, "_ d"]], rows: Ids, num_slots: int
    ) -> Float[Tensor, "r w"]:
        """Logits (float32) at the packed nodes `rows` of chains of pairs, each with `num_slots` slots behind it."""
        features = [one.contiguous() for one in given]
        step = {"threads": self.threads, "given": features, "num_slots": num_slots}
        return run_step(self._model, batch, caches, rows, None, **step).logits
