"""``foredraft train``: conversations -> answers and the target's features (shards) -> a head -> its directory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from foredraft.drafters.folder import layer_config, read_head, save_head
from foredraft.drafters.heads import FINAL, HEADS
from foredraft.drafters.layers import Shape
from foredraft.errors import unknown_name, whole_number
from foredraft.llm import BUNDLED_TARGET, LLM
from foredraft.models.checkpoint import fingerprint, resolve
from foredraft.models.loading import fingerprint_of
from foredraft.params import MAX_SEED
from foredraft.plots import new_figure
from foredraft.train.attention import tables
from foredraft.train.batches import collate, endless
from foredraft.train.corpus import ANSWERS, Corpus, read_corpus
from foredraft.train.frozen import Frozen
from foredraft.train.loop import Course, Progress, Settings, faster_in_bf16, train
from foredraft.train.provenance import curves_of, provenance
from foredraft.train.recipes import RECIPES, check
from foredraft.train.shards import Plan, Text, capture, usage_lines
from foredraft.train.start import FITTED_TOKENS, begin, token_counts
from foredraft.train.workers import Workers, find_workers

WRITERS = 128
"""Answers written at once."""

TEMPERATURES = (0.0, 0.6, 1.0)
"""Of the target's own answers, in turn, where none are given."""


@dataclass(frozen=True)
class TrainChoice:
    """What the command line asks for.

    Attributes:
        options: of the head and of its recipe, by name.
        init: directory of a head of the same method and sizes whose weights are begun with.
        answers: whose answers are learned from: ``own``, which the target writes to the prompts, or ``given``, which are those
            in the files.
        shards: folder of the captured texts; None is one in `out`.
        feature_layers: captured beside those that the head needs, so that several heads can share the shards.
        temperatures: of the target's own answers, in turn; None: `TEMPERATURES`.
        keep_features: in new shards; without them the model is run over every batch again, and shards are small.
    """

    method: str
    model: str | None
    data: Sequence[Path]
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    init: Path | None = None
    answers: str = "own"
    shards: Path | None = None
    num_tokens: int = 500_000
    temperatures: Sequence[float] | None = None
    max_len: int = 512
    feature_layers: Sequence[int] = ()
    keep_features: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    seed: int = 0


