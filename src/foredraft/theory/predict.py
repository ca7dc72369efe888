"""Prediction against run on real models: rejections and target calls from measured laws, beside what the engine counted.

Text of the target's law passes through the recursion of `lookahead_rejections` as a single path. Given the emitted text,
the place of each token in its round and whether it replaced a rejected draft are random with probabilities that the two laws
at its prefix give: at token x a fresh retry has failed with ``fail last(x) / q(x)``, a single test with ``[q - p]+(x) / q(x)``.
Their sum is the conditional expectation of the count given the text, so that the difference to what the engine counted on the
same text has mean 0 and a small variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.bench import tasks
from foredraft.drafters.along import AskedAlong
from foredraft.engine import CompletionOutput, require_whole
from foredraft.errors import whole_number
from foredraft.grow.base import draft_sampling
from foredraft.llm import LLM
from foredraft.params import SamplingParams, check_seed
from foredraft.progress import progress_bar
from foredraft.sampling import warp
from foredraft.speculation import MAX_NODES, drafter_for
from foredraft.theory.chains import Rows, total_variation
from foredraft.theory.rejections import Place, Rounds, retry
from foredraft.theory.transport import with_replacement

_MOST_REPEATS = 10_000

_OPTIMA = 200
"""Positions at which the optimum over all rules is looked at."""


class Along(NamedTuple):
    """What the two laws say along one text, position by position.

    Attributes:
        first, later: probability that the token replaced rejected drafts, where M are retried, and where one is tested.
        distance: TV(p, q).
        fail: probability that all M fail.
    """

    first: Float[np.ndarray, " t"]
    later: Float[np.ndarray, " t"]
    distance: Float[np.ndarray, " t"]
    fail: Float[np.ndarray, " t"]


def along(p: Rows, q: Rows, tokens: Sequence[int], drafts: int) -> Along:
    """The probabilities at the tokens of a text, whose laws are the rows of p and q."""
    fail, last = retry(p, q, drafts)
    at = np.arange(len(q)), np.asarray(tokens)
    prob = q[at]
    return Along(fail * last[at] / prob, np.maximum(prob - p[at], 0.0) / prob, total_variation(p, q), fail)


def rounds_along(text: Along, lookahead: int, *, bonus: bool = True) -> Rounds:
    """Expected rejections and target calls given the text; see `lookahead_rejections`."""
    place, horizon = Place(lookahead, bonus, False), len(text.first)
    weights = {0: 1.0}
    rejections = calls = 0.0
    for n in range(horizon):
        calls += weights.get(0, 0.0)
        following: dict[int, float] = {}
        for accepted, weight in weights.items():
            tested = place.is_tested(accepted, horizon - n)
            rejected = weight * float((text.first if accepted == 0 else text.later)[n]) if tested else 0.0
            rejections += rejected
            for then, share in ((0, rejected), (place.after(accepted, horizon - n), weight - rejected)):
                following[then] = following.get(then, 0.0) + share
        weights = following
    return Rounds(rejections, calls)


class Compared(NamedTuple):
    """Prediction and count of one number of drafts, over all texts.

    Attributes:
        predicted, counted: rejections.
        standard_error: of their difference, over texts.
        plain_theorem: Theorem 1 or 3 on the same texts: drafts to the horizon, no bonus token.
        predicted_length, counted_length: tokens a step.
        first_acceptance, optimum: of the first position of a round, by this rule and by the best lossless rule with M
            independent drafts, at sampled positions.
    """

    drafts: int
    predicted: float
    counted: float
    standard_error: float
    plain_theorem: float
    predicted_length: float
    counted_length: float
    first_acceptance: float
    optimum: float


class Prediction(NamedTuple):
    """What `predict` found.

    Attributes:
        distance: mean TV(p, q) over all positions.
        by_position: the same over blocks of 16 output tokens.
    """

    temperature: float | int
    lookahead: int
    num_texts: int
    num_tokens: int
    distance: float
    by_position: list[float]
    compared: list[Compared]


@dataclass(frozen=True)
class Texts:
    """Which texts are generated, by which pair; `repeats` texts a prompt."""

    prompts: Path
    model: str | None = None
    draft_model: str | None = None
    limit: int | None = None
    temperature: float | int = 1.0
    max_tokens: int = 64
    repeats: int = 1
    dtype: str = "auto"
    raw: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError("laws need a temperature above 0: at 0 every rejection is certain or impossible")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        whole_number("repeats", self.repeats, 1, _MOST_REPEATS, "every text is kept until the last is done")
        check_seed(self.seed, "--seed")
        _ = self.sampling  # says now what is wrong with it

    @property
    def sampling(self) -> SamplingParams:
        """Every text has `max_tokens` tokens."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, ignore_eos=True)

    @property
    def drafting(self) -> dict[str, Any]:
        """The speculative config without a tree."""
        return {"method": drafter_for(self.draft_model)} | ({"model": self.draft_model} if self.draft_model else {})

    def load(self) -> LLM:
        """The target, decoding plainly."""
        tasks.read_prompts(self.prompts, self.limit)  # says what is wrong with them before anything is loaded
        return LLM(self.model, {"method": "ar"}, dtype=self.dtype, max_num_seqs=8, seed=self.seed)

    def encoded(self, llm: LLM) -> list[list[int]]:
        """The prompts that leave room, `repeats` times."""
        read = tasks.read_prompts(self.prompts, self.limit)
        encoded = tasks.encode(llm, read, raw=self.raw or llm.tokenizer.chat_template is None)
        fitting = [ids for ids in encoded if len(ids) + self.max_tokens <= llm.max_model_len]
        if not fitting:
            raise ValueError(f"no prompt leaves room for {self.max_tokens} tokens in a context of {llm.max_model_len}")
        return fitting * self.repeats


