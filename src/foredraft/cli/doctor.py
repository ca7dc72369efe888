"""``foredraft doctor``: describes a draft head and lists its problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foredraft.cli.options import AsJson, Layout


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a draft head, released or from this library.")],
    *,
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of the head's target.", show_default=False)] = None,
    layout: Layout = None,
    as_json: AsJson = False,
) -> int:
    """Describe a draft head and list its problems. The exit code is 0 if there are none, else 1."""
    from foredraft.cli import show
    from foredraft.importers.convert import as_dict, as_it_stands, described, examine
    from foredraft.importers.layouts import LAYOUTS

    opened, made = examine(folder, model, layout)
    findings = made.findings + as_it_stands(opened, made, model)
    if as_json:
        print(json.dumps(as_dict(made, findings)))
        return 1 if findings else 0
    show.say(f"{folder}: {LAYOUTS[made.layout].says}; {described(made)}")
    for number, finding in enumerate(findings, 1):
        show.say(f"{number}. {finding.what}\n   to do: {finding.do}")
    compared = f" {model}" if model else "; give --model to compare it with its target too"
    show.say(f"does not fit: {len(findings)} to do" if findings else f"fits{compared}")
    return 1 if findings else 0
