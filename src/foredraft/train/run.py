"""A training run: captures the training text (the target's own answers with its features), and trains a head on it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from foredraft.core.errors import UserError, unknown_name, whole_number
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.params import MAX_SEED
from foredraft.core.progress import note
from foredraft.heads import HEADS
from foredraft.heads.folder import layer_config, read_head, save_head
from foredraft.heads.layers import FINAL, Shape
from foredraft.llm import LLM
from foredraft.models.checkpoint import fingerprint, resolve
from foredraft.models.loading import fingerprint_of
from foredraft.train.attention import tables
from foredraft.train.batches import collate, endless
from foredraft.train.checkpoint import facts_in
from foredraft.train.corpus import ANSWERS, Corpus, read_corpus
from foredraft.train.course import Course, Progress, Settings, by_processor
from foredraft.train.frozen import Frozen
from foredraft.train.loop import train
from foredraft.train.provenance import provenance
from foredraft.train.recipes import RECIPES, check
from foredraft.train.shards import Plan, capture
from foredraft.train.start import FITTED_TOKENS, begin, token_counts
from foredraft.train.texts import Text
from foredraft.train.workers import Workers

WRITERS = 128
"""Number of answers that the target generates at the same time."""

TEMPERATURES = (0.0, 0.6, 1.0)
"""Default temperatures of the target's own answers. The prompts use them in turn."""


@dataclass(frozen=True)
class TrainChoice:
    """The options of ``foredraft train``.

    Attributes:
        method: a name in `RECIPES`.
        model: the target; None: the bundled one.
        data: JSON Lines files of conversations.
        out: directory in which the head is written.
        options: options of the head and of its recipe, by name.
        init: directory of an existing head to start from, with the same method and sizes; None: fitted initial weights.
        answers: ``own``: the head learns from answers that the target generates. ``given``: it learns from the answers in the
            files.
        shards: folder of the shards; None: the folder ``shards`` in `out`.
        num_tokens: number of answer tokens to learn from, without the held-out ones.
        temperatures: temperatures of the target's own answers, used in turn; None: `TEMPERATURES`.
        max_len: largest number of tokens of a prompt and its answer together.
        feature_layers: layers to capture beside those that the head needs, so that several heads can share the shards.
        keep_features: whether new shards hold features. Shards without features are small, but the target then runs over
            every batch again.
        settings: fields of `Settings` that differ from their defaults.
        device: device of the target and the head; None: chosen automatically.
        seed: seed of the run, 0 or more.
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

    @property
    def shards_folder(self) -> Path:
        """Folder of the shards."""
        return self.shards or self.out / "shards"


def run(choice: TrainChoice, workers: Workers | None = None) -> Progress:
    """Trains a head and writes its directory.

    A run that was interrupted continues from its last checkpoint in `choice.out`.

    Args:
        workers: the processes that share the work; None: this process alone.

    Raises:
        ValueError: an option is invalid, or options contradict each other.
        TrainingError: the run cannot continue. The message says which files are intact and how to continue.
    """
    _check(choice)
    source, workers = choice.model or BUNDLED_TARGET, workers or Workers()
    device = choice.device or workers.device
    llm = LLM(source, {"method": "ar"}, device=device, max_num_seqs=WRITERS, seed=choice.seed)
    settings = _settings(choice, workers, llm.target.device)
    _check_tokenizer(llm.tokenizer, choice)
    given = _split_options(choice.method, choice.options, llm.target)
    config = layer_config(llm.target.config, llm.target.vocab_size, given.sizes)
    shape = Shape.of(config)
    if shape.features != shape.hidden and given.recipe["regression"]:
        raise UserError("regression needs a head as wide as the target, and hidden makes it narrower", "Leave out one of them")
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
        held_out=[text for text in texts if text.held_out],
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


def _check_tokenizer(tokenizer: Any, choice: TrainChoice) -> None:
    """Checks that the target's tokenizer can read the data.

    Raises:
        ValueError: there is no tokenizer, or it has no chat template and the answers of the files need one.
    """
    if tokenizer is None:
        raise UserError(
            "the target has no tokenizer, which training needs to read the data", "give a directory with a tokenizer"
        )
    if choice.answers == "given" and not getattr(tokenizer, "chat_template", None):
        raise UserError("the target has no chat template, which --answers given needs", "Leave out --answers given")


def _check(choice: TrainChoice) -> None:
    """Checks the options that need no model.

    Raises:
        ValueError: an option is unknown, or two options contradict each other.
    """
    # a random seed, -1, is not allowed: a run could not be resumed with it
    whole_number("--seed", choice.seed, 0, MAX_SEED // 2, "every text adds its number to it")
    if choice.method not in RECIPES:
        raise unknown_name("method", choice.method, list(RECIPES))
    if choice.answers not in ANSWERS:
        raise unknown_name("--answers", choice.answers, ANSWERS)
    if choice.answers == "given" and choice.temperatures is not None:
        raise UserError(
            "--temperatures apply to the target's own answers, and --answers given uses none", "Leave one of them out"
        )


def _begin(head: Any, frozen: Frozen, learned: Sequence[Text], settings: Settings, target: Any) -> None:
    """Sets the initial weights of a head, fitted on the first batches of the training."""
    groups = islice(endless(learned, settings.batch_tokens, settings.seed), -(-FITTED_TOKENS // settings.batch_tokens))
    begin(head, frozen, token_counts(learned, target), [collate(texts, head.feature_layers, target) for texts in groups])


def _read_init(choice: TrainChoice, head: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Reads the weights that ``--init`` names; None without ``--init``.

    Raises:
        ValueError: that head has other sizes.
        ModelError: that head cannot be read.
    """
    if choice.init is None:
        return None
    weights = read_head(resolve(choice.init, None), (choice.method,)).head.state_dict()
    wanted = {name: tensor.shape for name, tensor in head.state_dict().items()}
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise UserError(
            f"the head in {str(choice.init)!r} has other sizes than the head to train",
            "give the options of that head (--set); its provenance.json lists them",
        )
    return weights


