"""``foredraft theory``: its commands compute what `foredraft.theory.answers` holds, and print it as JSON or as tables."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from foredraft.cli.options import AsJson, Dtype, Limit, Model, Plot, Prompts, Raw, Seed, option
from foredraft.core.errors import UserError, shown, whole_number
from foredraft.core.typed import numbers

theory = typer.Typer(name="theory", help="Compute the costs and gains of speculative decoding exactly.", no_args_is_help=True)

P = Annotated[str | None, option(None, "Draft probabilities: 0.5,0.3,0.2.", "--p")]
Q = Annotated[str | None, option(None, "Target probabilities: 0.4,0.4,0.2.", "--q")]
Horizon = Annotated[int, typer.Option(help="Number of tokens to generate.")]


class LawOptions(NamedTuple):
    """Source of the laws. Exactly one source must be given: `p` and `q`, `laws`, or `states`."""

    p: P = None
    q: Q = None
    laws: Annotated[Path | None, option(None, 'JSON file: {"draft": ..., "target": ...}.')] = None
    states: Annotated[int | None, option(None, "Use random non-stationary chains with this many states.")] = None
    seed: Annotated[int, typer.Option(help="Seed of random chains and simulated runs.")] = 0

    def pair(self, horizon: int) -> Any:
        """Reads or draws the chains, a `Pair`.

        Raises:
            ValueError: not exactly one source is given, or it holds no valid laws.
        """
        from foredraft.theory.chains import iid_pair, random_pair, read_pair

        given = [(self.p or self.q) is not None, self.laws is not None, self.states is not None]
        if sum(given) != 1 or (self.p is None) != (self.q is None):
            raise UserError("give the laws once: --p and --q (such as 0.5,0.5), --laws FILE, or --states N for random laws")
        if self.laws is not None:
            return read_pair(self.laws)
        if self.states is not None:
            return random_pair(self.states, max(horizon, 1), self.seed)
        return iid_pair(*self.rows())

    def rows(self) -> tuple[Any, Any]:
        """Parses the two laws that are given as numbers, to arrays.

        Raises:
            ValueError: they are missing, or are not laws over the same vocabulary.
        """
        from foredraft.theory.chains import checked_laws

        if self.p is None or self.q is None:
            raise UserError("this command needs one pair of laws", "give them as in --p 0.5,0.3,0.2 --q 0.2,0.3,0.5")
        return checked_laws(numbers("--p", self.p), numbers("--q", self.q))


class TextOptions(NamedTuple):
    """The texts of the target to which a command applies; the fields are those of `foredraft.theory.texts.Texts`."""

    prompts: Prompts
    model: Model = None
    draft_model: Annotated[
        str | None,
        typer.Option("--drafter", "--draft-model", help="Directory or Hub id of the draft model, or of a head."),
    ] = None
    limit: Limit = None
    temperature: Annotated[float, typer.Option(help="Must be above 0.")] = 1.0
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 64
    repeats: Annotated[int, typer.Option(help="Texts per prompt.")] = 1
    dtype: Dtype = "auto"
    raw: Raw = False
    seed: Seed = 0


def _seeded(options: Any) -> tuple[Any, dict[str, int]]:
    """Replaces the seed -1 of a group by a random seed, which is returned apart as well, to be printed.

    Raises:
        ValueError: the seed is neither a valid seed nor -1.
    """
    from foredraft.core.params import RANDOM_SEED, check_seed, used_seed

    seeded = options._replace(seed=used_seed(check_seed(options.seed, "--seed")))
    return seeded, {"seed": seeded.seed} if options.seed == RANDOM_SEED else {}


@theory.command("rejections")
def rejections(
    *,
    laws: LawOptions,
    horizon: Horizon = 50,
    drafts: Annotated[str, typer.Option(help="Number M of independent drafts, or inf.")] = "1",
    lookahead: Annotated[int | None, typer.Option(help="Tokens drafted per round; default: up to the horizon.")] = None,
    bonus: Annotated[bool, typer.Option(help="With --lookahead: whether accepted rounds emit a bonus token.")] = True,
    simulate: Annotated[int, typer.Option(help="Number of simulated runs.")] = 0,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compute expected rejections by Theorems 1 to 3 of Yin et al., their limit, and the effect of a finite lookahead."""
    from foredraft.theory import answers, limits

    limits.check_horizon(horizon)
    count, (given, seed) = whole_or_inf(drafts), _seeded(laws)
    limits.check_drafts(count)
    if lookahead is not None:
        limits.check_lookahead(lookahead)
    more: dict[str, Any] = {"lookahead": lookahead, "bonus": bonus, "runs": simulate, "seed": given.seed, "plot": plot}
    _report({**answers.rejections(given.pair(horizon), horizon, count, **more), **seed}, as_json)


