"""The layers of a checkpoint in the form that compiled code takes."""

from __future__ import annotations

from foredraft.kernels.layouts import FULL, NO_WINDOW, Memory, describe_weight
from foredraft.kernels.structures import CLayer, CLinear
from foredraft.models.reader import Reader


def describe_linear(memory: Memory, read: Reader, *names: str, bits: int = FULL) -> CLinear:
    """Fuses linear layers into one, with weights of `bits` bits, see `foredraft.kernels.layouts`."""
    return describe_weight(memory, read.tensor(*names), read.bias(*names), bits)


def describe_layer(memory: Memory, read: Reader, at: str, window: int | None, bits: int = FULL) -> CLayer:
    """Describes the decoder layer with the name `at`."""

    def norm(name: str) -> int | None:
        return memory.put(read.tensor(f"{at}.{name}").float()).data_ptr() if read.has(f"{at}.{name}") else None

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
