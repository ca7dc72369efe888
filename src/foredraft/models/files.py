"""Reads the small files of a checkpoint and words their faults. Does not import torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from foredraft.core.errors import ModelError, shown
from foredraft.core.folders import is_file

GENERATION_CONFIG = "generation_config.json"
IGNORE = ("none", "vllm")
"""Values of ``generation_config`` that ignore the file. The second is vLLM's name."""

HEAD_KEY = "foredraft"
"""Key of config.json under which a draft head of this library stores its description."""


DTYPES = ("bfloat16", "bf16", "float16", "fp16", "half", "float32", "fp32", "float", "float64", "fp64", "double")
"""Names of the dtypes in which models run."""


ACTIVATIONS = FULL_INPUTS, ROUNDED_INPUTS = "bf16", "int8"
"""How the inputs of weights of few bits are multiplied: as they are, or rounded to eight bits. These are two functions."""


@runtime_checkable
class Stored(Protocol):
    """A weight in a file, of which the header is known. `read` loads it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        ...

    @property
    def dtype_name(self) -> str:
        """Name of the dtype in the file."""
        ...

    def read(self) -> Any:
        """Loads a tensor, or a `foredraft.kernels.quantized.Quantized`."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: the file is missing, or does not hold a JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{str(path.parent)!r} holds no {path.name}", "give the directory of a Transformers checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is not JSON ({one_line(error)})", "copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} must be a JSON object, got a {type(content).__name__}", "copy it again")
    return content


def check_generation_config(choice: Any) -> None:
    """Checks the argument ``generation_config`` of `LLM`.

    Raises:
        ModelError: it is neither ``auto`` nor ``none`` nor a directory with the file.
    """
    if isinstance(choice, str) and choice in ("auto", *IGNORE):
        return
    if not isinstance(choice, str | Path) or not is_file(Path(choice) / GENERATION_CONFIG):
        raise ModelError(
            f"generation_config must be 'auto', 'none' or a directory that holds {GENERATION_CONFIG}, got {shown(choice)}"
        )


def some(names: list[str]) -> str:
    """Returns the first two names of a list and the number of further ones, as text."""
    more = f" and {len(names) - 2} more tensors" if len(names) > 2 else ""
    return ", ".join(repr(name) for name in names[:2]) + more


def one_line(error: BaseException | str) -> str:
    """Returns the first line of an error message (and the second after a colon), cut to 400 characters."""
    lines = [text.strip() for text in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line[:400].rstrip(".:")


def is_loaded_model(source: Any) -> bool:
    """Returns whether `source` is a `PreTrainedModel`. Does not import Transformers: before that no such object exists."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(source, module.PreTrainedModel)
