"""Stored measurements: calibrations of drafters, and times of this machine in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from foredraft.core.contracts import Target
from foredraft.core.errors import UserError
from foredraft.core.folders import cached_file, keep

_NAME = "calibration.json"


def file_beside(model: Any) -> Path | None:
    """Returns the calibration file in a drafter's own directory; None if there is no writable directory."""
    own = isinstance(model, str | Path) and Path(model).is_dir() and os.access(model, os.W_OK)
    return Path(model) / _NAME if own else None


def file_in_cache(weights: str | None, target: Target, drafter: str) -> Path | None:
    """Returns the calibration file of a drafter and this target in the cache; None if there is no cache directory.

    Args:
        weights: fingerprint of the drafter's weights.
    """
    config = getattr(target.config, "to_dict", dict)()
    key = hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()[:20]
    return cached_file(f"calibration-{drafter}-{key}.json")


def read_calibration(model: Any, target: Target, drafter: str, weights: str | None) -> dict[str, Any]:
    """Reads the result of `foredraft calibrate` for a drafter. The user's cache takes precedence.

    Returns an empty dictionary if the drafter was not calibrated, or if the file belongs to other weights.

    Raises:
        ValueError: the file is not valid JSON.
    """
    files = [file_in_cache(weights, target, drafter)]
    files += [Path(model) / _NAME] if isinstance(model, str | Path) else []
    for path in files:
        if path is not None and path.is_file():
            try:
                found = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not valid JSON ({error})", "measure it again or delete it") from None
            if found.get("weights", weights) == weights:
                return found
    return {}


def recalled(kind: str, facts: Any, measure: Callable[[], dict[str, Any]], *, anew: bool = False) -> dict[str, Any]:
    """Returns the stored measurement for equal `facts`. If there is none, calls `measure` and stores its result.

    Args:
        anew: measure even if a result is stored, and replace that result.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]
    file = cached_file(f"{kind}-{key}.json")
    if file is None:
        return measure()
    try:
        if not anew:
            return json.loads(file.read_text())["found"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measure()
    with suppress(OSError):
        keep(file.name, json.dumps({"facts": facts, "found": found}, default=str, indent=1))
    return found


def versions() -> dict[str, str]:
    """Returns the versions of the libraries with which figures are measured."""
    import transformers

    import foredraft

    return {"foredraft": foredraft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