def predict(texts: Texts, *, lookahead: int, drafts: Sequence[int]) -> Prediction:
    """Runs the engine with M drafts of `lookahead` tokens and predicts its rejections from the two laws along its own texts.

    Raises:
        ValueError: fewer than one draft or token, models or prompts that cannot be read, or a head and more than one token:
            what it drafts first it has from the target's features, and the rest from its own.
    """
    if not drafts or min(drafts) < 1 or lookahead < 1:
        raise ValueError("drafts and lookahead must be at least 1")
    whole_number("drafts times lookahead", max(drafts) * lookahead, 1, MAX_NODES, "these are the nodes of a tree")
    plain = texts.load()
    prompts, sampling = texts.encoded(plain), texts.sampling
    compared, distances = [], np.zeros(texts.max_tokens)
    with progress_bar("predicting", len(drafts) * len(prompts)) as advance:
        for count in drafts:
            llm = plain.with_speculation({**texts.drafting, **_tree(count, lookahead)})
            drafter, found = AskedAlong(llm.target, llm.drafter_grown_by), []
            if lookahead > 1 and drafter.needs_features:
                raise ValueError(
                    "what a head drafts behind its own drafts depends on where its round began, which no law along the text "
                    f"says (lookahead {lookahead}): use --lookahead 1, or a draft model"
                )
            results = llm.generate(prompts, sampling)
            require_whole(results)
            for result in results:
                p, q = laws_of(drafter, result.prompt_token_ids, result.outputs[0].token_ids, sampling)
                found.append(compare(p, q, result.outputs[0], count, lookahead))
                distances += found[-1].text.distance / len(prompts) / len(drafts)
                advance(1)
            compared.append(summed(count, found))
    return Prediction(
        temperature=texts.temperature,
        lookahead=lookahead,
        num_texts=len(prompts),
        num_tokens=len(prompts) * texts.max_tokens,
        distance=float(distances.mean()),
        by_position=[float(one.mean()) for one in np.array_split(distances, max(1, texts.max_tokens // 16))],
        compared=compared,
    )


def _tree(drafts: int, lookahead: int) -> dict[str, Any]:
    """Algorithm 4's tree and rule; with one draft, Algorithm 1's."""
    if drafts == 1:
        return {"tree": "chain", "rule": "chain", "num_speculative_tokens": lookahead}
    shape = {"num_chains": drafts, "draft_depth": lookahead, "num_speculative_tokens": drafts * lookahead}
    return {"tree": "branching", "rule": "multiround-iid", **shape}


def laws_of(drafter: AskedAlong, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams) -> tuple[Rows, Rows]:
    """Draft and target law at every output token."""
    target, draft = drafter.logits([*prompt, *output[:-1]], len(prompt) - 1)
    laws = warp(draft.double(), draft_sampling(sampling, None)), warp(target.double(), sampling)
    return laws[0].cpu().numpy(), laws[1].cpu().numpy()


class OneText(NamedTuple):
    """One text: prediction and count."""

    text: Along
    predicted: Rounds
    plain: float
    counted: int
    steps: int
    acceptance: float
    optimum: float


def compare(p: Rows, q: Rows, output: CompletionOutput, drafts: int, lookahead: int) -> OneText:
    """Predicts one output of the engine."""
    text = along(p, q, output.token_ids, drafts)
    counted = sum(record.kind == "recovered" for record in output.records)
    some = np.linspace(0, len(p) - 1, min(len(p), max(1, _OPTIMA // len(p) + 4))).astype(int)
    optimum = float(np.mean([with_replacement(p[i], q[i], drafts) for i in some]))
    return OneText(
        text,
        rounds_along(text, lookahead),
        rounds_along(text, len(p), bonus=False).rejections,
        counted,
        len(output.records),
        float(1 - text.fail[some].mean()),
        optimum,
    )


def summed(drafts: int, texts: Sequence[OneText]) -> Compared:
    """All texts together."""
    differences = np.array([one.counted - one.predicted.rejections for one in texts])
    tokens = sum(len(one.text.first) for one in texts)
    return Compared(
        drafts=drafts,
        predicted=sum(one.predicted.rejections for one in texts),
        counted=float(sum(one.counted for one in texts)),
        standard_error=float(differences.std(ddof=1)) * sqrt(len(texts)) if len(texts) > 1 else float("nan"),
        plain_theorem=sum(one.plain for one in texts),
        predicted_length=tokens / sum(one.predicted.target_calls for one in texts),
        counted_length=tokens / sum(one.steps for one in texts),
        first_acceptance=float(np.mean([one.acceptance for one in texts])),
        optimum=float(np.mean([one.optimum for one in texts])),
    )
