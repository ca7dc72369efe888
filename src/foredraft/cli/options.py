"""Options that several commands share, each declared once.

A named tuple is a group of options, which a command takes as one parameter, see ``foredraft.__main__.spread``. As in every
command, only functions import what takes long to load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

MODEL, DRAFT, SAMPLING, CHAT, SHOWN = "Model", "Drafting", "Sampling", "Chat template", "Output"
"""Titles of the panels of ``--help``."""


def option(panel: str | None, text: str, *names: str, **more: Any) -> Any:
    """Returns an option without a default in its help, shown in one of the panels. Without `names`, the parameter names it."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


def flag(panel: str | None, name: str, text: str) -> Any:
    """Returns an option that takes no value and has no opposite."""
    return typer.Option(name, help=text, rich_help_panel=panel)


def _checked(check: str) -> Callable[[Any], Any]:
    """Returns a callback that calls a function of `choices` on a value that is not None."""

    def callback(value: Any) -> Any:
        from foredraft.cli import choices

        return None if value is None else getattr(choices, check)(value)

    return callback


Model = Annotated[str | None, option(MODEL, "Directory or Hub id of the model; default: the bundled model.")]
Dtype = Annotated[
    str,
    option(MODEL, "auto (dtype of the checkpoint), bfloat16, float16, float32 or float64.", callback=_checked("check_dtype")),
]
Activations = Annotated[
    str,
    option(
        MODEL,
        "For weights of few bits: bf16 multiplies inputs as they are; int8 rounds them, which is faster and another function.",
        callback=_checked("check_activations"),
    ),
]
Device = Annotated[
    str | None,
    option(MODEL, "cpu, cuda, cuda:1, ...; default: CUDA if available, else the CPU.", callback=_checked("check_device")),
]
DraftModel = Annotated[str | None, option(DRAFT, "Directory or Hub id of the draft model, or directory of the head.")]
Method = Annotated[str | None, option(DRAFT, "Drafter: lm, lm-lookup, ngram, suffix, fspad, ...; auto; ar drafts nothing.")]
Tree = Annotated[str | None, option(DRAFT, "Tree policy, see `foredraft methods`; default: auto, which picks the fastest.")]
Budget = Annotated[str | None, option(DRAFT, "Nodes of the tree besides the root, 1 to 1024; default: auto.")]
Rule = Annotated[str | None, option(DRAFT, "Acceptance rule; default: the best exact rule for the tree.")]
Config = Annotated[str | None, option(DRAFT, "More keys of speculative_config, as JSON: '{\"draft_temperature\": 0.8}'.")]
Force = Annotated[bool, flag(DRAFT, "--force", "Accept a head that was trained for another target.")]
IgnoreEos = Annotated[bool, flag(SAMPLING, "--ignore-eos", "Continue after the end of sequence.")]
Seed = Annotated[int, option(SAMPLING, "Equal seeds give equal output; default: 0.")]
AsJson = Annotated[bool, flag(SHOWN, "--json", "Print JSON and nothing else.")]
ShowTree = Annotated[bool, option(SHOWN, "Draw the last tree and its accepted path.")]
GenerationConfig = Annotated[
    str,
    option(
        SAMPLING,
        "auto uses the model's generation_config.json, none ignores it; or a directory that holds one.",
        callback=_checked("check_generation_config"),
    ),
]

Prompts = Annotated[Path, typer.Option(help="A .jsonl (prompt, question, messages or turns) or .txt file.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the chat template to prompts.")]
ShareOfMass = Annotated[float, typer.Option(help="Keep the most likely tokens whose probabilities sum to this value.")]
Plot = Annotated[
    Path | None, option(None, "Write the plot to this .png or .svg file (needs matplotlib).", callback=_checked("check_plot"))
]
Layout = Annotated[str | None, option(None, "Layout; default: detected from the weights.", "--format")]


class ModelOptions(NamedTuple):
    """The target and how it is loaded; the fields are arguments of `LLM`."""

    model: Model = None
    dtype: Dtype = "auto"
    activations: Activations = "bf16"
    device: Device = None
    revision: Annotated[str | None, option(MODEL, "Branch, tag or commit of the Hub id.")] = None
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Directory or Hub id of another tokenizer.", rich_help_panel=MODEL)
    ] = None
    max_model_len: Annotated[
        int | None,
        option(
            MODEL, "Maximum tokens of prompt plus output; default: the model's context.", callback=_checked("check_model_len")
        ),
    ] = None


class TemplateOptions(NamedTuple):
    """What the chat template is given; `choices.template` reads it."""

    tools: Annotated[Path | None, option(CHAT, "JSON file with a list of functions that the model may call.")] = None
    chat_template: Annotated[
        str | None, option(CHAT, "A Jinja template or a file with one; default: the model's template.")
    ] = None
    chat_template_kwargs: Annotated[str | None, option(CHAT, "Variables for the template, as JSON.", metavar="JSON")] = None


class DraftOptions(NamedTuple):
    """The drafter, its tree and the rule."""

    method: Method = None
    draft_model: DraftModel = None
    tree: Tree = None
    budget: Budget = None
    rule: Rule = None
    speculative_config: Config = None
    force: Force = False
    retime: Annotated[bool, flag(DRAFT, "--retime", "Repeat the timing of drafters for the automatic choice.")] = False

    def config(self, model: str | None) -> dict[str, Any] | None:
        """Returns the speculative config, see `choices.speculative_config`. `model` is the target; None: the bundled one."""
        from foredraft.cli import choices

        return choices.speculative_config(
            model,
            self.method,
            self.draft_model,
            self.tree,
            self.budget,
            self.rule,
            extra=self.speculative_config,
            force=self.force,
            retime=self.retime,
        )


class SamplingOptions(NamedTuple):
    """The sampling parameters; the fields are arguments of `SamplingParams`."""

    temperature: Annotated[float | None, option(SAMPLING, "0 is greedy; default: set by the model (usually 1).")] = None
    top_p: Annotated[
        float | None, option(SAMPLING, "Keep the most likely tokens whose probabilities sum to this value, in (0, 1].")
    ] = None
    top_k: Annotated[int | None, option(SAMPLING, "Keep this many of the most likely tokens; 0 keeps all.")] = None
    min_p: Annotated[float | None, option(SAMPLING, "Drop tokens below this share of the largest probability.")] = None
    max_tokens: Annotated[int | None, option(SAMPLING, "Maximum tokens to generate; default: set by the model, else 256.")] = (
        None
    )
    stop: Annotated[list[str] | None, option(SAMPLING, "A string that ends the text; can be given several times.")] = None
    ignore_eos: IgnoreEos = False
    seed: Seed = 0
