"""Markov chains estimated from texts of a real pair of models.

A state's row is the average of the laws that a model gives after that state's token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from foredraft.core.errors import UserError
from foredraft.core.outputs import require_whole
from foredraft.core.progress import progress_bar
from foredraft.drafters.along import AskedAlong
from foredraft.theory.chains import Pair, Rows, check_room
from foredraft.theory.predict import laws_of
from foredraft.theory.texts import Texts


def estimated_pair(texts: Texts, states: int) -> tuple[Pair, list[int]]:
    """Estimates a stationary pair from the target's own texts.

    The most frequent tokens of the texts have a state each, and all other tokens share the last state. The row of a state is
    the mean of a model's laws at the positions after it, or at all positions if the state never occurs. The mean hides
    everything else that the model knows from the prefix. Merging tokens can only lower TV(p, q).

    Args:
        states: number of states, at least 2. With more states than tokens in the vocabulary, each token has its own state.

    Returns:
        The pair, and the token of each state except the last.

    Raises:
        ValueError: there are too few or too many states, or models or prompts cannot be read.
    """
    if states < 2:
        raise UserError(f"an estimate needs at least 2 states, got {states}")
    plain = texts.load()
    check_room(min(states, plain.target.vocab_size + 1), 1)
    drafting = plain.with_speculation({**texts.drafting, "tree": "chain", "num_speculative_tokens": 1})
    drafter = AskedAlong(plain.target, drafting.drafter_grown_by)
    outputs = plain.generate(texts.encoded(plain), texts.sampling, progress=True)
    require_whole(outputs)
    counts = Counter(token for result in outputs for token in result.outputs[0].token_ids)
    tokens = [token for token, _ in counts.most_common(states - 1)]
    place = np.full(plain.target.vocab_size, len(tokens))
    place[tokens] = np.arange(len(tokens))
    sums = np.zeros((2, len(tokens) + 1, len(tokens) + 1))
    begins, seen = np.zeros((2, len(tokens) + 1)), np.zeros(len(tokens) + 1)
    with progress_bar("estimating", len(outputs)) as advance:
        for result in outputs:
            ids = result.outputs[0].token_ids
            last = place[[result.prompt_token_ids[-1], *ids[:-1]]]
            laws = [merged(rows, place, len(seen)) for rows in laws_of(drafter, result.prompt_token_ids, ids, texts.sampling)]
            for total, begin, rows in zip(sums, begins, laws, strict=True):
                np.add.at(total, last, rows)
                begin += rows[0]
            np.add.at(seen, last, 1)
            advance(1)
    usual = sums.sum(1, keepdims=True)
    sums = np.where(seen[None, :, None] > 0, sums, usual)
    p, q = sums / sums.sum(-1, keepdims=True)
    first = begins / begins.sum(-1, keepdims=True)
    return Pair([first[:1], p], [first[1:], q]), tokens


def merged(rows: Rows, place: Int[np.ndarray, " v"], states: int) -> Float[np.ndarray, "s k"]:
    """Sums laws over tokens to laws over states. Token t belongs to state ``place[t]``."""
    sums = np.zeros((len(rows), states))
    np.add.at(sums.T, place, rows.T)
    return sums


def as_json(pair: Pair, tokens: Sequence[int]) -> dict[str, object]:
    """Converts a pair to a JSON object, which `read_pair` can read."""
    return {
        "tokens": list(tokens),
        "draft": [matrix.tolist() for matrix in pair.draft],
        "target": [matrix.tolist() for matrix in pair.target],
    }
