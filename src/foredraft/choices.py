"""What the options of the command line mean, checked before anything is loaded. Loads no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from foredraft.drafters import DRAFTERS
from foredraft.errors import unknown_name
from foredraft.params import SamplingParams
from foredraft.speculation import AUTO, drafter_for, parse, usual_config


@dataclass(frozen=True)
class ModelChoice:
    """Which target, in what form, where; see `LLM`."""

    model: str | None
    dtype: str
    device: str | None
    revision: str | None


@dataclass(frozen=True)
class Shown:
    """What is shown of a run.

    Attributes:
        chat: the prompt goes through the chat template.
    """

    chat: bool = False
    tree: bool = False
    json: bool = False


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave: neither None nor an empty list."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def speculative_config(
    model: str | None,
    method: str | None,
    draft_model: str | None,
    tree: str | None,
    budget: str | None,
    rule: str | None,
    *,
    extra: str | None = None,
    force: bool = False,
    retime: bool = False,
) -> dict[str, Any] | None:
    """The speculative config of the command line; None where nothing was said, which leaves the choice to `LLM`.

    Raises:
        ValueError: `extra` is not a JSON object, or the budget is no number.
    """
    if budget not in (None, AUTO) and not budget.lstrip("-").isdigit():
        raise ValueError(f"--budget must be a whole number or {AUTO}, got {budget!r}")
    nodes = int(budget) if budget not in (None, AUTO) else budget
    named = given(method=method, model=draft_model, tree=tree, num_speculative_tokens=nodes, rule=rule)
    config = {**_json_object(extra), **named, **({"force": True} if force else {})}
    again = {"retime": True} if retime else {}
    if not config:
        return again | {"method": AUTO if model is None else "suffix"} if again else None
    has_draft_model = model is None or "model" in config or "tree" in config
    return {"method": drafter_for(config.get("model")) if has_draft_model else "suffix", **config, **again}


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--speculative-config is not JSON ({error}). Example: '{{\"num_chains\": 2}}'") from None
    if not isinstance(found, dict):
        raise ValueError(f"--speculative-config must be a JSON object, got {text}. Example: '{{\"num_chains\": 2}}'")
    return found


USUAL_TREE = "dyspec"
"""The tree of an audit that names none."""


def with_usual_tree(config: dict[str, Any]) -> dict[str, Any]:
    """A speculative config in which neither tree nor rule is named, with the usual tree where its drafter grows trees."""
    row = DRAFTERS.get(config.get("method", ""))
    is_open = row is not None and not row.makes_own and not {"tree", "rule"} & set(config)
    return {**config, "tree": USUAL_TREE} if is_open else config


def check(model: str | None, config: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
    """Reports what is wrong with the options alone.

    Raises:
        ValueError: a value is out of range, or names do not fit together.
    """
    SamplingParams(**sampling)
    parse(usual_config(config, bundled=model is None))


def check_head_method(method: str) -> None:
    """Reports a method that trains no head.

    Raises:
        ValueError: no head of this name exists.
    """
    heads = [name for name, row in DRAFTERS.items() if row.weights == "head" and row.asks is None]
    if method not in heads:
        raise unknown_name("method", method, heads)
