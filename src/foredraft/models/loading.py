"""From a directory, a Hub id or a loaded model to a target, its tokenizer and its defaults for sampling.

Only safetensors are read, and no code of a checkpoint is ever run. Whatever is wrong is one `ModelError` of one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from foredraft.compiled import kernels
from foredraft.errors import unknown_name
from foredraft.models.check import refuse_unsupported, self_check
from foredraft.models.checkpoint import ModelError as ModelError
from foredraft.models.checkpoint import StoredTensor, fingerprint, one_line, open_weights, read_config, read_json, resolve, some
from foredraft.models.hf import HFTarget
from foredraft.models.llama import LlamaTarget, unsupported
from foredraft.models.native import NativeTarget, can_run
from foredraft.protocols import Target

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
}

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What vLLM takes from generation_config.json as defaults; like vLLM, we do not look at ``do_sample``."""


def load_target(
    source: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = "auto",
    revision: str | None = None,
) -> Target:
    """Loads a model behind the `Target` contract: the Llama family runs our own decoder, others their Transformers code.

    Args:
        source: a directory with config.json and safetensors, a Hub id, or a loaded `PreTrainedModel`, which is not changed
            beyond what `HFTarget` says.
        dtype: a `torch.dtype`, its name, or ``auto``: the checkpoint's.
        device: ``auto`` or None is CUDA where there is a device, else the CPU (for a loaded model: where it is).
        revision: branch, tag or commit, of a Hub id only.

    Raises:
        ModelError: anything is missing, corrupt, or cannot run over token trees.
        ValueError: the environment variable ``FOREDRAFT_KERNELS`` has an unknown value.
    """
    kernels()  # an unknown value is said even where no compiled code would run
    wanted, place = parse_dtype(dtype), _parse_device(device)
    if isinstance(source, PreTrainedModel):
        return _wrap_loaded(source, wanted, place)
    path = resolve(source, revision)
    config = read_config(path)
    _refuse(config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model type {config.model_type!r} is no causal language model: choose one that generates text")
    place = place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = open_weights(path)
    if unsupported(config) is None:
        return _llama(config, weights, wanted or _dtype_of(config, weights), place)
    return _checked(_load_with_transformers(path, wanted or _dtype_of(config, weights), place))


def fingerprint_of(source: Any, revision: str | None = None) -> str:
    """The fingerprint of a model's weights, see `foredraft.models.checkpoint.fingerprint`.

    Raises:
        ModelError: there is no such model.
    """
    if isinstance(source, PreTrainedModel):
        return fingerprint(source.state_dict())
    return fingerprint(open_weights(resolve(source, revision)))


def load_tokenizer(source: Any, revision: str | None = None) -> Any:
    """The tokenizer beside a model; None if there is none, for then the model works on token ids.

    Raises:
        ModelError: there is one, and it cannot be read.
    """
    if isinstance(source, PreTrainedModel):
        source = getattr(source.config, "_name_or_path", "")
        if not (source and Path(source).is_dir()):
            return None
    path = resolve(source, revision)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer in {str(path)!r}: {one_line(error)}; copy its files again") from None


def load_generation_config(source: Any, revision: str | None = None) -> dict[str, Any]:
    """Defaults that come with a model, under the names of `SamplingParams`.

    Returns:
        ``eos_token_id``, a list of all ids that end an output (it may be empty), and those of temperature, top_k, top_p, min_p
        and repetition_penalty that ``generation_config.json`` gives.

    Raises:
        ModelError: a file is missing or is not JSON.
    """
    if isinstance(source, PreTrainedModel):
        given = source.generation_config.to_diff_dict() if source.generation_config else {}
        config = source.config.to_dict()
    else:
        path = resolve(source, revision)
        config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        given = read_json(generation) if generation.is_file() else {}
    ends = [given.get("eos_token_id"), config.get("eos_token_id"), (config.get("text_config") or {}).get("eos_token_id")]
    defaults: dict[str, Any] = {key: given[key] for key in _SAMPLING_KEYS if given.get(key) is not None}
    defaults["eos_token_id"] = list(dict.fromkeys(i for end in ends for i in _as_list(end)))
    return defaults


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype meant; None for ``auto``.

    Raises:
        ModelError: not one of the allowed names.
    """
    if dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype).removeprefix("torch."))
    if found not in _DTYPES.values():
        raise ModelError(str(unknown_name("dtype", str(dtype), ["auto", *_DTYPES])))
    return found


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None or device == "auto":
        return None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used ({one_line(error)}): give auto, cpu, or a cuda device of this machine"
        ) from None
    return place


def _wrap_loaded(model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | None) -> Target:
    config = model.config
    _refuse(config)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError("the model is spread over several devices: load it on one, without device_map")
    dtype, device = dtype or model.dtype, device or model.device
    if unsupported(config) is None:
        return _llama(config, model.state_dict(), dtype, device)
    if dtype != model.dtype or device != model.device:
        raise ModelError(
            f"a loaded {type(model).__name__} is not moved or cast: it is {model.dtype} on {model.device}, asked for was "
            f"{dtype} on {device}; load it so, or give its directory instead"
        )
    return _checked(model)


def _checked(model: PreTrainedModel) -> HFTarget:
    try:
        target = HFTarget(model)
        self_check(target)
    except ValueError as error:
        raise ModelError(one_line(error)) from None
    return target


def _refuse(config: PretrainedConfig) -> None:
    if getattr(config, "quantization_config", None):
        raise ModelError("the checkpoint is quantised, which is not supported: give the original in bfloat16 or float32")
    try:
        refuse_unsupported(config)
    except ValueError as error:
        raise ModelError(str(error)) from None


def _dtype_of(config: PretrainedConfig, weights: Mapping[str, StoredTensor]) -> torch.dtype:
    """What the configuration says, else what the first tensor of floating point is."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if stated is None:
        names = {"BF16": "bfloat16", "F16": "float16", "F64": "float64", "F32": "float32"}
        stated = next((names[one.dtype_name] for one in weights.values() if one.dtype_name in names), "float32")
    return parse_dtype(stated) or torch.float32


def _llama(
    config: PretrainedConfig, weights: Mapping[str, Tensor | StoredTensor], dtype: torch.dtype, device: torch.device
) -> LlamaTarget | NativeTarget:
    """Our decoder, the compiled one where it runs, after every tensor was found in the shape that config.json asks for."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    weights = _tied(weights) if config.tie_word_embeddings else weights
    missing = sorted(set(expected) - set(weights) - ({_HEAD} if config.tie_word_embeddings else set()))
    if missing:
        raise ModelError(f"the checkpoint lacks {some(missing)}: copy it again, or check config.json")
    expected = {name: like for name, like in expected.items() if name in weights}
    for name, like in expected.items():
        shape = tuple(weights[name].shape)
        if shape != tuple(like.shape):
            raise ModelError(
                f"the tensor {name!r} has shape {shape} where config.json asks for {tuple(like.shape)}: "
                "weights and configuration are not of the same model"
            )
    try:
        found = {name: _read(weights[name]) for name in expected}
        return NativeTarget(config, found) if can_run(config, dtype, device) else LlamaTarget(config, found, dtype, device)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load the model: {one_line(error)}") from None


def _tied(weights: Mapping[str, Tensor | StoredTensor]) -> dict[str, Tensor | StoredTensor]:
    """Weights without a head that repeats the embedding. Like Transformers, keeps a head that differs from it, and takes the
    head for an embedding that is missing."""
    kept = dict(weights)
    if _EMBEDDING not in kept and _HEAD in kept:
        kept[_EMBEDDING] = kept.pop(_HEAD)
    if _HEAD in kept and _EMBEDDING in kept and torch.equal(_read(kept[_HEAD]), _read(kept[_EMBEDDING])):
        del kept[_HEAD]
    return kept


def _read(stored: Tensor | StoredTensor) -> Tensor:
    return stored if isinstance(stored, Tensor) else stored.read()


def _load_with_transformers(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, after Transformers found every tensor with the right shape: left alone, it fills the gaps at random."""
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"Transformers cannot load {str(path)!r}: {one_line(error)}") from None
    model, info = loaded
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape than config.json asks for in")):
        names = sorted(one if isinstance(one, str) else one[0] for one in info[kind])
        if names:
            raise ModelError(f"the checkpoint {what} {some(names)}: copy it again, or check config.json")
    return model.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Transformers' report on the tensors and its progress bar off the terminal."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
