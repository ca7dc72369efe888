"""Layouts of recurrent heads: EAGLE, FSPAD, and EAGLE-3 in both of its forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foredraft.importers.reading import OTHER_TARGET, Finding, Findings, Found, Reading, TargetFacts, about_layer, read_layer

_EMBEDDING = "embed_tokens.weight"
_IDS = "eagle_aux_hidden_state_layer_ids"


def is_fspad(found: Found) -> bool:
    """Whether it is FSPAD: it has EAGLE's names, and FSPAD's input layer or doubled output."""
    return _has_feature_layer(found) and any(_fspad_parts(found).values())


def is_eagle(found: Found) -> bool:
    """Whether it is EAGLE-1 or EAGLE-2: a linear input layer and one decoder layer, without EAGLE-3's norms."""
    return _has_feature_layer(found) and not is_fspad(found)


def is_eagle3(found: Found) -> bool:
    """Whether it is EAGLE-3 as released: its layer has a norm for the feature."""
    has_wide_layer = any(name.startswith("midlayer.") or name.endswith(".hidden_norm.weight") for name in found.shapes)
    return has_wide_layer and not is_eagle3_speculators(found)


def is_eagle3_speculators(found: Found) -> bool:
    """Whether it is EAGLE-3 in the speculators format, whose config.json names the kind of head."""
    return found.config.get("speculators_model_type") == "eagle3"


def _has_feature_layer(found: Found) -> bool:
    return "layers.0.self_attn.q_proj.weight" in found.shapes and not is_eagle3(found)


def _fspad_parts(found: Found) -> dict[str, bool]:
    """Finds which of FSPAD's parts the checkpoint has, by its shapes. The names are the same as EAGLE's."""
    inputs = found.shapes["layers.0.self_attn.q_proj.weight"][-1]
    down = found.shapes.get("layers.0.mlp.down_proj.weight", (0,))
    return {"feature_sampling": "fc.fc.weight" in found.shapes, "partial_alignment": down[0] == 2 * inputs}


def read_feature_head(found: Found) -> Reading:
    """Reads EAGLE and FSPAD, whose tensors have the same names as ours. A missing bias of the input layer becomes zeros.

    Source: the released code of EAGLE (arXiv 2401.15077) and FSPAD (arXiv 2408.15562).
    """
    given = _unwrapped(found.config)
    parts = _fspad_parts(found) if _has_feature_layer(found) else {"feature_sampling": False, "partial_alignment": False}
    options: dict[str, Any] = dict(parts) if any(parts.values()) else {}
    reading = Reading("fspad" if options else "eagle", options, read_layer(given), theirs=lambda name: name)
    if "layers.0.self_attn.q_proj.bias" in found.shapes:
        options["qkv_bias"] = True
    reading.unused = {_EMBEDDING}
    reading.findings = about_layer(given)
    if found.shares_embedding is False:
        reading.findings.add("embed_tokens is not the target's embedding, but EAGLE and FSPAD share the target's", OTHER_TARGET)
    bias = "fc.fc.bias" if parts["feature_sampling"] else "fc.bias"
    if bias not in found.shapes:
        reading.zeros = {bias}
    if (bias in found.shapes) != given.get("bias", True):
        has, says = ("a", "false") if bias in found.shapes else ("no", str(given.get("bias", "nothing")).lower())
        reading.findings.add(
            f"the weights have {has} bias {bias!r}, but for bias config.json says {says} (the default is true)",
            f'write "bias": {"true" if bias in found.shapes else "false"} into config.json',
            fatal=bias in found.shapes,
        )
    return reading


