"""Label sequences of CTC frames against all their paths, and the trie of the best."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch

from exact import collapse
from foredraft.drafters.prefixes import PrefixLaws
from foredraft.kernels import OPERATIONS, library
from foredraft.kernels.prefixes import prefix_search, trie

BLANK = -1


def all_paths(probs: np.ndarray, blanks: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every label sequence with the sum over all paths."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in product([BLANK, *range(probs.shape[1])], repeat=len(probs)):
        chances = [blanks[i] if token == BLANK else probs[i, token] for i, token in enumerate(path)]
        found[collapse(path, BLANK)] += float(np.prod(chances))
    return found


def prefix_masses(every: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """Every prefix of at least one label, with the probability that the labels begin with it."""
    mass: dict[tuple[int, ...], float] = defaultdict(float)
    for labels, prob in every.items():
        for length in range(1, len(labels) + 1):
            mass[labels[:length]] += prob
    return mass


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("frames", "size"), [(1, 3), (3, 2), (4, 3), (6, 2)])
def test_prefixes_are_the_likeliest_of_all(frames: int, size: int, seed: int) -> None:
    """Against the sums over all paths; every prefix there is, and the first seven."""
    law = np.random.default_rng(seed).dirichlet(np.ones(size + 1), frames)
    every = all_paths(law[:, :-1], law[:, -1])
    assert sum(every.values()) == pytest.approx(1, abs=1e-14)
    mass = prefix_masses(every)
    given = np.tile(np.arange(size), (frames, 1)), law[:, :-1], law[:, -1]
    found = prefix_search(*given, nodes=10_000, depth=frames)
    assert found.keys() == mass.keys()
    assert all(found[labels] == pytest.approx(prob, abs=1e-14) for labels, prob in mass.items())
    assert [*found] == sorted(mass, key=lambda labels: -mass[labels])
    assert [*prefix_search(*given, nodes=7, depth=frames)] == [*found][:7]
    assert [*prefix_search(*given, nodes=7, depth=2)] == [labels for labels in found if len(labels) <= 2][:7]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("frames", "size"), [(1, 3), (3, 2), (4, 3), (6, 2)])
def test_laws_after_every_prefix(frames: int, size: int, seed: int) -> None:
    """Against the sums over all paths; nodes asked for all at once, the deepest first, and one by one."""
    law = np.random.default_rng(seed).dirichlet(np.ones(size + 1), frames)
    mass = prefix_masses(all_paths(law[:, :-1], law[:, -1]))
    prefixes = sorted(mass, key=len)
    tokens, parents = trie(prefixes, root=0)
    nodes = [*range(len(tokens))][::-1]
    found = PrefixLaws(torch.from_numpy(law)).logits(tokens, parents, nodes)
    for node, row in zip(nodes, found.softmax(-1).numpy(), strict=True):
        labels = prefixes[node - 1] if node else ()
        after = np.array([mass.get((*labels, one), 0.0) for one in range(size)])
        wanted = after / after.sum() if after.any() else np.full(size, 1 / size)
        np.testing.assert_allclose(row, wanted, atol=1e-12)
    one_by_one = PrefixLaws(torch.from_numpy(law))
    torch.testing.assert_close(torch.cat([one_by_one.logits(tokens, parents, [node]) for node in nodes]), found)


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
    tokens, parents = trie(prefix_search(*frames_of(*path), nodes=len(labels), depth=8), root=9)
    assert tokens == [9, *labels]
    assert parents == [-1, *range(len(labels))]


def test_blanks_everywhere_draft_nothing() -> None:
    tokens, probs, blanks = frames_of(BLANK, BLANK, BLANK)
    assert trie(prefix_search(tokens, probs * 0, blanks / 0.99, nodes=8, depth=8), root=7) == ([7], [-1])


def test_trie_holds_every_prefix_behind_what_it_extends() -> None:
    assert trie([(1,), (1, 2), (2,), (1, 3)], 0) == ([0, 1, 2, 2, 3], [-1, 0, 1, 0, 1])


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("steps", [None, 8, 2])
def test_the_compiled_search_is_the_plain_one(steps: int | None) -> None:
    """300 random laws each; on a grid of few probabilities many prefixes are equally likely, some impossible."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        frames, size, nodes, depth = (int(rng.integers(1, most)) for most in (9, 9, 40, 9))
        law = rng.dirichlet(np.full(size + 1, 0.5), frames) if steps is None else rng.integers(0, steps, (frames, size + 1)) / 8
        tokens = np.array([rng.choice(12, size, replace=False) for _ in range(frames)])
        given = tokens, law[:, :-1], law[:, -1]
        plain, fast = OPERATIONS["prefixes"]
        assert fast(library(), *given, root=5, nodes=nodes, depth=depth) == plain(*given, root=5, nodes=nodes, depth=depth)
