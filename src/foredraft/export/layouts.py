"""LAYOUTS names every form in which draft heads are released, how it is told apart and what it becomes. A checkpoint is
compared with the head that it becomes, name by name and shape by shape, before any data is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from foredraft.drafters.folder import empty_head
from foredraft.errors import unknown_name
from foredraft.export import eagle, heads
from foredraft.export.reading import Finding, Found, Reading, beside, refuse_malformed
from foredraft.models.checkpoint import ModelError

OURS = "foredraft"


class Layout(NamedTuple):
    """A form of checkpoints.

    Attributes:
        says: what it is, for readers.
        is_it: whether a checkpoint is of it, by its config.json and the names and shapes of its tensors.
        read: the checkpoint in our terms.
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
    """What a checkpoint becomes.

    Attributes:
        layout: its name in `LAYOUTS`.
        head: the module, without data.
        sources: for each of its tensors, the name in the checkpoint; None: zeros.
        findings: what is wrong.
    """

    layout: str
    reading: Reading
    head: nn.Module
    sources: Mapping[str, str | None]
    findings: list[Finding]


def recognise(found: Found) -> str:
    """The layout of a checkpoint.

    Raises:
        ModelError: none of the table.
    """
    kind = found.config.get("speculators_model_type") or ("dflash" if "dflash_config" in found.config else "eagle3")
    if kind != "eagle3":
        raise ModelError(f"a head of type {kind!r} is not supported: give one of {', '.join(list(LAYOUTS)[1:])}")
    for name, layout in LAYOUTS.items():
        if layout.is_it(found):
            return name
    if any(name.startswith(("model.layers.", "transformer.h.")) for name in found.shapes):
        raise ModelError("this is a language model, no draft head: give it as draft model of method 'lm'")
    some = ", ".join(sorted(found.shapes)[:3])
    raise ModelError(
        f"this is no draft head in a form known here ({', '.join(list(LAYOUTS)[1:])}); it has {len(found.shapes)} tensors, "
        f"such as {some}"
    )


def plan(found: Found, layout: str | None = None) -> Plan:
    """What a checkpoint becomes, and what is wrong with it.

    Args:
        layout: its name; None: what it looks like.

    Raises:
        ModelError: it is of no known layout, or config.json does not say enough to tell.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ModelError(str(unknown_name("format", layout, LAYOUTS)))
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
    """Tensors that are missing, too many, or of another shape than the head's."""
    wanted = {
        theirs: tuple(one.shape) for one, theirs in zip(head.state_dict().values(), sources.values(), strict=True) if theirs
    }
    missing = [name for name in wanted if name not in found.shapes]
    unused = reading.unused | {name for name in found.shapes if name.endswith("rotary_emb.inv_freq")}
    more = [name for name in found.shapes if name not in wanted and name not in unused]
    findings = []
    if missing:
        findings.append(Finding(f"tensors are missing: {_listed(missing)}", "copy the weights again, or name another --format"))
    if more:
        findings.append(
            Finding(
                f"tensors are too many: {_listed(more)}",
                "the head has parts that are not supported; choose another, or name another --format",
            )
        )
    findings += [
        Finding(
            f"{name} has shape {_by(found.shapes[name])}, wanted is {_by(shape)}",
            "check that config.json is that of the weights, and that the target is the one it was trained for",
        )
        for name, shape in wanted.items()
        if name in found.shapes and tuple(found.shapes[name]) != shape
    ]
    return findings


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "of a single number"
