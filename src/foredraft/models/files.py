"""Small files of a checkpoint, and how their faults are said. Loads no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foredraft.errors import ModelError

HEAD_KEY = "foredraft"
"""Under which key of config.json a draft head of this library says what it is."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: the file is missing, or is not a JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{str(path.parent)!r} holds no {path.name}: give the directory of a Transformers checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is not JSON ({one_line(error)}): copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{str(path)!r} must be a JSON object, got a {type(content).__name__}: copy it again")
    return content


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 2} more tensors" if len(names) > 2 else ""
    return ", ".join(repr(name) for name in names[:2]) + more


def one_line(error: BaseException) -> str:
    """The first line of a message that others wrote, kept short; with the second one where the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said[:400].rstrip(".:")


def is_loaded_model(source: Any) -> bool:
    """Whether it is a `PreTrainedModel`. Where Transformers' models are not imported, nothing is, and they are not now."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(source, module.PreTrainedModel)
