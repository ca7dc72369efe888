"""The plainest kind of checkpoint, read without Transformers: a Llama whose config.json states every value that counts.

Importing Transformers' models takes longer than loading a small one. It judges every other checkpoint: one that leaves a value
to a default, has an unknown key, or has weights under other names or in other shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foredraft.models.checkpoint import StoredTensor
from foredraft.models.files import HEAD_KEY, ModelError, read_json

_STATED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), int),
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "rope_parameters": dict,
}
"""Values that must be stated, with their types."""

_FIXED = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
"""Values that must be stated, and be one of these."""

_WITHOUT_EFFECT = (
    *("architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("pretraining_tp", "transformers_version", "use_cache", "dtype"),
)
"""Other keys that may be there; they do not change the model."""

_FLOATS = ("F16", "BF16", "F32", "F64")


class PlainConfig:
    """The values of a config.json as attributes, as far as `foredraft.models.llama` and the drafters read them."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def get_text_config(self, decoder: bool = True) -> PlainConfig:
        """Itself: there are no other parts."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The values."""
        return dict(self.__dict__)


def plain_config(values: Mapping[str, Any]) -> PlainConfig | None:
    """The configuration in the values of a config.json; None where Transformers has to read them."""
    known = {*_STATED, *_FIXED, *_WITHOUT_EFFECT}
    if not values.keys() <= known or not {*_STATED, *_FIXED} <= values.keys():
        return None
    if any(type(values[key]) is not kind for key, kind in _STATED.items()):
        return None
    if any(values[key] not in allowed for key, allowed in _FIXED.items()) or not isinstance(values.get("dtype"), str | None):
        return None
    rope = values["rope_parameters"]
    is_default = rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default"
    return PlainConfig(values) if is_default and type(rope["rope_theta"]) is float else None


def plain_model(path: Path) -> PlainConfig | None:
    """`plain_config` of the model in a directory; None also where there is something else, or an adapter beside it."""
    try:
        values = read_json(path / "config.json")
    except ModelError:
        return None  # said by who reads it next
    return None if HEAD_KEY in values or any(path.glob("adapter_*")) else plain_config(values)


def expected(config: PlainConfig) -> dict[str, Tensor]:
    """Every tensor of a plain Llama, by name, without data."""
    return {name: torch.empty(size, device="meta") for name, size in _shapes(config).items()}


def _shapes(config: PlainConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor. No tensor is made of them before they are known to fit: sizes may be absurd."""
    shape: Any = config
    width, rows = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    shared, inner = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size
    layer = {
        **{"input_layernorm": (width,), "post_attention_layernorm": (width,)},
        **{"self_attn.q_proj": (rows, width), "self_attn.k_proj": (shared, width), "self_attn.v_proj": (shared, width)},
        **{"self_attn.o_proj": (width, rows), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)},
        "mlp.down_proj": (width, inner),
    }
    shapes = {"model.embed_tokens": (shape.vocab_size, width), "model.norm": (width,), "lm_head": (shape.vocab_size, width)}
    for i in range(shape.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    return {f"{name}.weight": size for name, size in shapes.items()}


def fits(config: PlainConfig, weights: Mapping[str, StoredTensor]) -> bool:
    """Whether a file holds exactly the tensors of a plain Llama, in floating point."""
    shape: Any = config
    if shape.num_hidden_layers != sum(name.endswith("mlp.down_proj.weight") for name in weights):
        return False  # before anything of that size is made
    wanted = _shapes(config)
    names = wanted.keys() - ({"lm_head.weight"} - weights.keys() if shape.tie_word_embeddings else set())
    return weights.keys() == names and all(
        tuple(one.shape) == wanted[name] and one.dtype_name in _FLOATS for name, one in weights.items()
    )
