"""Checks the types and sizes in config.json before anything of these sizes is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from foredraft.models.rope import is_positive, refuse_bad_rope

DTYPES = ("float64", "float32", "float16", "bfloat16", "double", "float", "half")
"""Names of dtypes that a configuration may hold."""

_MOST_LEVELS = 16
"""Most levels of nesting in config.json. Real files have up to five."""

_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""Attentions that a configuration may name. The name is ignored: `foredraft.models.hf` chooses the attention."""

_OBJECTS = ("text_config", "vision_config", "audio_config", "decoder", "quantization_config", "rope_scaling", "rope_parameters")

_SIZES = (
    *("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "n_inner", "ffn_dim", "vocab_size", "max_position_embeddings", "n_positions", "n_ctx"),
)
_ABOVE_ZERO = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    *("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct"),
)

_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def refuse_nonsense(given: Mapping[str, Any]) -> None:
    """Refuses values of a wrong type in a config.json. A missing or null value is allowed, because it has a default.

    Raises:
        ValueError: a value is wrong. The message names its key and the allowed values.
    """
    levels = _levels(given)
    if levels > _MOST_LEVELS:
        raise ValueError(f"it is nested {levels} levels deep, but at most {_MOST_LEVELS} levels are allowed")
    for key in _OBJECTS:
        if not isinstance(given.get(key), dict | None):
            raise ValueError(f"{key} must be an object, got {given[key]!r}")
    texts = [given[key] for key in ("text_config", "decoder") if given.get(key)]
    for content in [given, *texts]:
        _refuse_values(content)


def _refuse_values(given: Mapping[str, Any]) -> None:
    for key in _SIZES:
        sizes = given.get(key)
        each = sizes if isinstance(sizes, list) and sizes else [sizes]  # some model types have one size for each layer
        if sizes is not None and not all(type(size) is int and size >= 1 for size in each):
            raise ValueError(f"{key} must be a whole number, at least 1, got {sizes!r}")
    for key in _ABOVE_ZERO:
        if given.get(key) is not None and not is_positive(given[key]):
            raise ValueError(f"{key} must be a number above 0, got {given[key]!r}")
    for key in ("dtype", "torch_dtype"):
        name = given.get(key)
        known = isinstance(name, str) and name.removeprefix("torch.") in (*DTYPES, "auto")
        if not known and not isinstance(name, dict | None):  # models of several parts hold one dtype for each
            raise ValueError(f"{key} must be one of {', '.join(DTYPES[:4])}, got {name!r}")
    for key in ("attn_implementation", "_attn_implementation"):
        name = given.get(key)
        if name is not None and (not isinstance(name, str) or name not in _ATTENTIONS):
            raise ValueError(f"{key} must be one of {', '.join(_ATTENTIONS)}, got {name!r}")


def refuse_bad_sizes(config: Any) -> None:
    """Refuses a configuration whose sizes are missing or do not fit together. Does not change it.

    Raises:
        ValueError: a size is wrong. The message names it and the allowed values.
    """
    text = config.get_text_config(decoder=True)
    values: dict[str, Any] = {key: getattr(text, key, None) for key in (*_SIZES, *_ABOVE_ZERO)}
    _refuse_values({key: value for key, value in values.items() if value is not None})
    missing = [key for key in _REQUIRED if values[key] is None]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        name = getattr(text, key, None)
        if name not in (None, "silu"):
            _refuse_activation(key, name)
    window = getattr(text, "sliding_window", None)
    if window and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window must be a whole number, at least 1, or null, got {window!r}")
    heads, shared = values["num_attention_heads"], values["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})")
    width = values["hidden_size"]
    if values["head_dim"] is None and isinstance(heads, int) and width % heads:
        raise ValueError(f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}) without head_dim")
    pad = getattr(text, "pad_token_id", None)
    if type(pad) is int and pad >= values["vocab_size"]:
        raise ValueError(f"pad_token_id ({pad}) must be below vocab_size ({values['vocab_size']})")
    refuse_bad_rope(text)


def _refuse_activation(key: str, name: Any) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"{key} is {name!r}, but must be one of {', '.join(sorted(ACT2FN))}")


def _levels(value: Any) -> int:
    """Returns the number of levels of nesting. Does not recurse."""
    level, inside = 0, [value]
    while inside:
        level += 1
        inside = [part for parent in inside for part in _parts(parent)]
    return level - 1


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
