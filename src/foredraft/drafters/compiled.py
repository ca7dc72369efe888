"""EAGLE's and FSPAD's layer in bfloat16 on a CPU, by `compiled/decoder.c`: one call a level of the tree.
`foredraft.drafters.heads` is the plain version; a test equates the two."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from foredraft.cache import KVCache
from foredraft.drafters.heads import FeatureHead
from foredraft.drafters.layers import Shape
from foredraft.models.llama import Reader
from foredraft.models.native import (
    ONE_THREAD_BYTES,
    CEntry,
    CLayer,
    CModel,
    Memory,
    NativeTarget,
    can_run,
    describe_layer,
    describe_linear,
    run_step,
)
from foredraft.tree import Ids, TreeBatch


def can_compile(head: Any, config: Any, target: Any) -> bool:
    """Whether the compiled layer runs this head: EAGLE's or FSPAD's, beside a target that is compiled too."""
    is_native = isinstance(target, NativeTarget) and isinstance(head, FeatureHead)
    return is_native and can_run(config, torch.bfloat16, torch.device("cpu"))


class CompiledHead:
    """A `FeatureHead` that shares the embedding and the head of a compiled target.

    Args:
        head: in bfloat16.
        config: the Llama configuration of its layer.
        threads: None is what torch uses, or one for a small head.
    """

    def __init__(self, head: FeatureHead, config: Any, target: NativeTarget, *, threads: int | None = None):
        self._vocab_size, self._memory, self._target = target.vocab_size, Memory(), target
        read = Reader(config, head.state_dict(), torch.bfloat16, torch.device("cpu"), packed=False)
        shape, rotary = Shape.of(config), LlamaRotaryEmbedding(config=config)
        self._layers = (CLayer * 1)(describe_layer(self._memory, read, "layers.0", None))
        embedding, target_head = target.shared
        self._model = CModel(
            shape.hidden,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            shape.intermediate,
            1,
            shape.eps,
            rotary.attention_scaling,
            self._memory.put(rotary.inv_freq.float().contiguous()).data_ptr(),  # type: ignore[operator]
            embedding,
            ctypes.addressof(self._layers),
            None,
            target_head,
            self._entry(read),
        )
        self._threads = threads or (torch.get_num_threads() if self._memory.num_bytes > ONE_THREAD_BYTES else 1)

    def _entry(self, read: Reader) -> CEntry:
        if not read.has("fc.fc"):
            return CEntry(describe_linear(self._memory, read, "fc"))
        norm = self._memory.put(read.tensor("fc.post_attention_layernorm")).data_ptr()
        linears = (describe_linear(self._memory, read, f"fc.mlp.{name}_proj") for name in ("gate", "up", "down"))
        return CEntry(describe_linear(self._memory, read, "fc.fc"), norm, *linears)

    def __call__(
        self,
        batch: TreeBatch,
        caches: Sequence[KVCache],
        features: Float[Tensor, "m d"],
        start: Sequence[int] | None,
        rows: Ids,
    ) -> tuple[Float[Tensor, "r v"], Float[Tensor, "m d"]]:
        """Draft logits (float32) at the packed nodes `rows`, and the features that all new nodes carry on."""
        features = features.contiguous()
        carried = torch.empty_like(features)
        scores = run_step(
            self._model,
            batch,
            caches,
            rows,
            start,
            vocab_size=self._vocab_size,
            threads=self._threads,
            given=features,
            carried=carried,
        )
        return scores.logits, carried
