"""The layouts in which draft heads are released. LAYOUTS says how each layout is recognised and read.

Before any data is read, all names and shapes of a checkpoint are compared with the head that it becomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from foredraft.core.errors import told, unknown_name
from foredraft.heads.folder import empty_head
from foredraft.importers import eagle, heads
from foredraft.importers.reading import Finding, Findings, Found, Reading, beside, refuse_malformed
from foredraft.models.checkpoint import ModelError

OURS = "foredraft"


class Layout(NamedTuple):
    """A layout of checkpoints.

    Attributes:
        says: description for the user.
        is_it: returns whether a checkpoint has this layout, by its config.json and the names and shapes of its tensors.
        read: translates a checkpoint to the terms of this library.
    """

    says: str
    is_it: Callable[[Found], bool]
    read: Callable[[Found], Reading]


LAYOUTS: dict[str, Layout] = {
    OURS: Layout("a head of this library", heads.is_ours, heads.read_ours),
    "eagle3-speculators": Layout(
        "EAGLE-3 in the speculators format", eagle.is_eagle3_speculators, eagle.read_eagle3_speculators
    ),
    "eagle3": Layout("EAGLE-3 as released (also SpecForge, ModelOpt)", eagle.is_eagle3, eagle.read_eagle3),
    "fspad": Layout("FSPAD as released, or one of its ablations", eagle.is_fspad, eagle.read_feature_head),
    "eagle": Layout("EAGLE-1 or EAGLE-2 as released", eagle.is_eagle, eagle.read_feature_head),
    "medusa-vllm": Layout("Medusa as vLLM names it", heads.is_medusa_vllm, heads.read_medusa_vllm),
    "medusa": Layout("Medusa as released", heads.is_medusa, heads.read_medusa),
    "hydra": Layout("Hydra or Hydra++ as released", heads.is_hydra, heads.read_hydra),
}


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a head.

    Attributes:
        layout: name in `LAYOUTS`.
        reading: the checkpoint in the terms of this library.
        head: the module of the head, without data.
        sources: maps the name of each of the head's tensors to a name in the checkpoint; None: the tensor is zero.
        findings: everything that is wrong.
    """

    layout: str
    reading: Reading
    head: nn.Module
    sources: Mapping[str, str | None]
    findings: list[Finding]


def recognise(found: Found) -> str:
    """Recognises the layout of a checkpoint.

    Raises:
        ModelError: the checkpoint has no known layout.
    """
    kind = found.config.get("speculators_model_type") or ("dflash" if "dflash_config" in found.config else "eagle3")
    if kind != "eagle3":
        raise ModelError(f"a head of type {kind!r} is not supported", f"give one of {', '.join(list(LAYOUTS)[1:])}")
    for name, layout in LAYOUTS.items():
        if layout.is_it(found):
            return name
    if any(name.startswith(("model.layers.", "transformer.h.")) for name in found.shapes):
        raise ModelError("this is a language model, not a draft head", "give it as draft model of method 'lm'")
    names = ", ".join(sorted(found.shapes)[:3])
    raise ModelError(
        f"this is not a draft head with a known layout ({', '.join(list(LAYOUTS)[1:])})",
        f"it has {len(found.shapes)} tensors, such as {names}",
    )


def plan(found: Found, layout: str | None = None) -> Plan:
    """Plans how a checkpoint becomes a head, and finds everything that is wrong with it.

    Args:
        layout: name of the layout; None: the layout is recognised.

    Raises:
        ModelError: the layout is unknown, or config.json lacks necessary facts.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ModelError(*told(unknown_name("format", layout, LAYOUTS)))
    refuse_malformed(found)
    layout = layout or recognise(found)
    reading = LAYOUTS[layout].read(found)
    head = empty_head(reading.method, reading.options, reading.config)
    sources = {name: None if name in reading.zeros else reading.theirs(name) for name in head.state_dict()}
    findings = compare(found, reading, head, sources) + reading.findings
    if found.target is not None:
        findings += beside(reading.config, found.target)
    return Plan(layout, reading, head, sources, findings)


def compare(found: Found, reading: Reading, head: nn.Module, sources: Mapping[str, str | None]) -> list[Finding]:
    """Finds tensors that are missing, unknown, or of another shape than the head's."""
    wanted = {
        theirs: tuple(tensor.shape)
        for tensor, theirs in zip(head.state_dict().values(), sources.values(), strict=True)
        if theirs
    }
    missing = [name for name in wanted if name not in found.shapes]
    unused = reading.unused | {name for name in found.shapes if name.endswith("rotary_emb.inv_freq")}
    more = [name for name in found.shapes if name not in wanted and name not in unused]
    findings = Findings()
    if missing:
        findings.add(f"tensors are missing: {_listed(missing)}", "copy the weights again, or give another --format")
    if more:
        findings.add(
            f"the head has tensors that are not supported: {_listed(more)}", "choose another head, or give another --format"
        )
    findings += [
        Finding(
            f"{name} has shape {_by(found.shapes[name])}, but must have {_by(shape)}",
            "check that config.json belongs to the weights, and that the head was trained for this target",
        )
        for name, shape in wanted.items()
        if name in found.shapes and tuple(found.shapes[name]) != shape
    ]
    return findings


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "of a single number"
