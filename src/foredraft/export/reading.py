"""What a layout is given of a checkpoint, and what it makes of it. Only names, shapes and config.json: no data is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from foredraft.drafters.folder import layer_config
from foredraft.drafters.layers import Shape
from foredraft.models.checkpoint import ModelError, one_line, read_config, resolve

_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "vocab_size",
)
"""Keys of config.json that say what a head's layer is."""

_KINDS = {
    "a number above 0": (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        *("max_position_embeddings", "target_hidden_size", "draft_vocab_size", "truncated_vocab_size"),
        *("num_heads", "num_hidden_layers", "medusa_num_heads", "medusa_num_layers", "hydra_num_heads", "hydra_num_layers"),
    ),
    "a list": ("architectures", "layer_types"),
    "a list of numbers": ("eagle_aux_hidden_state_layer_ids", "layer_ids"),
    "an object": ("transformer_layer_config", "eagle_config", "rope_scaling", "rope_parameters"),
}
_IS_OF_KIND: dict[str, Callable[[Any], bool]] = {
    "a number above 0": lambda given: type(given) is int and given > 0,
    "a list": lambda given: isinstance(given, list),
    "a list of numbers": lambda given: isinstance(given, list) and all(type(one) is int for one in given),
    "an object": lambda given: isinstance(given, dict),
}
"""What is read of config.json, and what it must be."""

_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_LONGER = ("default", "linear", "llama3", "yarn")
"""Rotary scalings under which a position's rotation does not depend on the longest one."""

_ANOTHER = "choose another head for this target, or train one with `foredraft train`"


class Finding(NamedTuple):
    """Something that is wrong with a checkpoint.

    Attributes:
        what: is wrong.
        do: to put it right.
        fatal: it cannot be converted.
    """

    what: str
    do: str
    fatal: bool = True


class TargetFacts(NamedTuple):
    """What a head must fit: the target's widths and rotary positions as those of a head's layer, and its layers."""

    name: str
    config: LlamaConfig
    num_layers: int


def target_facts(source: Any) -> TargetFacts:
    """The facts about a model that its config.json says.

    Raises:
        ModelError: there is no such model.
    """
    config = read_config(resolve(source, None))
    text = config.get_text_config(decoder=True)
    return TargetFacts(Path(str(source)).name, layer_config(config, text.vocab_size), text.num_hidden_layers)


@dataclass(frozen=True)
class Found:
    """A checkpoint as layouts see it.

    Attributes:
        target: None where none was named.
        shares_embedding: whether its `embed_tokens` are the target's; None: unknown, or it has none.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    target: TargetFacts | None = None
    shares_embedding: bool | None = None


@dataclass
class Reading:
    """A checkpoint in our terms.

    Attributes:
        config: of the head's layer.
        theirs: from our name of a tensor to theirs.
        zeros: ours that are zero, for the checkpoint has none of them.
        unused: theirs that no head needs.
    """

    method: str
    options: dict[str, Any]
    config: LlamaConfig
    theirs: Callable[[str], str]
    zeros: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)


def refuse_malformed(found: Found) -> None:
    """Raises `ModelError` where a key of config.json is not of its kind, or a weight has no entries."""
    nested = [found.config.get(key) for key in ("transformer_layer_config", "eagle_config", "model")]
    for config in [found.config, *(one for one in nested if isinstance(one, dict))]:
        for key, value in config.items():
            kind = next((kind for kind, keys in _KINDS.items() if key in keys), None)
            if value is not None and kind is not None and not _IS_OF_KIND[kind](value):
                raise ModelError(
                    f"config.json says {key} {value!r}, and it must be {kind}: copy it from where the weights come from"
                )
    empty = [name for name, shape in found.shapes.items() if name.endswith(".weight") and (not shape or 0 in shape)]
    if empty:
        raise ModelError(f"{empty[0]} has no entries: copy the weights again")


def read_layer(given: Mapping[str, Any], **more: Any) -> LlamaConfig:
    """The configuration of a head's layer that a config.json describes.

    Raises:
        ModelError: a width is missing or makes no sense.
    """
    missing = [key for key in _REQUIRED if given.get(key) is None]
    if missing:
        raise ModelError(f"config.json does not say {', '.join(missing)}: copy it from where the weights come from")
    return new_layer(**{key: given[key] for key in _WIDTHS if given.get(key) is not None}, **more)


def new_layer(**keys: Any) -> LlamaConfig:
    """One Llama layer.

    Raises:
        ModelError: the keys contradict each other.
    """
    try:
        return LlamaConfig(**keys, num_hidden_layers=1, bos_token_id=None, eos_token_id=None)
    except Exception as error:
        raise ModelError(f"config.json makes no sense ({one_line(error)}): copy it from where the weights come from") from None


def lengthened(config: LlamaConfig, target: TargetFacts) -> LlamaConfig:
    """The same layer, for texts as long as the target's: positions mean the same, there are only more."""
    config.max_position_embeddings = max(config.max_position_embeddings, target.config.max_position_embeddings)
    return config


def rope_of(config: LlamaConfig) -> dict[str, Any]:
    """Rotary positions; without any, Llama's."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def about_layer(given: Mapping[str, Any]) -> list[Finding]:
    """What a config.json asks of its layer that ours does not do."""
    found = []
    for key, allowed, said in (
        ("hidden_act", ("silu", "swish"), "'silu'"),
        ("num_hidden_layers", (1,), "one layer"),
        ("mlp_bias", (False,), "none"),
        ("partial_rotary_factor", (1,), "1"),
    ):
        if given.get(key) is not None and given[key] not in allowed:
            found.append(Finding(f"{key} is {given[key]!r}, supported is {said}", _ANOTHER))
    if "sliding_attention" in (given.get("layer_types") or ())[:1]:
        found.append(Finding("its layer attends to a sliding window, which is not supported", _ANOTHER))
    kind = rope_of(read_layer(given))["rope_type"]
    if kind not in _LONGER:
        found.append(Finding(f"rope_type is {kind!r}, supported are {', '.join(_LONGER)}", _ANOTHER))
    return found


def beside(config: LlamaConfig, target: TargetFacts) -> list[Finding]:
    """What the configuration of a layer says differently from the target's."""
    found = []
    if config.vocab_size != target.config.vocab_size:
        found.append(
            Finding(
                f"its vocabulary has {config.vocab_size} tokens, the target's {target.config.vocab_size}",
                "give the target that it was trained for",
            )
        )
    width = Shape.of(config).features
    if width != target.config.hidden_size:
        found.append(
            Finding(
                f"it is for features of width {width}, the target's have {target.config.hidden_size}",
                "give the target that it was trained for",
            )
        )
    mine, its = rope_of(config), rope_of(target.config)
    if mine["rope_theta"] != its["rope_theta"]:
        found.append(
            Finding(
                f"rope_theta is {mine['rope_theta']:g}, the target's is {its['rope_theta']:g}",
                "check that config.json is that of the weights: most heads are trained with the target's",
                fatal=False,
            )
        )
    if config.max_position_embeddings < target.config.max_position_embeddings:
        found.append(
            Finding(
                f"max_position_embeddings is {config.max_position_embeddings}, the target's is "
                f"{target.config.max_position_embeddings}, so that nothing would be drafted behind that",
                "`foredraft convert` raises it; in a head of this library raise it in config.json",
                fatal=False,
            )
        )
    return found
