"""Layouts of the heads that read the target's last feature (Medusa and Hydra), and of the heads of this library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import gcd
from typing import Any

from transformers import LlamaConfig

from foredraft.heads.folder import about_head
from foredraft.importers.reading import OTHER_TARGET, Finding, Found, Reading, new_layer
from foredraft.models.checkpoint import HEAD_KEY, ModelError

_HEADS_KEYS, _LAYERS_KEYS = ("num_heads", "medusa_num_heads"), ("num_hidden_layers", "medusa_num_layers")
_PREFIX = "prefix_embeding_layer"


def is_ours(found: Found) -> bool:
    """Whether it is a head of this library, by its config.json."""
    return HEAD_KEY in found.config


def read_ours(found: Found) -> Reading:
    """Reads a head of this library, as `foredraft.heads.folder` writes it.

    Raises:
        ModelError: config.json does not describe a head of this library.
    """
    about = about_head(found.config)
    if about is None:
        raise ModelError(f"config.json has no {HEAD_KEY!r}, so this is not a head of this library", "Give another --format")
    config = LlamaConfig(**{key: value for key, value in found.config.items() if key != HEAD_KEY})
    reading = Reading(about["method"], about["options"], config, theirs=lambda name: name)
    layers = reading.options.get("feature_layers", ())
    if found.target is not None and not all(-1 <= layer <= found.target.num_layers for layer in layers):
        reading.findings.add(
            f"feature_layers are {list(layers)}, but the target has {found.target.num_layers} layers", OTHER_TARGET
        )
    return reading


def is_medusa(found: Found) -> bool:
    """Whether it is Medusa as released: the names are numbers of heads and of layers."""
    return bool(_numbers(found.shapes, r"(\d+)\.\d+\.linear\.weight"))


def read_medusa(found: Found) -> Reading:
    """Reads Medusa as released: a list of heads, each of which is a list of one or more blocks and an output layer.

    If the blocks of a head are one shared block, the checkpoint may hold it only once.

    Source: the released code of Medusa (arXiv 2401.10774).
    """
    num_heads = 1 + max(_numbers(found.shapes, r"(\d+)\.\d+\.linear\.weight"), default=-1)
    num_layers = max(_numbers(found.shapes, r"0\.(\d+)\.weight"), default=0)

    def theirs(name: str) -> str:
        head, layer, kind = _parts(name)
        if layer is None:
            return f"{head}.{num_layers}.{kind}"
        return _first_in(found.shapes, f"{head}.{layer}.linear.{kind}", f"{head}.0.linear.{kind}")

    return _medusa(found, theirs, num_heads, num_layers)


def is_medusa_vllm(found: Found) -> bool:
    """Whether it is Medusa with vLLM's names: ``blocks`` and their ``layers``."""
    return bool(_numbers(found.shapes, r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.\d+\.weight"))


def read_medusa_vllm(found: Found) -> Reading:
    """Reads Medusa with vLLM's names. One output layer may serve all heads, and may cover only some of the tokens.

    Source: vLLM's ``medusa.py``.
    """
    prefix = "medusa_heads." if any(name.startswith("medusa_heads.") for name in found.shapes) else ""
    blocks = rf"{re.escape(prefix)}blocks\.(\d+)\.layers\.(\d+)\.weight"
    num_heads = 1 + max(_numbers(found.shapes, blocks), default=-1)
    num_layers = 1 + max(_numbers(found.shapes, blocks, group=2), default=-1)
    one_for_all = f"{prefix}lm_head.weight", f"{prefix}lm_heads.0.weight"

    def theirs(name: str) -> str:
        if name == "token_map":
            return prefix + name
        head, layer, kind = _parts(name)
        if layer is not None:
            return f"{prefix}blocks.{head}.layers.{layer}.{kind}"
        own = f"{prefix}lm_heads.{head}.{kind}"
        return _first_in(found.shapes, own, *one_for_all) if found.config.get("original_lm_head") else own

    reading = _medusa(found, theirs, num_heads, num_layers)
    vocab = reading.config.vocab_size
    if (found.config.get("truncated_vocab_size") or vocab) < vocab:
        reading.options["draft_vocab_size"] = found.config["truncated_vocab_size"]
    else:
        reading.unused.add(f"{prefix}token_map")
    if found.config.get("logit_scale", 1.0) != 1.0:
        reading.findings.add(
            f"logit_scale is {found.config['logit_scale']}, but only 1 is supported", "choose another head for this target"
        )
    return reading


def _medusa(found: Found, theirs: Any, num_heads: int, num_layers: int) -> Reading:
    """Reads the parts that both Medusa layouts share. Missing biases of blocks become zeros."""
    options = {"num_heads": num_heads, "num_layers": num_layers}
    reading = Reading("medusa", options, _widths(found, theirs("lm_heads.0.weight")), theirs)
    biases = [f"blocks.{i}.{j}.linear.bias" for i in range(num_heads) for j in range(num_layers)]
    has_biases = any(theirs(name) in found.shapes for name in biases)
    has_key = found.config.get("medusa_fc_bias")
    if not has_biases and not has_key:
        reading.zeros = set(biases)
    meant_for_vllm = "medusa" in (found.config.get("model_type"), *(str(name)[:6].lower() for name in _architectures(found)))
    if has_biases and meant_for_vllm and not has_key:
        reading.findings.add(
            "the blocks have biases, but config.json lacks medusa_fc_bias, without which vLLM drops them",
            'write "medusa_fc_bias": true into config.json',
            fatal=False,
        )
    actual = "the weights have" if found.target is None else "the target's is"
    for key in ("hidden_size", "vocab_size"):
        if found.config.get(key, getattr(reading.config, key)) != getattr(reading.config, key):
            reading.findings.add(
                f"config.json says {key} {found.config[key]}, but {actual} {getattr(reading.config, key)}", OTHER_TARGET
            )
    reading.findings += _counts(found.config, _HEADS_KEYS, num_heads, "heads")
    reading.findings += _counts(found.config, _LAYERS_KEYS, num_layers, "layers in a head")
    stray = [
        key
        for key in found.config
        if "num" in key and ("heads" in key or "layers" in key) and key not in (*_HEADS_KEYS, *_LAYERS_KEYS)
    ]
    if stray and meant_for_vllm:
        reading.findings.add(
            f"config.json has {', '.join(stray)}, which vLLM takes for the number of Medusa's heads or layers",
            "remove it from config.json",
            fatal=False,
        )
    return reading


def _architectures(found: Found) -> list[Any]:
    return list(found.config.get("architectures") or ())


def is_hydra(found: Found) -> bool:
    """Whether it is Hydra or Hydra++, by the released names."""
    return any(name.startswith("hydra_mlp.") for name in found.shapes)


def read_hydra(found: Found) -> Reading:
    """Reads Hydra, and Hydra++ with its layer over the prefix.

    In Hydra++ a dropout precedes every block, so the blocks have odd numbers. The blocks after the first are one shared block,
    which the checkpoint may hold only once.

    Source: the released code of Hydra (arXiv 2402.05109).
    """
    shapes, config = found.shapes, found.config
    has_dropout = "hydra_mlp.0.1.res_connection.weight" in shapes
    step, first = (2, 1) if has_dropout else (1, 0)
    places = _numbers(shapes, r"hydra_mlp\.0\.(\d+)\.linear\.weight")
    num_layers = config.get("hydra_num_layers") or 1 + (max(places, default=first) - first) // step
    num_heads = 1 + max(_numbers(shapes, r"hydra_mlp\.(\d+)\."), default=-1)
    has_prefix = any(name.startswith(_PREFIX) for name in shapes)
    has_norms = any(f"{_PREFIX}.{name}.weight" in shapes for name in ("norm", "layers.0.input_layernorm"))
    output = "hydra_lm_head.{}.1." if has_dropout else "hydra_lm_head.{}."

    def theirs(name: str) -> str:
        if name.startswith("prefix_norm."):
            return f"{_PREFIX}.{name.removeprefix('prefix_')}"
        if name.startswith("prefix."):
            return f"{_PREFIX}.layers.0.{name.removeprefix('prefix.')}"
        head, layer, kind = _parts(name)
        if layer is None:
            return output.format(head) + kind
        part = name.split(".")[3]
        shared = [f"hydra_mlp.{head}.{first + step}.{part}.{kind}"] if layer > 1 else []
        return _first_in(shapes, f"hydra_mlp.{head}.{first + step * layer}.{part}.{kind}", *shared)

    options: dict[str, Any] = {"num_heads": num_heads, "num_layers": num_layers, "prefix_attention": has_prefix}
    options |= {"prefix_norms": True} if has_norms else {}
    options |= {"head_bias": True} if output.format(0) + "bias" in shapes else {}
    reading = Reading("hydra", options, _widths(found, output.format(0) + "weight", f"{_PREFIX}.layers.0."), theirs)
    reading.unused = {f"{_PREFIX}.embed_tokens.weight"}
    reading.findings += _counts(config, ("hydra_num_heads",), num_heads, "heads")
    for key, allowed in (
        ("grounded_heads", (True,)),
        ("hidden_state_offset", (0,)),
        ("hydra_head_arch", ("prefix-mlp",) if has_prefix else ("mlp",)),
    ):
        if config.get(key) is not None and config[key] not in allowed:
            reading.findings.add(
                f"{key} is {config[key]!r}, but these weights support only {allowed[0]!r}", "choose another head"
            )
    return reading


def _parts(name: str) -> tuple[int, int | None, str]:
    """Splits one of our names into the number of the head, the number of its block (None: output layer), and weight or bias."""
    parts = name.split(".")
    return int(parts[1]), int(parts[2]) if parts[0] == "blocks" else None, parts[-1]


def _numbers(names: Iterable[str], pattern: str, group: int = 1) -> set[int]:
    """Returns the numbers at the given group in all names that match the pattern."""
    matches = (re.match(pattern, name) for name in names)
    return {int(match[group]) for match in matches if match}


def _first_in(names: Mapping[str, Any], *wanted: str) -> str:
    """Returns the first wanted name that exists, or the first wanted name if none exists."""
    return next((name for name in wanted if name in names), wanted[0])


def _counts(config: Mapping[str, Any], keys: Iterable[str], count: int, what: str) -> list[Finding]:
    """Finds keys of config.json whose number differs from the weights."""
    return [
        Finding(f"config.json says {key} {config[key]}, but the weights have {count} {what}", "correct config.json")
        for key in keys
        if config.get(key) is not None and config[key] != count
    ]


def _widths(found: Found, output: str, layer: str = "") -> LlamaConfig:
    """Returns the configuration of the target's layer; without a target, widths derived from the shapes."""
    if found.target is not None:
        return LlamaConfig(**found.target.config.to_diff_dict())
    given = found.shapes.get(output, ())
    vocab, hidden = given if len(given) == 2 else (1, 1)
    query, key = (found.shapes.get(f"{layer}self_attn.{letter}_proj.weight", (hidden, hidden))[0] for letter in "qk")
    size = gcd(query, key)
    return new_layer(
        hidden_size=hidden,
        intermediate_size=found.shapes.get(f"{layer}mlp.gate_proj.weight", (4 * hidden,))[0],
        num_attention_heads=query // size,
        num_key_value_heads=key // size,
        head_dim=size,
        vocab_size=found.config.get("vocab_size") or vocab,
    )
