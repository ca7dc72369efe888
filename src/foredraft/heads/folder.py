"""The directory of a draft head: config.json, model.safetensors, provenance.json.

config.json is a Llama configuration of the head's layer. Its key ``foredraft`` holds the method, its options and the target
for which the head was trained. Weights shared with the target (embedding, output head) are not stored again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foredraft.core.contracts import Target
from foredraft.core.errors import UserError
from foredraft.core.setting import Setting
from foredraft.heads import HEADS
from foredraft.heads.about import about_head as about_head
from foredraft.heads.about import method_of as method_of
from foredraft.heads.layers import Shape
from foredraft.models.checkpoint import HEAD_KEY, ModelError, one_line, open_weights, read_json, resolve, some
from foredraft.models.plain import plain_config
from foredraft.models.sizes import refuse_bad_sizes, refuse_nonsense
from foredraft.models.weights import finite, refuse_no_floats


class LoadedHead(NamedTuple):
    """A head, the Llama configuration of its layer, and its description from config.json (see `about_head`)."""

    head: Any
    config: Any
    about: Mapping[str, Any]


def layer_config(target_config: Any, vocab_size: int, sizes: Mapping[str, int] | None = None) -> Any:
    """Builds the configuration of a head's layer for a target. The layer always uses rotary positions.

    Args:
        sizes: `hidden`, `intermediate`, `heads`, `kv_heads` and `head_dim`, each of which defaults to the target's value. If
            `hidden` differs from the target's, the defaults of the others scale in proportion, except `head_dim`.

    Raises:
        ValueError: a size is below 1, `head_dim` is odd, or `heads` is not a multiple of `kv_heads`.
    """
    text = target_config.get_text_config(decoder=True) if hasattr(target_config, "get_text_config") else target_config
    chosen = _sizes_of(text, sizes or {})
    other = {"target_hidden_size": text.hidden_size} if chosen["hidden"] != text.hidden_size else {}
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=chosen["hidden"],
        intermediate_size=chosen["intermediate"],
        num_hidden_layers=1,
        num_attention_heads=chosen["heads"],
        num_key_value_heads=chosen["kv_heads"],
        head_dim=chosen["head_dim"],
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-6,
        rope_parameters=_rope_of(text),
        max_position_embeddings=text.max_position_embeddings,
        vocab_size=vocab_size,
        bos_token_id=None,
        eos_token_id=None,
        **other,
    )


def _sizes_of(text: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Completes the given sizes of a head's layer with defaults from the target."""
    width, count = text.hidden_size, text.num_attention_heads
    group = count // (getattr(text, "num_key_value_heads", None) or count)
    hidden = sizes.get("hidden", width)
    head_dim = sizes.get("head_dim", getattr(text, "head_dim", None) or width // count)
    heads = sizes.get("heads", count if hidden == width else max(1, hidden // head_dim))
    chosen = {
        "hidden": hidden,
        "intermediate": (getattr(text, "intermediate_size", None) or 4 * width) * hidden // width,
        "heads": heads,
        "kv_heads": max(1, heads // group),
        "head_dim": head_dim,
        **sizes,
    }
    if min(chosen.values()) < 1 or chosen["head_dim"] % 2 or chosen["heads"] % chosen["kv_heads"]:
        given = ", ".join(f"{name} {value}" for name, value in chosen.items())
        raise UserError("sizes must be at least 1, head_dim even and heads a multiple of kv_heads", f"they would be {given}")
    return chosen


def _rope_of(config: Any) -> dict[str, Any]:
    """Returns the target's rotary parameters if they rotate whole attention heads, else Llama's defaults."""
    rope = getattr(config, "rope_parameters", None) or {}
    whole = rope.get("partial_rotary_factor", 1.0) == 1.0 and "rope_theta" in rope
    return dict(rope) if whole else {"rope_type": "default", "rope_theta": 10000.0}


def save_head(
    folder: Path,
    head: nn.Module,
    config: Any,
    about: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    *,
    as_given: bool = False,
) -> None:
    """Writes a head in bfloat16.

    Args:
        about: ``method``, ``options`` and ``target`` with its ``fingerprint``.
        provenance: a record of how the head was made.
        as_given: write each weight in its own dtype, without rounding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight if as_given else as_stored(weight) for name, weight in head.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    content = {**config.to_diff_dict(), "architectures": ["ForedraftHead"], HEAD_KEY: dict(about)}
    write_json(folder / "config.json", content)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors writes with access for the owner only
    if provenance is not None:
        write_json(folder / "provenance.json", provenance)


def as_stored(weight: Tensor) -> Tensor:
    """Converts a weight to the stored form: bfloat16 on the CPU. Integer weights keep their dtype."""
    return (weight.bfloat16() if weight.is_floating_point() else weight).contiguous().cpu()


def write_json(file: Path, content: Any) -> None:
    """Writes indented JSON."""
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def empty_head(method: str, options: Mapping[str, Any], config: Any) -> Any:
    """Builds a head on the meta device, without data.

    Raises:
        ModelError: the method does not have these options.
    """
    try:
        with torch.device("meta"):
            return HEADS[method].make(Shape.of(config), **options)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"method {method!r} cannot have options {dict(options)} ({error})", "copy config.json again") from None


def read_head(folder: Path, kinds: Sequence[str] | None = None) -> LoadedHead:
    """Reads the head in a directory, in float32.

    Args:
        kinds: accepted methods; None accepts any.

    Raises:
        ModelError: the directory holds no head, or the head has another method or is incomplete.
    """
    content = read_json(folder / "config.json")
    about = about_head(content)
    if about is None:
        raise ModelError(
            f"{str(folder)!r} holds no draft head of this library",
            "train one with `foredraft train`, or convert a released checkpoint with `foredraft convert`",
        )
    if kinds is not None and about["method"] not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise ModelError(
            f"the head in {str(folder)!r} has method {about['method']!r}, expected {expected}",
            "give the method of the head, or none",
        )
    config = _config_of(folder, content)
    head = empty_head(about["method"], about["options"], config)
    weights = open_weights(folder)
    wanted = head.state_dict()
    for problem, names in (
        ("lacks", sorted(set(wanted) - set(weights))),
        ("has unexpected tensors", sorted(set(weights) - set(wanted))),
        (
            "has wrong shapes for",
            sorted(name for name in wanted if name in weights and weights[name].shape != wanted[name].shape),
        ),
    ):
        if names:
            raise ModelError(f"the head in {str(folder)!r} {problem} {some(names)}", "`foredraft doctor` reports details")
    refuse_no_floats(weights, [name for name, weight in wanted.items() if weight.is_floating_point()])
    read = {name: finite(name, stored.read()).clone() for name, stored in weights.items()}  # copies survive changes of the file
    head.load_state_dict(read, assign=True)
    drafted = getattr(head, "token_ids", None)
    if drafted is not None and not bool(((drafted >= 0) & (drafted < config.vocab_size)).all()):
        raise ModelError(
            f"the head in {str(folder)!r} drafts tokens outside its vocabulary", "`foredraft doctor` reports details"
        )
    return LoadedHead(head.float().eval().requires_grad_(False), config, about)


def _config_of(folder: Path, content: Mapping[str, Any]) -> Any:
    given = {key: value for key, value in content.items() if key != HEAD_KEY}
    try:
        refuse_nonsense(given)
        config = plain_config(given) or _llama_config(given)
        refuse_bad_sizes(config)
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
        raise ModelError(
            f"config.json of the head in {str(folder)!r} is not valid: {one_line(error)}", "copy it again"
        ) from None
    return config


def _llama_config(values: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**values)


def load_head(setting: Setting, *, also: Sequence[str] = (), force: bool = False) -> LoadedHead:
    """Loads the head of a speculative config, in the target's dtype and on its device.

    Args:
        also: further methods whose heads are accepted.
        force: accept a head that was trained for another target.

    Raises:
        ModelError: there is no head, it does not fit the target's widths, or it was trained for another target.
    """
    if setting.model is None:
        raise ModelError(
            f"method {setting.method!r} needs a trained head",
            "give its directory as 'model' (--draft-model), or train one (`foredraft train`)",
        )
    target, loaded = setting.target, read_head(resolve(setting.model, None), (setting.method, *also))
    _refuse_misfit(loaded, target)
    belongs = loaded.about["target"].get("fingerprint")
    if not force and belongs is not None and belongs != setting.fingerprint():
        name = loaded.about["target"].get("name", "another model")
        raise ModelError(
            f"the head in {str(setting.model)!r} was trained for {name!r}, and this target has other weights",
            "give that target, or accept the head with --force (config key 'force')",
        )
    head = loaded.head.to(target.device, target.dtype)
    for part, tensor in head.state_dict().items():
        finite(part, tensor)
    return loaded._replace(head=head)


def _refuse_misfit(loaded: LoadedHead, target: Target) -> None:
    """Raises `ModelError` if a head does not fit the target's widths or number of layers."""
    hidden, vocab = target.embed(torch.zeros(1, dtype=torch.long, device=target.device)).shape[-1], target.vocab_size
    shape, layers = Shape.of(loaded.config), target.config.get_text_config(decoder=True).num_hidden_layers
    if (shape.features, shape.vocab) != (hidden, vocab):
        raise ModelError(
            f"the head needs a target of width {shape.features} with {shape.vocab} tokens, but this target has width {hidden} "
            f"and {vocab} tokens",
            "give the target for which the head was trained",
        )
    if not all(-1 <= layer <= layers for layer in loaded.head.feature_layers):
        raise ModelError(
            f"the head reads features after layers {list(loaded.head.feature_layers)}, but this target has {layers} layers",
            "give the target for which the head was trained",
        )
