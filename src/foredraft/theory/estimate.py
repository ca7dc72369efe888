"""Markov chains estimated from texts of a real pair: the laws that two models give after each token, averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from foredraft.drafters.along import AskedAlong
from foredraft.engine import require_whole
from foredraft.progress import progress_bar
from foredraft.theory.chains import Pair, Rows, check_room
from foredraft.theory.predict import Texts, laws_of


def estimated_pair(texts: Texts, states: int) -> tuple[Pair, list[int]]:
    """A stationary pair over the likeliest tokens of the target's own texts and one state for all others.

    The row of a state is the mean of what a model says at the positions that follow it (over all positions, where there are
    none), so that what else a model knows of the prefix is averaged out. Merging tokens can only lower TV(p, q).

    Args:
        states: at least 2; all tokens have a state of their own from the vocabulary's size on.

    Returns:
        The pair, and the token of each state but the last.

    Raises:
        ValueError: there are too few or too many states, or models or prompts cannot be read.
    """
    if states < 2:
        raise ValueError(f"an estimate needs at least 2 states, got {states}")
    plain = texts.load()
    check_room(min(states, plain.target.vocab_size + 1), 1)
    drafting = plain.with_speculation({**texts.drafting, "tree": "chain", "num_speculative_tokens": 1})
    drafter = AskedAlong(plain.target, drafting.drafter_grown_by)
    outputs = plain.generate(texts.encoded(plain), texts.sampling, progress=True)
    require_whole(outputs)
    counts = Counter(token for one in outputs for token in one.outputs[0].token_ids)
    tokens = [token for token, _ in counts.most_common(states - 1)]
    place = np.full(plain.target.vocab_size, len(tokens))
    place[tokens] = np.arange(len(tokens))
    sums = np.zeros((2, len(tokens) + 1, len(tokens) + 1))
    begins, seen = np.zeros((2, len(tokens) + 1)), np.zeros(len(tokens) + 1)
    with progress_bar("estimating", len(outputs)) as advance:
        for one in outputs:
            ids = one.outputs[0].token_ids
            last = place[[one.prompt_token_ids[-1], *ids[:-1]]]
            laws = [merged(rows, place, len(seen)) for rows in laws_of(drafter, one.prompt_token_ids, ids, texts.sampling)]
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
    """Laws over tokens as laws over states; token t belongs to state ``place[t]``."""
    found = np.zeros((len(rows), states))
    np.add.at(found.T, place, rows.T)
    return found


def as_json(pair: Pair, tokens: Sequence[int]) -> dict[str, object]:
    """What `read_pair` reads."""
    return {
        "tokens": list(tokens),
        "draft": [one.tolist() for one in pair.draft],
        "target": [one.tolist() for one in pair.target],
    }
