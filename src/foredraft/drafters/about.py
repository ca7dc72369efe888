"""What config.json says of a draft head. Loads no torch, so that a wrong method is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foredraft.drafters import DRAFTERS
from foredraft.errors import ModelError, unknown_name
from foredraft.models.files import HEAD_KEY, read_json


def method_of(folder: Path) -> str | None:
    """The method of the head in a directory; None where it holds something else.

    Raises:
        ModelError: there is no config.json that can be read.
    """
    about = about_head(read_json(folder / "config.json"))
    return about["method"] if about else None


def about_head(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of a head of this library: `method`, `options` and `target`; None where it is of something else.

    Raises:
        ModelError: it is of no known method, or not of this form.
    """
    if HEAD_KEY not in content:
        return None
    heads = [name for name, row in DRAFTERS.items() if row.weights == "head" and row.asks is None]
    given = content[HEAD_KEY] if isinstance(content[HEAD_KEY], dict) else {}
    about = {"options": {}, "target": {}, **{key: one for key, one in given.items() if one is not None}}
    if about.get("method") not in heads:
        raise ModelError(str(unknown_name("method in config.json", str(about.get("method")), heads)))
    for key in ("options", "target"):
        if not isinstance(about[key], dict):
            raise ModelError(f"config.json says {key} {about[key]!r} of the head, and it must be an object: copy it again")
    layers = about["options"].get("feature_layers", [])
    if not isinstance(layers, list) or not all(type(one) is int for one in layers):
        raise ModelError(f"config.json says feature_layers {layers!r}, and it must be a list of whole numbers: copy it again")
    return about
