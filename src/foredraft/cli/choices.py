"""Interprets the options of the command line and checks them before anything is loaded. Does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foredraft.core.arguments import config_with_our_names
from foredraft.core.chat import Template
from foredraft.core.errors import UserError, check_text, shown, unknown_name, whole_number, why_no_json
from foredraft.core.folders import is_file
from foredraft.core.params import MAX_COUNT, SamplingParams
from foredraft.drafters import DRAFTERS
from foredraft.models import files
from foredraft.plan.config import parse, usual_config, with_usual_method
from foredraft.plan.speculation import AUTO


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that the user gave, which are neither None nor an empty list."""
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
    """Builds the speculative config from the options. Returns None if no option was given, so that `LLM` chooses.

    Raises:
        ValueError: `extra` is not a JSON object, or the budget is not a number.
    """
    if budget not in (None, AUTO) and not re.fullmatch(r"-?[0-9]{1,4000}", budget):
        raise UserError(f"--budget must be a whole number or {AUTO}, got {shown(budget)}")
    nodes = int(budget) if budget not in (None, AUTO) else budget
    named = given(method=method, model=draft_model, tree=tree, num_speculative_tokens=nodes, rule=rule)
    config = {**_json_object(extra, "--speculative-config", '{"num_chains": 2}'), **named, **({"force": True} if force else {})}
    again = {"retime": True} if retime else {}
    if config:
        config = config_with_our_names(config, command=True)
    return {**with_usual_method(config, bundled=model is None), **again} if config or again else None


def _json_object(text: str | None, option: str, example: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} is not JSON ({why_no_json(error)})", f"Example: '{example}'") from None
    if not isinstance(found, dict):
        raise UserError(f"{option} must be a JSON object, got {shown(text)}", f"Example: '{example}'")
    return found


def template(tools: Path | None, chat_template: str | None, variables: str | None, *, chat: bool = True) -> Template:
    """Reads the options for the chat template, the fields of `foredraft.cli.options.TemplateOptions`.

    Args:
        chat: whether the chat template is applied.

    Raises:
        ValueError: a value is not valid JSON, or such an option is given although the chat template is not applied.
    """
    further = _json_object(variables, "--chat-template-kwargs", '{"enable_thinking": false}')
    found = given(tools=_tools(tools), chat_template=chat_template, chat_template_kwargs=further or None)
    if found and not chat:
        raise UserError(f"--{min(found).replace('_', '-')} only affects the chat template", "Add --chat to apply the template")
    return Template(**found)


def _tools(file: Path | None) -> list[Any] | None:
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--tools cannot be read ({why_no_json(error)})", "Give a file with a JSON list of function schemas"
        ) from None
    if not isinstance(found, list):
        raise UserError("--tools must be a file with a JSON list of function schemas", "Put a single schema into [ ]")
    return found


def check(model: str | None, config: dict[str, Any] | None, sampling: dict[str, Any]) -> None:
    """Checks the options without loading a model.

    Raises:
        ValueError: a value is out of range, or names cannot be combined.
    """
    SamplingParams(**sampling)
    parse(usual_config(config, bundled=model is None))


def check_prompt(prompt: str) -> None:
    """Checks the prompt of ``foredraft generate`` without loading a model.

    Raises:
        ValueError: it is empty or not valid text.
    """
    if not prompt:
        raise UserError("the prompt is empty", "give at least one character")
    check_text("the prompt", prompt)


def check_files(option: str, paths: Iterable[Path]) -> None:
    """Checks that files exist.

    Raises:
        ValueError: a file does not exist.
    """
    for file in paths:
        if not is_file(file):
            raise UserError(f"{option}: {shown(str(file))} is not a file", "Give the path of a file that exists")


def check_plot(file: Path) -> Path:
    """Returns the file of a plot unchanged.

    Raises:
        ValueError: it is neither a .png nor an .svg file.
    """
    if file.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"the file of a figure must end in .png or .svg, got {shown(str(file))}")
    return file


DTYPES = ("auto", *files.DTYPES)
"""Names of dtypes, as `foredraft.models.loading.parse_dtype` takes them."""


def check_dtype(name: str) -> str:
    """A name of a dtype, as it was given.

    Raises:
        ValueError: there is no such dtype.
    """
    if name.removeprefix("torch.") not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    return name


def check_activations(name: str) -> str:
    """A value of ``activations``, as it was given.

    Raises:
        ValueError: there is no such value.
    """
    if name not in files.ACTIVATIONS:
        raise unknown_name("activations", name, files.ACTIVATIONS)
    return name


def check_device(name: str) -> str:
    """Returns the name of a device unchanged.

    Raises:
        ValueError: models do not run on such a device. Whether the machine has it is checked when a model is loaded.
    """
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d{1,3})?", name):
        raise UserError(
            f"device {shown(name)} cannot be used (models run on cpu and cuda only)", "give auto, cpu, cuda or cuda:1"
        )
    return name


def check_model_len(length: int) -> int:
    """Returns the value of ``--max-model-len`` unchanged.

    Raises:
        ValueError: it is below 1, or too large.
    """
    return whole_number("max_model_len", length, 1, MAX_COUNT, "no model's context is longer")


def check_generation_config(choice: str) -> str:
    """Returns the value of ``--generation-config`` unchanged.

    Raises:
        ValueError: it is neither ``auto`` nor ``none`` nor a directory.
    """
    files.check_generation_config(choice)
    return choice


def check_head_method(method: str) -> None:
    """Checks that a method has a head that can be trained.

    Raises:
        ValueError: no head has this name.
    """
    heads = [name for name, row in DRAFTERS.items() if row.weights == "head" and row.asks is None]
    if method not in heads:
        raise unknown_name("method", method, heads)
