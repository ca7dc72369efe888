"""What was measured, kept: calibrations of drafters, and times of this machine in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from foredraft.folders import cached_file, keep
from foredraft.protocols import Target

_NAME = "calibration.json"


def file_beside(model: Any) -> Path | None:
    """The calibration in a drafter's own directory; None where it has none that could be written to."""
    own = isinstance(model, str | Path) and Path(model).is_dir() and os.access(model, os.W_OK)
    return Path(model) / _NAME if own else None


def file_in_cache(weights: str | None, target: Target, drafter: str) -> Path | None:
    """The calibration of a drafter beside this target in the cache folder; None where there is no such folder.

    Args:
        weights: fingerprint of the drafter's.
    """
    config = getattr(target.config, "to_dict", dict)()
    key = hashlib.sha256(json.dumps([config, weights], sort_keys=True, default=str).encode()).hexdigest()[:20]
    return cached_file(f"calibration-{drafter}-{key}.json")


def read_calibration(model: Any, target: Target, drafter: str, weights: str | None) -> dict[str, Any]:
    """What `foredraft calibrate` found out about a drafter; nothing if it was not asked, or was asked about other weights in
    the same place. The user's cache goes first.

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
                raise ValueError(f"{path} is not valid JSON ({error}): measure it again or delete it") from None
            if found.get("weights", weights) == weights:
                return found
    return {}


def recalled(kind: str, facts: Any, measure: Callable[[], dict[str, Any]], *, anew: bool = False) -> dict[str, Any]:
    """What was measured before under equal `facts`; else what `measure` gives, kept for the next time.

    Args:
        anew: measure although something was kept, and replace it.
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
    """What figures were measured with."""
    import transformers

    import foredraft

    return {"foredraft": foredraft.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
