"""Loads models with Transformers: empty models that a file is checked against, and models that run their own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from foredraft.core.errors import told
from foredraft.models.check import self_check
from foredraft.models.checkpoint import ModelError, Stored, one_line, quiet, some
from foredraft.models.hf import HFTarget
from foredraft.models.weights import check_unused, finite, refuse_no_floats, refuse_other_layers, refuse_other_sizes


def refuse_no_language_model(config: PretrainedConfig) -> None:
    """Refuses a model that does not generate text.

    Raises:
        ModelError: it is not a causal language model. The message names its type.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"model type {config.model_type!r} is not a causal language model", "choose a model that generates text"
        )


def empty_model(config: PretrainedConfig, weights: Mapping[str, Tensor | Stored]) -> PreTrainedModel:
    """Checks the number of layers, the dtypes and the total size of the file, then returns a model without data.

    Raises:
        ModelError: the file does not fit the configuration, or the configuration is invalid.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    refuse_other_layers(config.get_text_config(decoder=True), weights, ignored)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(
            f"Transformers cannot build a model from config.json ({one_line(error)})", "correct it or copy it again"
        ) from None
    expected = dict(model.named_parameters())
    refuse_no_floats(weights, expected)
    refuse_other_sizes(expected, weights)
    return model


def load_with_transformers(path: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads a model. Refuses missing tensors and other shapes, which Transformers would replace by random values.

    Raises:
        ModelError: Transformers cannot load it, or a tensor is missing or has another shape.
    """
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
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
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in info[kind])
        if names:
            raise ModelError(f"the checkpoint {what} {some(names)}", "copy it again, or check config.json")
    check_unused(info["unexpected_keys"], [name for name, _ in model.named_modules()])
    model.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone() if device.type == "cpu" else tensor.data  # without a copy the file stays mapped
    return model


def checked(model: PreTrainedModel, max_len: int | None) -> HFTarget:
    """Wraps a loaded model as a `Target`, after a check of its weights and a trial over a tree.

    Raises:
        ModelError: a weight is not finite, or the model cannot run over token trees.
    """
    for name, parameter in model.named_parameters():
        finite(name, parameter)
    try:
        target = HFTarget(model, max_len)
        self_check(target)
    except ValueError as error:
        message, hint = told(error)
        raise ModelError(one_line(message), hint) from None
    return target
