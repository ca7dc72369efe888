"""Reads the description of a draft head from config.json. Does not import torch, so a wrong method is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foredraft.core.errors import ModelError, told, unknown_name
from foredraft.heads import HEADS
from foredraft.models.files import HEAD_KEY, read_json


def method_of(folder: Path) -> str | None:
    """Returns the method of the head in a directory; None if the directory holds something else.

    Raises:
        ModelError: config.json is missing or cannot be read.
    """
    about = about_head(read_json(folder / "config.json"))
    return about["method"] if about else None


def about_head(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns ``method``, ``options`` and ``target`` of a head of this library from the content of config.json.

    Returns None if config.json describes something else.

    Raises:
        ModelError: the method is unknown, or a value has the wrong form.
    """
    if HEAD_KEY not in content:
        return None
    given = content[HEAD_KEY] if isinstance(content[HEAD_KEY], dict) else {}
    about = {"options": {}, "target": {}, **{key: value for key, value in given.items() if value is not None}}
    if about.get("method") not in list(HEADS):  # it may be unhashable
        raise ModelError(*told(unknown_name("method in config.json", str(about.get("method")), list(HEADS))))
    for key in ("options", "target"):
        if not isinstance(about[key], dict):
            raise ModelError(
                f"config.json gives {about[key]!r} as {key} of the head, but it must be an object", "copy it again"
            )
    layers = about["options"].get("feature_layers", [])
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ModelError(
            f"config.json gives {layers!r} as feature_layers, but it must be a list of whole numbers", "copy it again"
        )
    return about