def _settings(choice: TrainChoice, workers: Workers, device: torch.device) -> Settings:
    """Combines the default settings with the given ones. Several processes take equal defaults, whatever their processors."""
    usual = {"steps": 1000, "lr": RECIPES[choice.method].lr, "seed": choice.seed}
    if workers.count == 1 and not {"bf16", "optimizer"} <= choice.settings.keys():
        usual |= by_processor(facts_in(choice.out), device)
    return Settings(**{**usual, **choice.settings})


def _learned(texts: Sequence[Text], answer_share: float) -> list[Text]:
    """Selects the texts to learn from, and prints how many were left out because their answer is too short."""
    candidates = [text for text in texts if not text.held_out]
    learned = [text for text in candidates if text.answer_share >= answer_share]
    if not candidates:
        raise UserError(
            f"all {len(texts)} texts are held out for the evaluation, so none is left to learn from", "give more data"
        )
    if not learned:
        raise UserError(
            f"in each of the {len(candidates)} texts, the answer is less than {answer_share:.1%} of the text",
            "give --answer-share 0",
        )
    if short := len(candidates) - len(learned):
        share = f"less than {answer_share:.1%} of each is answer (--answer-share)"
        note(f"{short:,} of {len(texts):,} texts are left out: {share}")
    return learned


def captured(choice: TrainChoice, llm: LLM, source: Any, layers: Sequence[int]) -> list[Text]:
    """Returns the training texts with the features of `layers`. Shards that are missing are made first."""
    every = list(dict.fromkeys([*choice.feature_layers, *layers])) if choice.keep_features else []
    temperatures = (choice.temperatures or TEMPERATURES) if choice.answers == "own" else ()
    plan = Plan(temperatures, min(choice.max_len, llm.max_model_len), choice.num_tokens, every, choice.seed)
    about = {"target": fingerprint_of(source), "data": _names(choice), "answers": choice.answers}
    folder = choice.shards_folder
    width = llm.target.config.hidden_size * len(every) * 2 + 4  # bytes of a token: bfloat16, and its id
    note(f"shards in {folder}: about {1.6 * choice.num_tokens * width / 1e9:.2g} GB in total")

    def read(seed: int) -> Corpus:
        corpus = read_corpus(choice.data, llm.tokenizer, seed, answers=choice.answers, max_len=plan.max_len)
        for line in corpus.usage.lines():  # printed at the end as well, which may be hours later
            note(line)
        return corpus

    texts = capture(llm, read, plan, folder, about, layers)
    if every and texts and not texts[0].features:
        note("these shards hold no features: the target runs over every batch; another --shards folder would hold them")
    return texts


def _names(choice: TrainChoice) -> list[str]:
    return [file.name for file in choice.data]


class Options(NamedTuple):
    """The options of a run.

    Attributes:
        sizes: sizes of the head's layer that differ from the target's.
        head: options of the head.
        recipe: options of the recipe.
    """

    sizes: dict[str, Any]
    head: dict[str, Any]
    recipe: dict[str, Any]


def _split_options(method: str, given: Mapping[str, Any], target: Any) -> Options:
    """Sorts the given options into sizes, head options and recipe options.

    Raises:
        ValueError: an option is unknown, or its value is invalid.
    """
    sizes = HEADS[method].sizes
    known = list(inspect.signature(HEADS[method].cls.__init__).parameters.values())[2:]
    of_head = {parameter.name: parameter.default for parameter in known if parameter.name not in HEADS[method].converted}
    recipe = RECIPES[method].options
    for name in given:
        if name not in (*sizes, *of_head, *recipe):
            raise unknown_name(f"option of method {method!r}:", name, [*sizes, *of_head, *recipe])
    usual = {name: value for name, value in of_head.items() if value not in (None, inspect.Parameter.empty)}
    head = {**usual, **HEADS[method].options, **{name: given[name] for name in of_head if name in given}}
    if "feature_layers" in of_head and "feature_layers" not in head:
        count = target.config.num_hidden_layers
        head["feature_layers"] = [2, count // 2, count - 3]  # the layers of the released EAGLE-3
    learned = {**recipe, **{name: given[name] for name in recipe if name in given}}
    check(learned)
    return Options({name: given[name] for name in sizes if name in given}, head, learned)
