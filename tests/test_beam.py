"""Label sequences of CTC frames against all their paths, and the trie of the best."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from foredraft.compiled import library
from foredraft.drafters.beam import collapse, likeliest_prefixes, prefix_beam, trie

BLANK = -1


def all_paths(probs: np.ndarray, blanks: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every label sequence with the sum over all paths."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in product([BLANK, *range(probs.shape[1])], repeat=len(probs)):
        chances = [blanks[i] if token == BLANK else probs[i, token] for i, token in enumerate(path)]
        found[collapse(path, BLANK)] += float(np.prod(chances))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("frames", "size"), [(1, 3), (3, 2), (4, 3), (6, 2)])
def test_a_beam_with_room_for_all_is_exact(frames: int, size: int, seed: int) -> None:
    law = np.random.default_rng(seed).dirichlet(np.ones(size + 1), frames)
    probs, blanks = law[:, :-1], law[:, -1]
    tokens = np.tile(np.arange(size), (frames, 1))
    found = prefix_beam(tokens, probs, blanks, beam=10_000)
    expected = all_paths(probs, blanks)
    assert found.keys() == expected.keys()
    assert sum(found.values()) == pytest.approx(1, abs=1e-14)
    assert all(found[labels] == pytest.approx(prob, abs=1e-15) for labels, prob in expected.items())


def test_a_narrow_beam_never_promises_more() -> None:
    law = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    expected = all_paths(law[:, :3], law[:, 3])
    found = prefix_beam(np.tile(np.arange(3), (6, 1)), law[:, :3], law[:, 3], beam=5)
    assert len(found) == 5
    assert all(prob <= expected[labels] + 1e-15 for labels, prob in found.items())


def frames_of(*path: int, size: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames that are nearly certain of a path."""
    probs = np.full((len(path), size), 1e-4)
    for i, token in enumerate(path):
        if token != BLANK:
            probs[i, token] = 0.99
    return np.tile(np.arange(size), (len(path), 1)), probs, np.array([0.99 if token == BLANK else 1e-4 for token in path])


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ((1, 1, 2, 3), (1, 2, 3)),
        ((1, 2, 2, 3), (1, 2, 3)),
        ((1, 2, 3, 3), (1, 2, 3)),
        ((1, BLANK, 1, 2), (1, 1, 2)),
        ((BLANK, 1, 1, BLANK), (1,)),
        ((1, 1, 1, 1), (1,)),
    ],
)
def test_repeats_and_blanks_at_every_place(path: tuple[int, ...], labels: tuple[int, ...]) -> None:
    tokens, parents = trie(prefix_beam(*frames_of(*path), beam=16), root=9, nodes=len(labels), depth=8)
    assert tokens == [9, *labels]
    assert parents == [-1, *range(len(labels))]


def test_blanks_everywhere_draft_nothing() -> None:
    tokens, probs, blanks = frames_of(BLANK, BLANK, BLANK)
    assert prefix_beam(tokens, probs * 0, blanks / 0.99, beam=8).keys() == {()}
    assert trie({(): 1.0}, 7, 5, 5) == ([7], [-1])


def test_trie_holds_the_likeliest_prefixes_once() -> None:
    sequences = {(1, 2): 0.4, (1, 3): 0.3, (2,): 0.2, (): 0.1}
    assert trie(sequences, 0, 4, 8) == ([0, 1, 2, 3, 2], [-1, 0, 1, 1, 0])
    assert trie(sequences, 0, 2, 8) == ([0, 1, 2], [-1, 0, 1])
    assert trie(sequences, 0, 4, 1) == ([0, 1, 2], [-1, 0, 0])


@pytest.mark.skipif(library() is None, reason="needs AVX-512 BF16 and a C compiler")
@pytest.mark.parametrize("steps", [None, 8, 2])
def test_the_compiled_search_is_the_plain_one(steps: int | None) -> None:
    """300 random laws each; on a grid of few probabilities many sequences and prefixes are equally likely, some impossible."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        frames, size, beam, nodes, depth = (int(rng.integers(1, most)) for most in (9, 9, 40, 30, 9))
        law = rng.dirichlet(np.full(size + 1, 0.5), frames) if steps is None else rng.integers(0, steps, (frames, size + 1)) / 8
        tokens = np.array([rng.choice(12, size, replace=False) for _ in range(frames)])
        given = tokens, law[:, :-1], law[:, -1]
        found = likeliest_prefixes(*given, beam=beam, root=5, nodes=nodes, depth=depth)
        assert found == trie(prefix_beam(*given, beam), 5, nodes, depth)
