"""Models as Transformers loads them: empty ones to compare a file with, and those that run their own code over trees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from foredraft.models.check import self_check
from foredraft.models.checkpoint import ModelError, StoredTensor, one_line, quiet, some
from foredraft.models.hf import HFTarget
from foredraft.models.weights import finite, refuse_no_floats, refuse_other_layers, refuse_other_sizes


def refuse_no_language_model(config: PretrainedConfig) -> None:
    """Raises for a model that generates no text.

    Raises:
        ModelError: names its type.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model type {config.model_type!r} is no causal language model: choose one that generates text")


def empty_model(config: PretrainedConfig, weights: Mapping[str, Tensor | StoredTensor]) -> PreTrainedModel:
    """A model of this configuration without data, after a look at the names, shapes and dtypes of the file."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ignored = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    refuse_other_layers(config.get_text_config(decoder=True), weights, ignored)
    try:
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(f"config.json makes no model ({one_line(error)}): correct it or copy it again") from None
    expected = dict(model.named_parameters())
    refuse_no_floats(weights, expected)
    refuse_other_sizes(expected, weights)
    return model


def load_with_transformers(path: Path, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, after Transformers found every tensor with the right shape: left alone, it fills the gaps at random."""
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
        names = sorted(one if isinstance(one, str) else one[0] for one in info[kind])
        if names:
            raise ModelError(f"the checkpoint {what} {some(names)}: copy it again, or check config.json")
    model.to(device)
    for one in (*model.parameters(), *model.buffers()):
        one.data = one.data.clone() if device.type == "cpu" else one.data  # the file stays mapped otherwise
    return model


def checked(model: PreTrainedModel, max_len: int | None) -> HFTarget:
    """A loaded model behind the contract, after a look at its weights and a trial over a tree.

    Raises:
        ModelError: a weight is not finite, or the model cannot run over trees.
    """
    for name, parameter in model.named_parameters():
        finite(name, parameter)
    try:
        target = HFTarget(model, max_len)
        self_check(target)
    except ValueError as error:
        raise ModelError(one_line(error)) from None
    return target
