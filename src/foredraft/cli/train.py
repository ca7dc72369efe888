"""``foredraft train``: trains a draft head for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from foredraft.cli.options import Device, Model, Plot, option

_LEARN, _TEXT = "Learning", "Text"


def _setting(panel: str, text: str, least: float | None = None, most: float | None = None) -> Any:
    return typer.Option(min=least, max=most, help=text, rich_help_panel=panel)


class TextOptions(NamedTuple):
    """The training text."""

    answers: Annotated[
        str,
        typer.Option(
            help="own: the target answers the last turn itself, and earlier answers in the files are context. "
            "given: the head learns from every answer in the files, which the target's chat template marks.",
            rich_help_panel=_TEXT,
        ),
    ] = "own"
    shards: Annotated[
        Path | None, option(_TEXT, "Directory of captured text, which runs can share; default: inside --out.")
    ] = None
    tokens: Annotated[int, _setting(_TEXT, "Answer tokens to capture.", 1)] = 500_000
    temperatures: Annotated[
        str | None, option(_TEXT, "Temperatures of the target's own answers, used in turn; default: 0,0.6,1.")
    ] = None
    max_len: Annotated[int, _setting(_TEXT, "Maximum tokens of prompt plus answer; longer chats are skipped.", 64)] = 512
    feature_layers: Annotated[str | None, option(_TEXT, "Additional layers whose features are captured: 2,4,5.")] = None
    keep_features: Annotated[
        bool, _setting(_TEXT, "Store the target's features in the shards, or recompute them in every batch.")
    ] = True


class LearnOptions(NamedTuple):
    """How the head learns; the fields are those of `foredraft.train.course.Settings`."""

    steps: Annotated[int, _setting(_LEARN, "Steps of the optimizer.", 1)] = 1000
    batch_tokens: Annotated[int, _setting(_LEARN, "Positions per batch.", 1)] = 8192
    accumulate: Annotated[int, _setting(_LEARN, "Batches per step.", 1)] = 1
    lr: Annotated[float | None, option(_LEARN, "Peak learning rate.")] = None
    warmup: Annotated[float, _setting(_LEARN, "Share of the steps that warm up.", 0, 1)] = 0.02
    schedule: Annotated[str, _setting(_LEARN, "Decay of the learning rate to 0: cosine or linear.")] = "cosine"
    optimizer: Annotated[
        str | None, option(_LEARN, "muon (adamw for all but inner matrices) or adamw; default: muon where bfloat16 is fast.")
    ] = None
    answer_share: Annotated[float, _setting(_LEARN, "Skip texts with a smaller share of answer tokens.", 0, 1)] = 0.125
    clip: Annotated[float, _setting(_LEARN, "Maximum norm of the gradient.", 0)] = 1.0
    evaluate_every: Annotated[int, _setting(_LEARN, "Steps between evaluations, and between checkpoints.", 1)] = 100
    patience: Annotated[int, _setting(_LEARN, "Stop after this many evaluations without a better loss; 0: never.", 0)] = 0
    bf16: Annotated[bool | None, option(_LEARN, "Dtype of matrix products; default: the faster here.", "--bf16/--fp32")] = None


def train(
    *,
    method: Annotated[str, typer.Option(help="Head: eagle, fspad, eagle3, medusa, hydra, parallel or ctc.")],
    out: Annotated[Path, typer.Option(help="Directory of the head. An interrupted run resumes from it.")],
    data: Annotated[list[Path], typer.Option(help="JSON Lines file of questions or chats; can be given several times.")],
    model: Model = None,
    set_option: Annotated[list[str] | None, option(None, "An option of the method.", "--set", metavar="NAME=VALUE")] = None,
    init: Annotated[Path | None, option(None, "Start from an existing head of the same method and sizes.")] = None,
    text: TextOptions,
    learn: LearnOptions,
    plot: Plot = None,
    seed: Annotated[int, typer.Option(help="Seed of text, initial weights, order and noise.")] = 0,
    device: Device = None,
) -> None:
    """Train a draft head for a model.

    The model's chat template renders each conversation, including system turns and tools.
    By default the model answers each conversation, and the head learns from these answers.
    Conversations that the template cannot render are counted and listed at the end.
    """
    from foredraft.cli import choices
    from foredraft.core import typed

    choices.check_head_method(method)
    layers = typed.numbers("--feature-layers", text.feature_layers, int) if text.feature_layers else []
    ways = None if text.temperatures is None else typed.numbers("--temperatures", text.temperatures)
    for temperature in ways or ():
        choices.check(None, None, {"temperature": temperature})
    choices.check_files("--data", data)
    options = typed.options(set_option or [])
    from foredraft.train.run import TrainChoice

    given = TrainChoice(
        method,
        model,
        data,
        out,
        options=options,
        init=init,
        answers=text.answers,
        shards=text.shards,
        num_tokens=text.tokens,
        temperatures=ways,
        max_len=text.max_len,
        feature_layers=layers,
        keep_features=text.keep_features,
        settings=choices.given(**learn._asdict()),
        device=device,
        seed=seed,
    )
    _run(given, plot)


def _run(given: Any, plot: Path | None) -> None:
    """Runs the training (`given` is a `TrainChoice`), says what it reached, and plots its losses."""
    from foredraft.cli import show
    from foredraft.core.plots import new_figure
    from foredraft.train.provenance import curves_of
    from foredraft.train.run import run
    from foredraft.train.shards import usage_lines
    from foredraft.train.workers import find_workers

    figure = new_figure(9.0, 3.4) if plot is not None else None  # fails before the training if matplotlib is missing
    workers = find_workers()
    try:
        done = run(given, workers)
    except KeyboardInterrupt:
        show.say(f"interrupted; the same command resumes from what {given.out} and the shards hold", stderr=True)
        raise
    if not workers.writes:
        return
    last = done.history[-1]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in last.items() if name not in ("step", "token_passes"))
    took = f"{done.step} steps, {done.token_passes} token passes, {done.seconds / 60:.1f} min"
    for line in (f"{given.out}: {took}; held out: {figures}", *usage_lines(given.shards_folder)):
        show.say(line, stderr=True)
    if figure is not None:
        curves_of(done, given.method, figure)
        figure.savefig(plot)