def run(choice: TrainChoice, workers: Workers | None = None) -> Progress:
    """Trains a head and writes its directory.

    Args:
        workers: the processes that share the work; None: this one alone.

    Raises:
        ValueError: something was asked for that cannot be; a `TrainingError` says what stands and how to go on.
    """
    # a random seed, -1, is not allowed: a run could not be resumed with it
    whole_number("--seed", choice.seed, 0, MAX_SEED // 2, "texts count on from it")
    _check(choice)
    source, workers = choice.model or BUNDLED_TARGET, workers or Workers()
    device = choice.device or workers.device
    llm = LLM(source, {"method": "ar"}, device=device, max_num_seqs=WRITERS, seed=choice.seed)
    settings = _settings(choice, workers, llm.target.device)
    if llm.tokenizer is None:
        raise ValueError("the target has no tokenizer, so that its data cannot be read: give a directory with one")
    if choice.answers == "given" and not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError("the target has no chat template to show which tokens are answers. Leave out --answers given")
    given = _split_options(choice.method, choice.options, llm.target)
    config = layer_config(llm.target.config, llm.target.vocab_size, given.sizes)
    shape = Shape.of(config)
    if shape.features != shape.hidden and given.recipe["regression"]:
        raise ValueError("a head that is not as wide as the target foretells no feature of it: leave out regression")
    torch.manual_seed(choice.seed)
    head = HEADS[choice.method].make(shape, **given.head).to(llm.target.device)
    layers = list(dict.fromkeys([*head.feature_layers, *FINAL]))
    init = _read_init(choice, head)
    texts = workers.one_first(lambda: captured(choice, llm, source, layers))  # one writes the shards, all read them
    learned = _learned(texts, settings.answer_share)
    frozen = Frozen(llm.target, shape.features)
    if init is not None:
        head.load_state_dict(init)
    else:
        _begin(head, frozen, learned, settings, llm.target)
    course = Course(
        head=head,
        recipe=RECIPES[choice.method],
        options=given.recipe,
        frozen=frozen,
        rotary=tables(config, llm.target.device),
        texts=learned,
        held_out=[one for one in texts if one.held_out],
        target=llm.target,
        facts={
            "method": choice.method,
            "target": fingerprint_of(source),
            "head_options": {**given.sizes, **given.head},
            "data": _names(choice),
            "answers": choice.answers,
            **({} if init is None else {"init": fingerprint(init)}),
        },
        workers=workers,
    )
    choice.out.mkdir(parents=True, exist_ok=True)
    done = train(course, settings, choice.out)
    if workers.writes:
        belongs = {"name": Path(str(source)).name, "fingerprint": course.facts["target"]}
        about = {"method": choice.method, "options": given.head, "target": belongs}
        save_head(choice.out, head, config, about, provenance(course, settings, done, head))
    return done


def _check(choice: TrainChoice) -> None:
    """Looks at the options that need no model.

    Raises:
        ValueError: one of them is unknown, or does not go with another.
    """
    if choice.method not in RECIPES:
        raise unknown_name("method", choice.method, list(RECIPES))
    if choice.answers not in ANSWERS:
        raise unknown_name("--answers", choice.answers, ANSWERS)
    if choice.answers == "given" and choice.temperatures is not None:
        raise ValueError("--temperatures are those of the target's own answers, and --answers given has none: leave one out")


def _begin(head: Any, frozen: Frozen, learned: Sequence[Text], settings: Settings, target: Any) -> None:
    """Gives a head its first weights, from the first batches that it will learn from."""
    few = islice(endless(learned, settings.batch_tokens, settings.seed), -(-FITTED_TOKENS // settings.batch_tokens))
    begin(head, frozen, token_counts(learned, target), [collate(one, head.feature_layers, target) for one in few])


def _read_init(choice: TrainChoice, head: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The weights to begin with; None where no head is named.

    Raises:
        ValueError: they are of a head of other sizes; a `ModelError` says what else is wrong with them.
    """
    if choice.init is None:
        return None
    weights = read_head(resolve(choice.init, None), (choice.method,)).head.state_dict()
    wanted = {name: one.shape for name, one in head.state_dict().items()}
    if {name: one.shape for name, one in weights.items()} != wanted:
        raise ValueError(
            f"the head in {str(choice.init)!r} has other sizes than the one that is asked for: give its own options (--set); "
            "its provenance.json names them"
        )
    return weights


def _settings(choice: TrainChoice, workers: Workers, device: torch.device) -> Settings:
    """The usual settings, but for those that are given."""
    usual = {"steps": 1000, "lr": RECIPES[choice.method].lr, "seed": choice.seed}
    if "bf16" not in choice.settings:
        usual["bf16"] = workers.count > 1 or faster_in_bf16(choice.out, device)
    return Settings(**{**usual, **choice.settings})


def _learned(texts: Sequence[Text], answer_share: float) -> list[Text]:
    """The texts to learn from; says how many are left out for their small share of answer."""
    found = [one for one in texts if not one.held_out and one.answer_share >= answer_share]
    if not found:
        raise ValueError(
            f"none of the {len(texts)} texts has an answer that is {answer_share:.1%} of it: give --answer-share 0"
        )
    if short := sum(not one.held_out for one in texts) - len(found):
        line = (
            f"{short:,} of {len(texts):,} texts are left out: less than {answer_share:.1%} of each is answer (--answer-share)"
        )
        Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)
    return found


def _say(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def captured(choice: TrainChoice, llm: LLM, source: Any, layers: Sequence[int]) -> list[Text]:
    """The texts to learn from, with the features of `layers`, written and captured as far as they are not there yet."""
    every = list(dict.fromkeys([*choice.feature_layers, *layers])) if choice.keep_features else []
    temperatures = (choice.temperatures or TEMPERATURES) if choice.answers == "own" else ()
    plan = Plan(temperatures, min(choice.max_len, llm.max_model_len), choice.num_tokens, every, choice.seed)
    about = {"target": fingerprint_of(source), "data": _names(choice), "answers": choice.answers}
    folder = _shards(choice)
    width = llm.target.config.hidden_size * len(every) * 2 + 4  # bytes of a token: bfloat16, and its id
    Console(stderr=True).print(f"shards in {folder}: about {1.6 * choice.num_tokens * width / 1e9:.2g} GB in all")

    def read(seed: int) -> Corpus:
        corpus = read_corpus(choice.data, llm.tokenizer, seed, answers=choice.answers, max_len=plan.max_len)
        for line in corpus.usage.lines():  # said at the end as well, which may be hours away
            _say(line)
        return corpus

    texts = capture(llm, read, plan, folder, about, layers)
    if every and texts and not texts[0].features:
        Console(stderr=True).print("they keep no features: the model is run over every batch; other --shards would keep them")
    return texts


def _shards(choice: TrainChoice) -> Path:
    return choice.shards or choice.out / "shards"


def _names(choice: TrainChoice) -> list[str]:
    return [file.name for file in choice.data]


class Options(NamedTuple):
    """Options of a run: sizes of the head's layer that are not the target's, of the head, of its recipe."""

    sizes: dict[str, Any]
    head: dict[str, Any]
    recipe: dict[str, Any]


def _split_options(method: str, given: Mapping[str, Any], target: Any) -> Options:
    """Whose the given options are.

    Raises:
        ValueError: nobody has an option of that name, or its value cannot be.
    """
    sizes = HEADS[method].sizes
    known = list(inspect.signature(HEADS[method].cls.__init__).parameters.values())[2:]
    of_head = {one.name: one.default for one in known if one.name not in HEADS[method].converted}
    recipe = RECIPES[method].options
    for name in given:
        if name not in (*sizes, *of_head, *recipe):
            raise unknown_name(f"option of method {method!r}:", name, [*sizes, *of_head, *recipe])
    usual = {name: value for name, value in of_head.items() if value not in (None, inspect.Parameter.empty)}
    head = {**usual, **HEADS[method].options, **{name: given[name] for name in of_head if name in given}}
    if "feature_layers" in of_head and "feature_layers" not in head:
        count = target.config.num_hidden_layers
        head["feature_layers"] = [2, count // 2, count - 3]  # the released EAGLE-3's
    learned = {**recipe, **{name: given[name] for name in recipe if name in given}}
    check(learned)
    return Options({name: given[name] for name in sizes if name in given}, head, learned)


def command(choice: TrainChoice, *, plot: Path | None = None) -> int:
    """``foredraft train``; returns the exit status."""
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must be a .png or .svg file, got {str(plot)!r}")
    figure = new_figure(9.0, 3.4) if plot is not None else None  # says now if it cannot be drawn
    workers = find_workers()
    done = run(choice, workers)
    if not workers.writes:
        return 0
    last = done.history[-1]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in last.items() if name not in ("step", "token_passes"))
    out.print(
        f"{choice.out}: {done.step} steps, {done.token_passes} token passes, {done.seconds / 60:.1f} min; held out: {figures}"
    )
    for line in usage_lines(_shards(choice)):
        out.print(line, markup=False)
    if figure is not None:
        curves_of(done, choice.method, figure)
        figure.savefig(plot)
    return 0
