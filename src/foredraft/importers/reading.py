"""The input and the result of reading a layout. A layout needs only names, shapes and config.json, and no data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from foredraft.heads.folder import layer_config
from foredraft.heads.layers import Shape
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
"""Keys of config.json that describe a head's layer."""

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
    "a list of numbers": lambda given: isinstance(given, list) and all(type(number) is int for number in given),
    "an object": lambda given: isinstance(given, dict),
}
"""Checks of the kinds of values that `_KINDS` asks of the keys of config.json."""

_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_LONGER = ("default", "linear", "llama3", "yarn")
"""Rotary scalings in which the rotation at a position does not depend on the longest position."""

OTHER_TARGET = "give the target for which it was trained"
_CONFIG_AGAIN = "copy config.json again from the weights' source"
_ANOTHER = "choose another head for this target, or train one with `foredraft train`"


class Finding(NamedTuple):
    """A fault of a checkpoint.

    Attributes:
        what: description of the fault.
        do: advice on how to correct it.
        fatal: whether the fault prevents a conversion.
    """

    what: str
    do: str
    fatal: bool = True


class Findings(list[Finding]):
    """Faults of a checkpoint."""

    def add(self, what: str, do: str, *, fatal: bool = True) -> None:
        """Adds a fault, see `Finding`."""
        self.append(Finding(what, do, fatal))


class TargetFacts(NamedTuple):
    """Facts about the target that a head must fit.

    Attributes:
        name: name of the target's directory.
        config: the target's widths and rotary positions, as the configuration of a head's layer.
        num_layers: number of the target's layers.
    """

    name: str
    config: LlamaConfig
    num_layers: int


def target_facts(source: Any) -> TargetFacts:
    """Reads the facts about a target from its config.json.

    Raises:
        ModelError: there is no such model.
    """
    config = read_config(resolve(source, None))
    text = config.get_text_config(decoder=True)
    return TargetFacts(Path(str(source)).name, layer_config(config, text.vocab_size), text.num_hidden_layers)


@dataclass(frozen=True)
class Found:
    """A checkpoint, as far as layouts read it.

    Attributes:
        config: content of its config.json.
        shapes: shape of each tensor, by name.
        target: facts about the target; None if no target is given.
        shares_embedding: whether its `embed_tokens` equals the target's embedding; None: unknown, or it has none.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    target: TargetFacts | None = None
    shares_embedding: bool | None = None


@dataclass
class Reading:
    """A checkpoint in the terms of this library.

    Attributes:
        method: name of the head's method.
        options: options of the head.
        config: configuration of the head's layer.
        theirs: translates our name of a tensor to the checkpoint's name.
        zeros: names (ours) of tensors that the checkpoint lacks and that become zero.
        unused: names (the checkpoint's) of tensors that the head does not need.
        findings: faults of the checkpoint.
    """

    method: str
    options: dict[str, Any]
    config: LlamaConfig
    theirs: Callable[[str], str]
    zeros: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    findings: Findings = field(default_factory=Findings)


def refuse_malformed(found: Found) -> None:
    """Refuses a checkpoint whose config.json has a value of the wrong kind, or that has an empty weight.

    Raises:
        ModelError: it is such a checkpoint.
    """
    nested = [found.config.get(key) for key in ("transformer_layer_config", "eagle_config", "model")]
    for config in [found.config, *(value for value in nested if isinstance(value, dict))]:
        for key, value in config.items():
            kind = next((kind for kind, keys in _KINDS.items() if key in keys), None)
            if value is not None and kind is not None and not _IS_OF_KIND[kind](value):
                raise ModelError(
                    f"config.json says {key} {value!r}, but it must be {kind}",
                    _CONFIG_AGAIN,
                )
    empty = [name for name, shape in found.shapes.items() if name.endswith(".weight") and (not shape or 0 in shape)]
    if empty:
        raise ModelError(f"{empty[0]} is empty", "copy the weights again")


def read_layer(given: Mapping[str, Any], **more: Any) -> LlamaConfig:
    """Reads the configuration of a head's layer from the content of config.json.

    Args:
        more: further keys of the configuration.

    Raises:
        ModelError: a width is missing or invalid.
    """
    missing = [key for key in _REQUIRED if given.get(key) is None]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}", _CONFIG_AGAIN)
    return new_layer(**{key: given[key] for key in _WIDTHS if given.get(key) is not None}, **more)


def new_layer(**keys: Any) -> LlamaConfig:
    """Makes the configuration of one Llama layer.

    Raises:
        ModelError: the keys contradict each other.
    """
    try:
        return LlamaConfig(**keys, num_hidden_layers=1, bos_token_id=None, eos_token_id=None)
    except Exception as error:
        raise ModelError(f"config.json is invalid ({one_line(error)})", _CONFIG_AGAIN) from None


def lengthened(config: LlamaConfig, target: TargetFacts) -> LlamaConfig:
    """Raises ``max_position_embeddings`` to the target's, in place. The rotation at each position does not change."""
    config.max_position_embeddings = max(config.max_position_embeddings, target.config.max_position_embeddings)
    return config


def rope_of(config: LlamaConfig) -> dict[str, Any]:
    """Returns the rotary parameters of a configuration, with Llama's as default."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(getattr(config, "rope_parameters", None) or {})}


def about_layer(given: Mapping[str, Any]) -> Findings:
    """Finds keys of config.json that ask for a layer that is not supported."""
    found = Findings()
    for key, allowed, supported in (
        ("hidden_act", ("silu", "swish"), "'silu'"),
        ("num_hidden_layers", (1,), "one layer"),
        ("mlp_bias", (False,), "false"),
        ("partial_rotary_factor", (1,), "1"),
    ):
        if given.get(key) is not None and given[key] not in allowed:
            found.add(f"{key} is {given[key]!r}, but only {supported} is supported", _ANOTHER)
    if "sliding_attention" in (given.get("layer_types") or ())[:1]:
        found.add("its layer attends to a sliding window, which is not supported", _ANOTHER)
    kind = rope_of(read_layer(given))["rope_type"]
    if kind not in _LONGER:
        found.add(f"rope_type is {kind!r}, but only {', '.join(_LONGER)} are supported", _ANOTHER)
    return found


def beside(config: LlamaConfig, target: TargetFacts) -> Findings:
    """Finds differences between the configuration of a head's layer and the target's."""
    found = Findings()
    if config.vocab_size != target.config.vocab_size:
        found.add(f"its vocabulary has {config.vocab_size} tokens, the target's {target.config.vocab_size}", OTHER_TARGET)
    width = Shape.of(config).features
    if width != target.config.hidden_size:
        found.add(f"it needs features of width {width}, the target's have {target.config.hidden_size}", OTHER_TARGET)
    mine, its = rope_of(config), rope_of(target.config)
    if mine["rope_theta"] != its["rope_theta"]:
        found.add(
            f"rope_theta is {mine['rope_theta']:g}, the target's is {its['rope_theta']:g}",
            "check that config.json belongs to the weights: most heads are trained with the target's rope_theta",
            fatal=False,
        )
    if config.max_position_embeddings < target.config.max_position_embeddings:
        found.add(
            f"max_position_embeddings is {config.max_position_embeddings}, the target's is "
            f"{target.config.max_position_embeddings}: nothing would be drafted after position "
            f"{config.max_position_embeddings}",
            "`foredraft convert` raises it; in a head of this library, raise it in config.json",
            fatal=False,
        )
    return found
