"""Loads a target from a directory, a Hub id or a loaded model.

Weights are read from safetensors only, and code of a checkpoint is never run. Every fault raises a `ModelError` of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foredraft.core.contracts import Target
from foredraft.core.errors import told, unknown_name
from foredraft.kernels import kernels
from foredraft.kernels.quantized import Quantized
from foredraft.models.check import refuse_unsupported
from foredraft.models.checkpoint import ModelError as ModelError
from foredraft.models.checkpoint import Stored, fingerprint, one_line, open_weights, read_config, resolve, some
from foredraft.models.files import DTYPES, FULL_INPUTS, is_loaded_model
from foredraft.models.generation import load_generation_config as load_generation_config
from foredraft.models.gguf import gguf_config, gguf_file, open_gguf
from foredraft.models.llama import LlamaTarget, unsupported
from foredraft.models.native import NativeTarget, can_run
from foredraft.models.packings import packing_of, unpacked_weights
from foredraft.models.plain import PlainConfig, expected, fits, plain_model
from foredraft.models.sizes import refuse_bad_sizes
from foredraft.models.tokenizer import load_tokenizer as load_tokenizer
from foredraft.models.weights import check_unused, is_float, refuse_no_floats, refuse_other_shapes

_DTYPES = {name: getattr(torch, name.replace("bf16", "bfloat16").replace("fp", "float")) for name in DTYPES}
_DEVICES = ("cpu", "cuda")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_target(
    source: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = "auto",
    revision: str | None = None,
    max_len: int | None = None,
    activations: str = FULL_INPUTS,
) -> Target:
    """Loads a model as a `Target`. The Llama family runs in our own decoder, other models run their Transformers code.

    The weights are read once and copied, so files that are overwritten later have no effect. The same holds for later changes
    of a loaded model of the Llama family. Any other loaded model is not copied: a change of its weights takes effect at the
    next forward.

    Args:
        source: a directory with config.json and safetensors, a Hub id, or a loaded `PreTrainedModel`. `HFTarget` lists the
            few changes to a loaded model.
        dtype: a `torch.dtype`, its name, or ``auto``, which keeps the dtype of the checkpoint.
        device: ``auto`` or None chooses CUDA if a device is available, else the CPU. A loaded model stays on its device.
        revision: branch, tag or commit. Allowed for a Hub id only.
        max_len: length in tokens of the longest text. It chooses the factors of LongRoPE, see
            `foredraft.models.rope.context_of`.
        activations: for weights of few bits, see `NativeTarget`.

    Raises:
        ModelError: a file is missing or corrupt, or the model cannot run over token trees.
        ValueError: the environment variable ``FOREDRAFT_KERNELS`` has an unknown value.
    """
    kernels()  # reports an unknown value even if no compiled code would run
    wanted, place = parse_dtype(dtype), _parse_device(device)
    if is_loaded_model(source):
        if revision is not None:
            raise ModelError(f"revision {revision!r} is for Hub ids only, but the model is loaded already", "leave it out")
        return _wrap_loaded(source, wanted, place, max_len)
    path = resolve(source, revision)
    file = gguf_file(path)
    place = place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if file is not None:
        return _load_gguf(file, wanted, place, max_len, activations)
    config = plain_model(path)
    if config is not None:
        weights = open_weights(path)
        if fits(config, weights):
            _refuse_sizes(config)
            return _llama(config, weights, wanted or _dtype_of(config, weights), place, max_len)
    return _load(path, wanted, place, max_len, activations)


def _load_gguf(file: Path, dtype: torch.dtype | None, device: torch.device, max_len: int | None, activations: str) -> Target:
    config = gguf_config(file)
    _refuse(config)
    _refuse_sizes(config)
    if unsupported(config) is not None:
        raise ModelError(
            f"{file.name} holds a model of type {config.model_type!r}, which does not run from a GGUF file",
            "give the checkpoint of Transformers",
        )
    return _llama(config, open_gguf(file), dtype or torch.bfloat16, device, max_len, activations)


def _load(path: Path, dtype: torch.dtype | None, device: torch.device, max_len: int | None, activations: str) -> Target:
    """Loads a model through Transformers, which reads its configuration and may run its code."""
    from foredraft.models.from_transformers import checked, empty_model, load_with_transformers, refuse_no_language_model

    config = read_config(path)
    packing = packing_of(config)
    _refuse(config)
    refuse_no_language_model(config)
    _refuse_sizes(config)
    weights: Mapping[str, Stored] = open_weights(path)
    dtype = dtype or _dtype_of(config, weights)
    if packing:
        weights = unpacked_weights(weights, packing)
        if unsupported(config) is not None:
            raise ModelError(
                f"quantised models of type {config.model_type!r} are not supported", "give the original in bfloat16 or float32"
            )
    if unsupported(config) is None:
        return _llama(config, weights, dtype, device, max_len, activations)
    empty_model(config, weights)
    return checked(load_with_transformers(path, config, dtype, device), max_len)


def fingerprint_of(source: Any, revision: str | None = None) -> str:
    """Returns the fingerprint of a model's weights, see `foredraft.models.checkpoint.fingerprint`.

    Raises:
        ModelError: the model does not exist.
    """
    if is_loaded_model(source):
        return fingerprint(source.state_dict())
    path = resolve(source, revision)
    file = gguf_file(path)
    return fingerprint(open_gguf(file) if file else open_weights(path))


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Returns the dtype of a name, or None for ``auto``.

    Raises:
        ModelError: the name is unknown, or the dtype is not supported.
    """
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype).removeprefix("torch."))
    if found not in _DTYPES.values():
        raise ModelError(*told(unknown_name("dtype", str(dtype), ["auto", *_DTYPES])))
    return found


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None or device == "auto":
        return None
    try:
        if not isinstance(device, str | torch.device):
            raise TypeError(f"it is a {type(device).__name__}")
        place = torch.device(device)
        if place.type not in _DEVICES:
            raise TypeError(f"models run on {' and '.join(_DEVICES)} only")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used ({one_line(error)})", "give auto, cpu, or a cuda device of this machine"
        ) from None
    return place