def _unwrapped(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the layer's configuration, without vLLM's wrapper ``{"model_type": "eagle", "model": {...}}``."""
    inner = config.get("model")
    return inner if config.get("model_type") == "eagle" and isinstance(inner, dict) else config


def read_eagle3(found: Found) -> Reading:
    """Reads EAGLE-3 as released, and as SpecForge and ModelOpt write it.

    Source: the released code of EAGLE-3 (arXiv 2503.01840).
    """
    reading = _eagle3(found, found.config)
    if found.config.get("norm_output") is not None:
        reading.findings += _norm_output(found.config)
    return reading


def _norm_output(config: Mapping[str, Any]) -> list[Finding]:
    """Checks `norm_output`, which has two meanings.

    In SpecForge it is the norm before the output layer, which EAGLE-3 always has. Elsewhere it norms the carried feature.
    """
    if "LlamaForCausalLMEagle3" in (config.get("architectures") or ()) and config["norm_output"]:
        return []
    effect = "leaves out the norm before the output layer" if not config["norm_output"] else "has two possible meanings"
    return [
        Finding(
            f"norm_output is {config['norm_output']!r} outside the speculators format, which {effect}",
            "remove it from config.json if the norm is only before the output layer, and not on the carried feature",
        )
    ]


def read_eagle3_speculators(found: Found) -> Reading:
    """Reads EAGLE-3 in the speculators format, as vLLM does.

    Source: the speculators format, version 0.9.
    """
    config, given = found.config, found.config.get("transformer_layer_config")
    reading = _eagle3(found, given if isinstance(given, dict) else {})
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        if config.get(key):
            reading.options[key] = True
    if config.get("norm_before_fc") and config.get("fc_norm"):
        reading.findings.add("norm_before_fc and fc_norm exclude each other", "remove one of them from config.json")
    if config.get("norm_before_residual") is None:
        reading.findings.add(
            "config.json lacks norm_before_residual: the default is false in speculators and true in vLLM",
            "write the value with which it was trained into config.json",
        )
    return reading


def _eagle3(found: Found, given: Mapping[str, Any]) -> Reading:
    """Reads the parts that both EAGLE-3 formats share.

    Args:
        given: configuration of the head's layer.
    """
    config, shapes = found.config, found.shapes
    named = config.get("target_hidden_size")
    layer = read_layer(given, **({} if named in (None, given.get("hidden_size")) else {"target_hidden_size": named}))
    width = named or layer.hidden_size
    at = "midlayer" if any(name.startswith("midlayer.") for name in shapes) else "layers.0"
    attention = f"{at}.self_attn"
    count = max(1, shapes.get("fc.weight", (3 * width,))[-1] // width)
    ids, findings = _layer_ids(config, count, found.target)
    options: dict[str, Any] = {"feature_layers": ids}
    draft = config.get("draft_vocab_size") or layer.vocab_size
    if draft != layer.vocab_size:
        options["draft_vocab_size"] = draft
    unlike = found.target is not None and not found.shares_embedding
    has = {
        "own_embedding": _EMBEDDING in shapes and unlike and width == layer.hidden_size,  # a narrow head always has one
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "qkv_bias": f"{attention}.q_proj.bias" in shapes,
        "qk_norm": f"{attention}.q_norm.weight" in shapes or given.get("model_type") == "qwen3",
    }
    return Reading(
        "eagle3",
        options | {name: True for name, there in has.items() if there},
        layer,
        theirs=lambda name: name.replace("midlayer.", f"{at}."),
        zeros={"d2t"} if draft == layer.vocab_size and "d2t" not in shapes else set(),
        unused={"t2d", _EMBEDDING},
        findings=Findings([*about_layer(given), *findings]),
    )


def _layer_ids(config: Mapping[str, Any], count: int, target: TargetFacts | None) -> tuple[list[int], Findings]:
    """Finds the target's layers whose states are fused. Id i is the state after i layers (HF's ``hidden_states[i]``).

    Engines count differently. vLLM reads the ids at the top level in this way. SGLang reads the ids in ``eagle_config`` and
    adds 1 to each.

    Args:
        count: number of states that the head fuses.
    """
    inner = config.get("eagle_config") or {}
    given, within, found = config.get(_IDS), inner.get(_IDS), Findings()
    if given is None and within is not None:
        given = [layer + 1 for layer in within]
        found.add(
            f"the layers are only in eagle_config, as {within}: SGLang reads them as the states after {given} layers, "
            "vLLM does not read them",
            f'write "{_IDS}": {given} into config.json, outside eagle_config',
            fatal=False,
        )
    elif given is not None and within is not None and list(within) != [layer - 1 for layer in given]:
        found.add(
            f"{_IDS} is {list(given)}, and {list(within)} in eagle_config, where SGLang adds 1 to each: they name "
            "different layers",
            f"remove it from eagle_config, or write {[layer - 1 for layer in given]} there",
            fatal=False,
        )
    given = given if given is not None else inner.get("layer_ids")
    if target is None:
        return list(given or [0] * count), found
    size = target.num_layers
    usual = [2, size // 2, size - 3]
    ids = list(usual if given is None else given)
    if len(ids) != count or not all(0 <= layer <= size for layer in ids):
        found.add(
            f"the layers are {ids}: fc fuses {count} of them, and each must be from 0 to {size}, the target's layers",
            f"correct {_IDS} in config.json, or give the target for which it was trained",
        )
    elif ids == [layer - 1 for layer in usual]:
        found.add(
            f"the layers are {ids}, each one less than usual ({usual}): the ids may count from another layer",
            f"ask the author of the head whether the states after {usual} layers are meant",
            fatal=False,
        )
    return (ids + [0] * count)[:count], found
