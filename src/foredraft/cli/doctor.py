"""``foredraft doctor``: describes this machine, or a draft head and its problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foredraft.cli.options import AsJson, Layout, option


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Directory of a draft head, released or from this library.", show_default=False),
    ] = None,
    *,
    model: Annotated[str | None, option(None, "Directory or Hub id of the head's target.")] = None,
    layout: Layout = None,
    as_json: AsJson = False,
) -> int:
    """Describe this machine, or a draft head and its problems.

    Without DIR: the instruction set, the threads, the limits of memory and arithmetic, and what would make this machine faster.
    With DIR, the exit code is 0 if there are no problems, else 1.
    """
    if folder is None:
        return _machine(as_json=as_json)
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


def _machine(*, as_json: bool) -> int:
    """Describes this machine. The measurements take about two seconds."""
    import torch

    from foredraft.bench.bandwidth import arithmetic_peak, read_bandwidth
    from foredraft.bench.machine import advice, machine
    from foredraft.cli import show
    from foredraft.kernels.sets import instruction_set, sets_here

    facts = machine(torch.device("cpu"))
    facts |= {"instruction_set": instruction_set(), "sets": sets_here(), "advice": advice()}
    facts["read_gb_per_s"] = round(read_bandwidth(torch.device("cpu")) / 1e9, 1)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    facts["gflops"] = {name: round(arithmetic_peak(dtype) / 1e9) for name, dtype in dtypes.items()}
    if as_json:
        print(json.dumps(facts))
        return 0
    show.say(f"processor: {facts['device']}, {facts['cores']} cores, {facts['threads']} threads")
    show.say(f"instruction set: {facts['instruction_set']} (here: {', '.join([*facts['sets'], 'torch'])})")
    show.say(f"memory: {facts['read_gb_per_s']} GB/s read")
    if any(facts["gflops"].values()):  # 0 if torch runs
        show.say("arithmetic: " + ", ".join(f"{gflops} GFLOPS in {name}" for name, gflops in facts["gflops"].items()))
    show.say(f"versions: Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}")
    for number, sentence in enumerate(facts["advice"], 1):
        show.say(f"{number}. {sentence}")
    return 0
