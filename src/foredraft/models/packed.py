"""The layers of a checkpoint in the form that compiled code takes."""

from __future__ import annotations

from foredraft.kernels.layouts import FULL, NO_WINDOW, Memory, describe_weight
from foredraft.kernels.quantized import Quantized
from foredraft.kernels.structures import CLayer, CLinear
from foredraft.models.reader import Reader


def describe_linear(memory: Memory, read: Reader, *names: str, bits: int = FULL, is_rounded: bool = True) -> CLinear:
    """Fuses linear layers into one, with weights of `bits` bits, see `foredraft.kernels.layouts`."""
    [layer] = describe_linears(memory, read, *names, bits=bits, is_rounded=is_rounded)
    return layer


def describe_linears(memory: Memory, read: Reader, *names: str, bits: int, is_rounded: bool) -> list[CLinear]:
    """Describes linear layers with the same inputs, whose outputs follow each other. Those that are stored alike are one."""
    bias, layers, first = read.bias(*names), list[CLinear](), 0
    for weight in read.weights(*names):
        outputs = len(weight.numbers) if isinstance(weight, Quantized) else len(weight)
        own = None if bias is None else bias[first : first + outputs]
        layers.append(describe_weight(memory, weight, own, bits, is_rounded=is_rounded))
        first += outputs
    return layers


def describe_layer(
    memory: Memory, read: Reader, at: str, window: int | None, bits: int = FULL, *, is_rounded: bool = True
) -> CLayer:
    """Describes the decoder layer with the name `at`."""
    how = {"bits": bits, "is_rounded": is_rounded}

    def norm(name: str) -> int | None:
        return memory.put(read.tensor(f"{at}.{name}").float()).data_ptr() if read.has(f"{at}.{name}") else None

    def linear(*names: str) -> CLinear:
        return describe_linear(memory, read, *(f"{at}.{name}_proj" for name in names), **how)

    return CLayer(
        norm("input_layernorm"),
        norm("self_attn.q_norm"),
        norm("self_attn.k_norm"),
        norm("post_attention_layernorm"),
        (CLinear * 3)(*describe_linears(memory, read, *(f"{at}.self_attn.{name}_proj" for name in "qkv"), **how)),
        linear("self_attn.o"),
        linear("mlp.gate"),
        linear("mlp.up"),
        linear("mlp.down"),
        window or NO_WINDOW,
    )
