"""Reads plain Llama checkpoints without Transformers, whose import takes longer than loading a small model.

A checkpoint is plain if its config.json states every relevant value and its weights have the standard names and shapes.
Transformers reads all others: a checkpoint that relies on a default, has an unknown key, or has other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foredraft.models.checkpoint import StoredTensor
from foredraft.models.files import HEAD_KEY, ModelError, read_json
from foredraft.models.sizes import DTYPES

_STATED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), int),
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "rope_parameters": dict,
}
"""Key that must be present -> the type of its value."""

_FIXED = {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}
"""Key that must be present -> its allowed values."""

_WITHOUT_EFFECT = (
    *("architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"),
    *("pretraining_tp", "transformers_version", "use_cache", "dtype"),
)
"""Keys that may be present and do not change the model."""

_FLOATS = ("F16", "BF16", "F32", "F64")


class PlainConfig:
    """A configuration with the values of a config.json as attributes."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:  # tells type checkers that values are attributes
        raise AttributeError(f"config.json gives no {name}")

    def get_text_config(self, decoder: bool = True) -> PlainConfig:
        """Returns this object, because a plain model has no other parts."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns the values as a dictionary."""
        return dict(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """The values: no default is left out, since none is known here."""
        return self.to_dict()


def plain_config(values: Mapping[str, Any]) -> PlainConfig | None:
    """Returns the configuration with the values of a config.json, or None if Transformers has to read them."""
    known = {*_STATED, *_FIXED, *_WITHOUT_EFFECT}
    if not values.keys() <= known or not {*_STATED, *_FIXED} <= values.keys():
        return None
    if any(type(values[key]) is not kind or (kind is int and values[key] < 1) for key, kind in _STATED.items()):
        return None
    if any(values[key] not in allowed for key, allowed in _FIXED.items()) or values.get("dtype") not in (None, *DTYPES):
        return None
    rope = values["rope_parameters"]
    is_default = rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default"
    return PlainConfig(values) if is_default and type(rope["rope_theta"]) is float else None


def plain_model(path: Path) -> PlainConfig | None:
    """Returns the `plain_config` of a directory. None also if it holds no model, or holds an adapter."""
    try:
        values = read_json(path / "config.json")
    except ModelError:
        return None  # the next reader reports it
    return None if HEAD_KEY in values or any(path.glob("adapter_*")) else plain_config(values)


def expected(config: PlainConfig) -> dict[str, Tensor]:
    """Returns every tensor of a plain Llama by name, without data."""
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
    """Returns whether a checkpoint holds exactly the tensors of a plain Llama, in floating point."""
    shape: Any = config
    if shape.num_hidden_layers != sum(name.endswith("mlp.down_proj.weight") for name in weights):
        return False  # before anything of that size is made
    wanted = _shapes(config)
    names = wanted.keys() - ({"lm_head.weight"} - weights.keys() if shape.tie_word_embeddings else set())
    return weights.keys() == names and all(
        tuple(tensor.shape) == wanted[name] and tensor.dtype_name in _FLOATS for name, tensor in weights.items()
    )
