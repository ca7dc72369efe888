"""Converts a released checkpoint to a head of this library, and finds what is wrong with a head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foredraft.heads.folder import about_head, save_head
from foredraft.importers.layouts import LAYOUTS, OURS, Plan, plan
from foredraft.importers.reading import Finding, Found, lengthened, target_facts
from foredraft.importers.source import Source, open_source
from foredraft.importers.weights import assembled, inspect, shares_embedding
from foredraft.models.checkpoint import ModelError
from foredraft.models.loading import fingerprint_of
from foredraft.plan.store import versions


def convert(source: Path, model: str, out: Path, *, layout: str | None = None, force: bool = False) -> Plan:
    """Converts a released checkpoint to a head of this library. All weights keep their values and their dtype.

    Args:
        source: directory of the checkpoint.
        model: the target. Only its config.json and a few of its weights are read.
        out: directory in which the head is written.
        layout: a name in `LAYOUTS`; None: the layout is recognised.
        force: whether to write into a directory that is not empty.

    Returns:
        How the checkpoint was converted.

    Raises:
        ModelError: the checkpoint cannot be read, or it does not fit the target.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ModelError(f"{str(out)!r} already exists", "give another --out, or write into it with --force")
    if out.resolve() == (source.parent if source.is_file() else source).resolve():
        raise ModelError(f"{str(out)!r} holds the checkpoint to convert", "give another --out")
    opened, made = examine(source, model, layout)
    if made.layout == OURS:
        raise ModelError(f"{str(source)!r} already is a head of this library", "It needs no conversion")
    fatal = [finding for finding in made.findings if finding.fatal]
    if fatal:
        more = f" ({len(fatal) - 1} more: `foredraft doctor` lists them)" if len(fatal) > 1 else ""
        raise ModelError(
            f"cannot convert {str(source)!r}, {LAYOUTS[made.layout].says}: {fatal[0].what}", f"{fatal[0].do}{more}"
        )
    made.head.load_state_dict(assembled(opened, made), assign=True)
    facts, reading = target_facts(model), made.reading
    about = {
        "method": reading.method,
        "options": reading.options,
        "target": {"name": facts.name, "fingerprint": fingerprint_of(model)},
    }
    save_head(out, made.head, lengthened(reading.config, facts), about, _provenance(opened, made), as_given=True)
    return made


def examine(folder: Path, model: str | None, layout: str | None = None) -> tuple[Source, Plan]:
    """Reads a checkpoint, plans its conversion, and finds everything that is wrong with it.

    Args:
        folder: directory of the checkpoint.
        model: the target that the head should fit; None: the head is examined alone.
        layout: a name in `LAYOUTS`; None: the layout is recognised.

    Returns:
        The checkpoint, and the plan of its conversion with all findings.

    Raises:
        ModelError: the checkpoint cannot be read, or is not a draft head.
    """
    opened = open_source(folder)
    facts = None if model is None else target_facts(model)
    shared = None if model is None else shares_embedding(opened, model)
    made = plan(Found(opened.config, opened.shapes, facts, shared), layout)
    made.findings.extend(inspect(opened, made))
    return opened, made


def _provenance(source: Source, made: Plan) -> dict[str, Any]:
    return {
        "converted_from": made.layout,
        "files": source.hashes(),
        "options": made.reading.options,
        "zeros": sorted(made.reading.zeros),
        "findings": [finding.what for finding in made.findings],
        **versions(),
        "converted": time.strftime("%Y-%m-%d"),
    }


def as_it_stands(source: Source, made: Plan, model: str | None) -> list[Finding]:
    """Finds reasons why `LLM` cannot load the directory without a conversion: pickled weights, or another target's head."""
    if made.layout != OURS:
        pickled = [Finding("the weights are pickled, and `LLM` reads no pickles", "convert it", fatal=False)]
        return pickled if source.pickled else []
    its_target = (about_head(source.config) or {}).get("target", {})
    belongs = its_target.get("fingerprint")
    if source.pickled:
        return [Finding("the weights are pickled, and `LLM` reads no pickles", "save them as model.safetensors")]
    if model is None or belongs is None or belongs == fingerprint_of(model):
        return []
    name = its_target.get("name", "another model")
    return [Finding(f"it was trained for {name!r}, and this target has other weights", "give that target")]


def described(made: Plan) -> str:
    """Describes method, options and sizes in one line."""
    config, options = made.reading.config, made.reading.options
    listed = ", ".join(f"{name} {_plain(value)}" for name, value in options.items())
    count = sum(parameter.numel() for parameter in made.head.parameters())
    return (
        f"method {made.reading.method}{f' ({listed})' if listed else ''}, {count:,} parameters, width {config.hidden_size}, "
        f"{config.vocab_size} tokens"
    )


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def as_dict(made: Plan, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns a head and its problems as a JSON object."""
    return {
        "fits": not findings,
        "layout": made.layout,
        "method": made.reading.method,
        "options": made.reading.options,
        "parameters": sum(parameter.numel() for parameter in made.head.parameters()),
        "findings": [{"what": finding.what, "do": finding.do, "convertible": not finding.fatal} for finding in findings],
    }