def _wrap_loaded(model: Any, dtype: torch.dtype | None, device: torch.device | None, max_len: int | None) -> Target:
    config = model.config
    _refuse(config)
    _refuse_sizes(config)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head", "load it with AutoModelForCausalLM")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError("the model is spread over several devices", "load it on one device, without device_map")
    kind: torch.dtype = dtype or model.dtype
    place: torch.device = device or _parse_device(model.device) or model.device
    if unsupported(config) is None:
        _refuse_changed(model)
        return _llama(config, model.state_dict(), kind, place, max_len)
    refuse_no_floats(dict(model.named_parameters()), dict(model.named_parameters()))
    if kind != model.dtype or place != model.device:
        raise ModelError(
            f"a loaded {type(model).__name__} is not moved or cast",
            f"it is in {model.dtype} on {model.device}, but the options ask for {kind} on {place}; load the model in that "
            "dtype on that device, or give its directory instead",
        )
    from foredraft.models.from_transformers import checked

    return checked(model, max_len)


def _refuse_changed(model: Any) -> None:
    """Refuses a loaded model whose code was changed, because our decoder reads its weights only."""
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the model"
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(f"{where} has forward hooks, which are not run here: remove them, or save the model without them")
        if type(module).__module__.split(".")[0] not in ("torch", "transformers"):
            raise ModelError(
                f"{where} is a {type(module).__name__} of {type(module).__module__}, whose code is not run here",
                "merge an adapter into the model (merge_and_unload of peft), or save the model with plain layers",
            )


def _refuse(config: Any) -> None:
    if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config(decoder=True))):
        raise ModelError("the checkpoint is quantised, which is not supported", "give a GGUF file, or the original in bfloat16")
    try:
        refuse_unsupported(config)
    except ValueError as error:
        raise ModelError(*told(error)) from None


def _refuse_sizes(config: Any) -> None:
    try:
        refuse_bad_sizes(config)
    except ValueError as error:
        raise ModelError(
            f"the configuration of the model is not valid: {error}", "correct config.json, or copy it again"
        ) from None


def _dtype_of(config: Any, weights: Mapping[str, Stored]) -> torch.dtype:
    """Returns the dtype in the configuration, else the dtype of the first floating-point tensor."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if stated is None:
        names = {"BF16": "bfloat16", "F16": "float16", "F64": "float64", "F32": "float32"}
        stated = next((names[stored.dtype_name] for stored in weights.values() if stored.dtype_name in names), "float32")
    return parse_dtype(stated) or torch.float32


def _llama(
    config: Any,
    weights: Mapping[str, Tensor | Stored],
    dtype: torch.dtype,
    device: torch.device,
    max_len: int | None,
    activations: str = FULL_INPUTS,
) -> LlamaTarget | NativeTarget:
    """Makes our decoder, compiled where that runs. First checks that every tensor exists and has the shape of config.json."""
    wanted = expected(config) if isinstance(config, PlainConfig) else _state_dict(config, weights)
    weights = _tied(weights) if config.tie_word_embeddings else weights
    missing = sorted(set(wanted) - set(weights) - ({_HEAD} if config.tie_word_embeddings else set()))
    if missing:
        raise ModelError(f"the checkpoint lacks {some(missing)}", "copy it again, or check config.json")
    wanted = {name: like for name, like in wanted.items() if name in weights}
    unused = [name for name, weight in weights.items() if name not in wanted and is_float(weight)]
    check_unused(unused, [f"model.layers.{i}" for i in range(config.num_hidden_layers)])
    refuse_other_shapes(wanted, weights)
    try:
        tensors = {name: weights[name] for name in wanted}
        if can_run(config, dtype, device):
            return NativeTarget(config, tensors, dtype, max_len=max_len, activations=activations)
        return LlamaTarget(config, tensors, dtype, device, max_len=max_len)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        message, hint = told(error)
        raise ModelError(f"cannot load the model: {one_line(message)}", hint) from None


def _state_dict(config: Any, weights: Mapping[str, Tensor | Stored]) -> dict[str, Tensor]:
    from foredraft.models.from_transformers import empty_model

    return empty_model(config, weights).state_dict()


def _tied(weights: Mapping[str, Tensor | Stored]) -> dict[str, Tensor | Stored]:
    """Drops a head that repeats the embedding. As in Transformers, a different head is kept, and a missing embedding is taken
    from the head."""
    kept = dict(weights)
    if _EMBEDDING not in kept and _HEAD in kept:
        kept[_EMBEDDING] = kept.pop(_HEAD)
    if _HEAD in kept and _EMBEDDING in kept and _is_equal(kept[_HEAD], kept[_EMBEDDING]):
        del kept[_HEAD]
    return kept


def _is_equal(first: Tensor | Stored, second: Tensor | Stored) -> bool:
    mine, theirs = (stored if isinstance(stored, Tensor) else stored.read() for stored in (first, second))
    if isinstance(mine, Quantized) and isinstance(theirs, Quantized):
        return mine.is_like(theirs) and torch.equal(mine.weight(), theirs.weight())
    return isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs)
