"""``foredraft convert``: makes a released draft head one of this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foredraft.cli.options import Layout


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory of a released draft head, pickled or not.")],
    *,
    model: Annotated[str, typer.Option(help="Directory or Hub id of the target that the head was trained for.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    layout: Layout = None,
    force: Annotated[bool, typer.Option("--force", help="Write even if the directory is not empty.")] = False,
) -> None:
    """Convert a released EAGLE, EAGLE-3, FSPAD, Medusa or Hydra checkpoint to a head of this library."""
    from foredraft.cli import show
    from foredraft.importers.convert import convert as converted
    from foredraft.importers.convert import described
    from foredraft.importers.layouts import LAYOUTS

    made = converted(source, model, out, layout=layout, force=force)
    for finding in made.findings:
        show.say(f"note: {finding.what}", stderr=True)
    show.say(f"{out}: {LAYOUTS[made.layout].says}, now {described(made)}", stderr=True)
    show.say(f'use it as {{"method": "{made.reading.method}", "model": "{out}"}}', stderr=True)
