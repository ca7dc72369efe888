"""What is said of one name of another library, and the code of a checkpoint that `trust_remote_code` would run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOAD, SAMPLE, RUN, CHAT, DRAFT = "LLM", "SamplingParams", "generate", "chat", "speculative_config"
"""The functions and dictionaries that take arguments."""

Fits = Callable[[Any, Mapping[Any, Any]], bool]
"""Whether a value can be accepted, given all other arguments."""


@dataclass(frozen=True)
class Name:
    """The treatment of one name.

    Attributes:
        places: the places that take the name in the other library.
        library: the library that has the name.
        does: the effect of the name in that library. ``{code}`` is replaced by the result of `code_of` for the model.
        use: what to use here.
        command: what to use on the command line, if that differs.
        fits: the accepted values. None is always accepted.
        means: our own name for the same argument.
        ignored: whether the name is ignored, because it only tunes speed or memory.
    """

    places: tuple[str, ...]
    library: str
    does: str
    use: str = "Leave it out"
    command: str = ""
    fits: Fits | None = None
    means: str = ""
    ignored: bool = False

    def accepts(self, value: Any, given: Mapping[Any, Any]) -> bool:
        """Whether a value is accepted, given all other arguments."""
        if value is None or self.ignored:
            return True
        return self.fits(value, given) if self.fits else bool(self.means)


def remote_code(model: Any) -> list[str] | None:
    """Returns the Python files that a checkpoint would run; None if that is unknown because the model is on the Hub."""
    if not isinstance(model, str | Path):
        return []  # the bundled model, or a loaded one
    if not Path(model).is_dir():
        return None
    try:
        named = json.loads((Path(model) / "config.json").read_text()).get("auto_map", {}).values()
        classes = [name for entry in named for name in (entry if isinstance(entry, list) else [entry]) if name is not None]
        return sorted({f"{name.rsplit('.', 1)[0].rsplit('--', 1)[-1]}.py" for name in classes})
    except (OSError, ValueError, AttributeError, RecursionError):
        return []  # loading the model reports a broken file


def code_of(model: Any) -> str:
    """Describes in words the code of a checkpoint that `trust_remote_code` would run."""
    return ", ".join(remote_code(model) or ["Python files"]) + " of the checkpoint"
