"""Predictions on real models: rejections and target calls from measured laws, compared with the counts of the engine.

The prediction is made for a given text of the target, by the recursion of `lookahead_rejections` along this single path. Given
the text, two things are random: the place of each token in its round, and whether it replaced a rejected draft. The two laws
at the token's prefix give their probabilities. At token x, a retry among M drafts has failed with probability
``fail last(x) / q(x)``, and a test of a single draft with probability ``[q - p]+(x) / q(x)``.

The sum of these probabilities is the conditional expectation of the count, given the text. The difference to the engine's
count on the same text therefore has mean 0 and a small variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from foredraft.core.errors import UserError, whole_number
from foredraft.core.law import warp
from foredraft.core.outputs import CompletionOutput, require_whole
from foredraft.core.params import SamplingParams
from foredraft.core.progress import progress_bar
from foredraft.core.shape import MAX_NODES
from foredraft.drafters.along import AskedAlong
from foredraft.theory.chains import Rows, total_variation
from foredraft.theory.rejections import Place, Rounds, retry
from foredraft.theory.texts import Texts
from foredraft.theory.transport import with_replacement
from foredraft.trees.base import draft_sampling

_OPTIMA = 200
"""Approximate number of positions of a text at which the optimum over all rules is computed."""


class Along(NamedTuple):
    """Probabilities at the positions of one text, from the two laws.

    Attributes:
        first: probability that the token replaced M rejected drafts, at the first position of a round.
        later: probability that the token replaced a rejected draft, at a later position of a round.
        distance: TV(p, q).
        fail: probability that all M drafts are rejected.
    """

    first: Float[np.ndarray, " t"]
    later: Float[np.ndarray, " t"]
    distance: Float[np.ndarray, " t"]
    fail: Float[np.ndarray, " t"]


def along(p: Rows, q: Rows, tokens: Sequence[int], drafts: int) -> Along:
    """Computes the probabilities at the tokens of a text. Row i of p and q is the law of token i."""
    fail, last = retry(p, q, drafts)
    at = np.arange(len(q)), np.asarray(tokens)
    prob = q[at]
    return Along(fail * last[at] / prob, np.maximum(prob - p[at], 0.0) / prob, total_variation(p, q), fail)


def rounds_along(text: Along, lookahead: int, *, bonus: bool = True) -> Rounds:
    """Computes the expected rejections and target calls, given the text; see `lookahead_rejections`."""
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
    """Prediction and count for one number of drafts, over all texts.

    Attributes:
        drafts: number of drafts M.
        predicted: predicted number of rejections.
        counted: number of rejections that the engine counted.
        standard_error: standard error of the difference of these numbers, over the texts.
        plain_theorem: rejections by Theorem 1 or 3 on the same texts, with drafts to the horizon and no bonus token.
        predicted_length, counted_length: tokens per step, predicted and counted.
        first_acceptance: acceptance of this rule at the first position of a round, averaged over sampled positions.
        optimum: the same for the best lossless rule with M independent drafts.
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
    """Result of `predict`.

    Attributes:
        temperature: temperature of the texts.
        lookahead: number of tokens of each draft.
        num_texts: number of texts.
        num_tokens: number of output tokens in all texts.
        distance: mean of TV(p, q) over all positions.
        by_position: means of TV(p, q) over blocks of about 16 output tokens.
        compared: prediction and count for each number of drafts.
    """

    temperature: float | int
    lookahead: int
    num_texts: int
    num_tokens: int
    distance: float
    by_position: list[float]
    compared: list[Compared]


def predict(texts: Texts, *, lookahead: int, drafts: Sequence[int]) -> Prediction:
    """Runs the engine with M drafts of `lookahead` tokens, and predicts its rejections from the two laws along its texts.

    Args:
        texts: the texts to generate, and the models.
        lookahead: number of tokens of each draft.
        drafts: the numbers of drafts M to try.

    Raises:
        ValueError: a number is below 1, models or prompts cannot be read, or a head drafts more than one token. A head drafts
            its first token from the target's features and later tokens from its own, which differ.
    """
    if not drafts or min(drafts) < 1 or lookahead < 1:
        raise UserError("drafts and lookahead must be at least 1")
    whole_number("drafts times lookahead", max(drafts) * lookahead, 1, MAX_NODES, "it is the number of nodes of the tree")
    plain = texts.load()
    prompts, sampling = texts.encoded(plain), texts.sampling
    compared, distances = [], np.zeros(texts.max_tokens)
    with progress_bar("predicting", len(drafts) * len(prompts)) as advance:
        for count in drafts:
            llm = plain.with_speculation({**texts.drafting, **_tree(count, lookahead)})
            drafter, found = AskedAlong(llm.target, llm.drafter_grown_by), []
            if lookahead > 1 and drafter.needs_features:
                raise UserError(
                    f"a head with lookahead {lookahead} cannot be predicted, since its later drafts depend on the start of "
                    "the round",
                    "use --lookahead 1, or a draft model",
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
        by_position=[float(block.mean()) for block in np.array_split(distances, max(1, texts.max_tokens // 16))],
        compared=compared,
    )


def _tree(drafts: int, lookahead: int) -> dict[str, Any]:
    """Returns the tree and the rule of Algorithm 4, or those of Algorithm 1 for one draft."""
    if drafts == 1:
        return {"tree": "chain", "rule": "chain", "num_speculative_tokens": lookahead}
    shape = {"num_chains": drafts, "draft_depth": lookahead, "num_speculative_tokens": drafts * lookahead}
    return {"tree": "branching", "rule": "multiround-iid", **shape}


def laws_of(drafter: AskedAlong, prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams) -> tuple[Rows, Rows]:
    """Computes the draft law and the target law of every output token."""
    target, draft = drafter.logits([*prompt, *output[:-1]], len(prompt) - 1)
    laws = warp(draft.double(), draft_sampling(sampling, None)), warp(target.double(), sampling)
    return laws[0].cpu().numpy(), laws[1].cpu().numpy()


class OneText(NamedTuple):
    """Prediction and count for one text.

    Attributes:
        text: probabilities at its positions.
        predicted: predicted rejections and target calls.
        plain: rejections by Theorem 1 or 3.
        counted: number of rejections that the engine counted.
        steps: number of steps of the engine.
        acceptance: acceptance at the first position of a round, averaged over sampled positions.
        optimum: the same for the best lossless rule.
    """

    text: Along
    predicted: Rounds
    plain: float
    counted: int
    steps: int
    acceptance: float
    optimum: float


def compare(p: Rows, q: Rows, output: CompletionOutput, drafts: int, lookahead: int) -> OneText:
    """Predicts the rejections of one output of the engine, and compares them with its count."""
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
    """Combines the predictions and counts of all texts."""
    differences = np.array([text.counted - text.predicted.rejections for text in texts])
    tokens = sum(len(text.text.first) for text in texts)
    return Compared(
        drafts=drafts,
        predicted=sum(text.predicted.rejections for text in texts),
        counted=float(sum(text.counted for text in texts)),
        standard_error=float(differences.std(ddof=1)) * sqrt(len(texts)) if len(texts) > 1 else float("nan"),
        plain_theorem=sum(text.plain for text in texts),
        predicted_length=tokens / sum(text.predicted.target_calls for text in texts),
        counted_length=tokens / sum(text.steps for text in texts),
        first_acceptance=float(np.mean([text.acceptance for text in texts])),
        optimum=float(np.mean([text.optimum for text in texts])),
    )