@theory.command("batch")
def batch(
    *,
    laws: LawOptions,
    horizon: Horizon = 50,
    drafts: Annotated[int, typer.Option(help="Largest number M of drafts.")] = 8,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compute what 1 to M drafts save, and the limit. With --p and --q, compare each rule with the best possible rule."""
    from foredraft.theory import answers, figures, limits

    if drafts < 1:
        raise UserError(f"the number of drafts M must be a whole number of at least 1, got {drafts}")
    limits.check_horizon(horizon)
    limits.check_drafts(drafts)
    given, seed = _seeded(laws)
    found = {**answers.batch(given.pair(horizon), horizon, drafts), **seed}
    if given.p is not None:
        p, q = given.rows()
        found["acceptance"] = answers.acceptance(p, q, drafts)
    if plot is not None:
        figures.save(figures.improvement(), plot)
    _report(found, as_json)


@theory.command("tradeoff")
def tradeoff(
    *,
    p: P = None,
    q: Q = None,
    epsilon: Annotated[str, typer.Option(help="Values of the over-acceptance epsilon.")] = "0,0.05,0.1,0.2,0.4",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compute the trade-off of quality and rejections by Theorems 4 and 5 of Yin et al."""
    from foredraft.theory import answers, figures

    (draft, target), sizes = LawOptions(p, q).rows(), numbers("--epsilon", epsilon)
    found = answers.tradeoff(draft, target, sizes)
    if plot is not None:
        figures.save(figures.tradeoff(draft, target, sizes), plot)
    _report(found, as_json)


@theory.command("speedup")
def speedup(
    *,
    acceptance: Annotated[str, typer.Option(help="Conditional acceptance probability: one value, or one per depth.")],
    draft_cost: Annotated[float, typer.Option(help="Cost of a draft pass, in plain decoding steps.")] = 0.05,
    verify_cost: Annotated[
        str, typer.Option(help="Cost of a target step, in plain decoding steps: 1.1, or by tokens 1:1,8:1.2,64:4.")
    ] = "1",
    longest: Annotated[int, typer.Option(help="Maximum length of a chain.")] = 16,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Compute tokens per step and speed-up of chains of every length, and the least acceptance with a speed-up."""
    from foredraft.theory import answers, figures

    rates, verify = numbers("--acceptance", acceptance), verify_costs(verify_cost)
    found = answers.speedups(rates, draft_cost, verify, longest)
    if plot is not None:
        figures.save(figures.speedup(draft_cost, verify, longest), plot)
    _report(found, as_json)


@theory.command("predict")
def predict(
    *,
    text: TextOptions,
    lookahead: Annotated[int, typer.Option(help="Tokens drafted per round.")] = 4,
    drafts: Annotated[str, typer.Option(help="Numbers of drafts M.")] = "1,2,4,8",
    as_json: AsJson = False,
) -> None:
    """Predict rejections from the probabilities of both models, and compare with the engine's count on the same texts."""
    from foredraft.theory import answers
    from foredraft.theory.texts import Texts

    counts, (given, seed) = numbers("--drafts", drafts, int), _seeded(text)
    found = answers.predicted(Texts(**given._asdict()), lookahead=lookahead, drafts=counts)
    _report({**found, **seed}, as_json)


@theory.command("estimate")
def estimate(
    *,
    text: TextOptions,
    output: Annotated[Path, typer.Option(help="JSON file to write; other commands read it with --laws.")],
    states: Annotated[int, typer.Option(help="Number of frequent tokens; one more state holds all others.")] = 256,
) -> None:
    """Estimate Markov chains of a pair of models from texts of the target. Other commands read them with --laws."""
    from foredraft.cli import show
    from foredraft.theory.estimate import as_json, estimated_pair
    from foredraft.theory.texts import Texts

    given, seed = _seeded(text)
    pair, tokens = estimated_pair(Texts(**given._asdict()), states)
    try:
        output.write_text(json.dumps(as_json(pair, tokens)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {str(output)!r} ({error.strerror})") from None
    told = f" (seed {given.seed})" if seed else ""
    show.say(f"chains over {pair.vocab_size} states are in {output}; read them with --laws {output}{told}")


def whole_or_inf(text: str) -> float | int:
    """Parses a number of drafts.

    Raises:
        ValueError: the text is neither a whole number nor ``inf``.
    """

    try:
        return inf if text == "inf" else int(text)
    except ValueError:
        raise UserError(f"--drafts must be a whole number or inf, got {shown(text)}") from None


def verify_costs(text: str) -> Any:
    """Parses a cost curve, in steps of plain decoding, such as ``1:1,8:1.2``. A single number applies to every tree.

    Raises:
        ValueError: the text is neither, or a cost is invalid.
    """
    from foredraft.theory import limits
    from foredraft.theory.speedup import interpolated

    try:
        points = (
            {int(a): float(b) for a, b in (part.split(":") for part in text.split(","))} if ":" in text else {1: float(text)}
        )
    except ValueError:
        raise UserError(f"--verify-cost must be a number or NODES:COST,NODES:COST, got {text!r}") from None
    for nodes, cost in points.items():
        whole_number("the nodes of --verify-cost", nodes, 1, limits.MAX_HORIZON)
        limits.check_cost("--verify-cost", cost)
    return interpolated(points)


def _report(found: dict[str, Any], as_json: bool) -> None:
    from foredraft.cli import show

    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        title = key.replace("_", " ")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = [map(_formatted, row.values()) for row in value]
            show.print_table(title, (name.replace("_", " ") for name in value[0]), rows)
        else:
            show.say(f"{title}: {_formatted(value)}")


def _formatted(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_formatted(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_formatted(item)}" for key, item in value.items())
    return str(value)
