"""Addressed randomness: reproducible, distinct, uniform, and never a token without probability.

Statistical tests have fixed seeds; the false-alarm rate said is that of a fresh seed for a correct generator.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from foredraft import kernels as compiled
from foredraft.core.draws import Draws, hash_seed, mix
from foredraft.core.tree import TreeBatch

SEEDS = [0, 1, -1, 7, 2**63, 2**64 - 1, -(2**63), 10**30]


@dataclass(frozen=True)
class Fixed(Draws):
    """Draws whose uniform number is always the same."""

    value: float = 0.0

    def uniform(self, key):
        return self.value


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    return np.array([Draws(seed, i % 7).uniform(("test", (i % 3, i), i % 5)) for i in range(count)])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations above its mean (normal approximation, many degrees of freedom)."""
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the published generator with seed 0: its state after i steps is i times the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    words = [mix(golden * i % 2**64) for i in (1, 2, 3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed", SEEDS)
def test_scalar_and_vectorised_numbers_are_the_same(seed: int) -> None:
    """`order_rows` races with the numbers that `uniform` gives at index = token id: the order can be recomputed from them."""
    draws, path = Draws(seed, 12), (0, 3, 1)
    probs = torch.from_numpy(np.random.default_rng(3).dirichlet(np.ones(200)))
    numbers = [draws.uniform(("draft", path, token)) + 2.0**-54 for token in range(200)]
    arrival = [-math.log(u) / p for u, p in zip(numbers, probs.tolist(), strict=True)]
    expected = sorted(range(200), key=lambda token: arrival[token])
    assert draws.order(probs, ("draft", path, 0), 200) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_are_multiples_of_2_to_the_minus_53_in_the_unit_interval(seed: int) -> None:
    for index in range(50):
        u = Draws(seed, 3).uniform(("a", (), index))
        assert 0 <= u < 1 and (u * 2**53).is_integer()


def test_asking_changes_nothing() -> None:
    """Any order, any batch, any number of times."""
    draws, probs = Draws(5, 9), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    keys = [("draft", (i,), 0) for i in range(6)]
    alone = {key: (draws.uniform(key), draws.categorical(probs, key), draws.order(probs, key, 3)) for key in keys}
    for key in reversed(keys):
        assert (draws.uniform(key), draws.categorical(probs, key), draws.order(probs, key, 3)) == alone[key]
    batch = Draws.order_rows([draws] * 6, probs.expand(6, 4), keys, 3)
    assert batch == [alone[key][2] for key in keys]
    assert Draws(5, 1).at(9) == draws and draws.at(10).uniform(keys[0]) != draws.uniform(keys[0])


def test_rows_of_a_batch_belong_to_their_own_draws() -> None:
    draws = [Draws(seed, n) for seed, n in ((1, 5), (2, 5), (1, 6))]
    probs = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = [("draft", (b,), 0) for b in range(3)]
    assert Draws.order_rows(draws, probs, keys, 50) == [
        one.order(row, key, 50) for one, row, key in zip(draws, probs, keys, strict=True)
    ]


@pytest.mark.parametrize("compiled_too", [False, True])
def test_numbers_of_all_nodes_are_those_of_each(compiled_too: bool) -> None:
    """Exactly, for random trees, seeds and positions; in numpy and compiled."""
    if compiled_too and compiled.library() is None:
        pytest.skip("no compiled kernels run here")
    rng = np.random.default_rng(0)
    own = [np.arange(size) for size in (1, 1, *rng.integers(1, 40, 60))]
    parents = [np.where(nodes == 0, -1, (rng.random(len(nodes)) * nodes).astype(np.int64)) for nodes in own]
    batch = TreeBatch.chains([[0] * len(nodes) for nodes in own], [nodes.tolist() for nodes in parents])
    draws = [Draws(seed, 3 * b) for b, seed in zip(range(len(batch)), itertools.cycle(SEEDS), strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        if not compiled_too:
            plain = compiled.OPERATIONS["uniforms"].plain
            patch.setitem(compiled.OPERATIONS, "uniforms", compiled.Operation(plain, lambda _, **given: plain(**given)))
        found = Draws.of_nodes(draws, ("accept", "next", "x"), batch.offsets, batch.parents)
    assert found is not None
    for row, purpose in zip(found, ("accept", "next", "x"), strict=True):
        wanted = [own.uniform((purpose, path, 0)) for b, own in enumerate(draws) for path in batch[b].ranks]
        assert row.tolist() == wanted


def test_every_part_of_the_address_counts() -> None:
    """20,160 different addresses give 20,160 different numbers (a collision of 53 bits: below 3e-8)."""
    paths = [(), *itertools.product(range(3)), *itertools.product(range(3), repeat=2), (0, 0, 0), (1, 2, 0)]
    addresses = itertools.product([*SEEDS[:4], -7, 99, 12345], range(10), ["draft", "accept", "next"], paths, range(6))
    numbers = [Draws(seed, n).uniform((purpose, path, i)) for seed, n, purpose, path, i in addresses]
    assert len(set(numbers)) == len(numbers) == 7 * 10 * 3 * len(paths) * 6


def test_a_path_is_no_sum_of_its_ranks() -> None:
    draws = Draws(0, 0)
    paths = list(itertools.chain.from_iterable(itertools.product(range(4), repeat=depth) for depth in range(6)))
    assert len({draws.uniform(("x", path, 0)) for path in paths}) == len(paths)


def test_parts_of_a_seed_differ() -> None:
    seeds = {hash_seed(seed, number) for seed in (*SEEDS[:4], -7) for number in range(1000)}
    assert len(seeds) == 5000
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_uniformity() -> None:
    """Chi-square over 256 bins and Kolmogorov-Smirnov, 20,000 numbers; each fails one correct seed in about 1e-5."""
    numbers = np.sort(uniforms(20_000))
    counts = np.histogram(numbers, 256, (0, 1))[0]
    assert abs(chi_square(counts, np.full(256, 20_000 / 256))) < 4.5
    gap = max(np.abs(numbers - np.arange(20_000) / 20_000).max(), np.abs(numbers - np.arange(1, 20_001) / 20_000).max())
    assert gap * math.sqrt(20_000) < 2.47  # 2 exp(-2 * 2.47^2) = 1e-5


@pytest.mark.parametrize("neighbour", ["index", "path", "committed", "seed", "purpose"])
def test_neighbouring_addresses_are_independent(neighbour: str) -> None:
    """Pairs over a grid of 16 x 16, 10,000 of them, chi-square within 4.5 standard deviations (one correct seed in 1e-5)."""

    def pair(i: int) -> tuple[float, float]:
        first = Draws(i, 4).uniform(("a", (i % 5,), i))
        second = {
            "index": lambda: Draws(i, 4).uniform(("a", (i % 5,), i + 1)),
            "path": lambda: Draws(i, 4).uniform(("a", (i % 5 + 1,), i)),
            "committed": lambda: Draws(i, 5).uniform(("a", (i % 5,), i)),
            "seed": lambda: Draws(i + 1, 4).uniform(("a", (i % 5,), i)),
            "purpose": lambda: Draws(i, 4).uniform(("b", (i % 5,), i)),
        }[neighbour]()
        return first, second

    pairs = np.array([pair(i) for i in range(10_000)])
    counts = np.histogram2d(pairs[:, 0], pairs[:, 1], 16, [[0, 1], [0, 1]])[0].ravel()
    assert abs(chi_square(counts, np.full(256, 10_000 / 256))) < 4.5


def test_categorical_law() -> None:
    """20,000 draws; every count within 4.5 standard deviations (5 tokens: fails one correct seed in 3e-5)."""
    probs = torch.tensor([0.05, 0.0, 0.5, 0.25, 0.2])
    counts = Counter(Draws(i, 2).categorical(probs, ("next", (), 0)) for i in range(20_000))
    assert counts[1] == 0
    for token, prob in enumerate(probs.tolist()):
        assert abs(counts[token] - 20_000 * prob) <= 4.5 * math.sqrt(20_000 * prob * (1 - prob))


def test_ordered_pairs_have_the_law_of_draws_without_replacement() -> None:
    """30,000 orders of 2 out of 4 (one without mass): P(a, b) = p_a p_b / (1 - p_a), every count within 4.5 standard deviations
    (6 pairs: one correct seed in 4e-5)."""
    probs = torch.tensor([0.6, 0.3, 0.0, 0.1], dtype=torch.float64)
    num = 30_000
    rows = Draws.order_rows([Draws(i, 1) for i in range(num)], probs.expand(num, 4), [("draft", (), 0)] * num, 2)
    counts = Counter(map(tuple, rows))
    p = probs.tolist()
    pairs = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations((0, 1, 3), 2)}
    assert set(counts) == set(pairs) and sum(pairs.values()) == pytest.approx(1)
    for pair, prob in pairs.items():
        assert abs(counts[pair] - num * prob) < 4.5 * math.sqrt(num * prob * (1 - prob))


def test_a_longer_order_begins_with_the_shorter_one() -> None:
    probs = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    orders = [Draws(8, 1).order(probs, ("draft", (), 0), k) for k in (0, 1, 5, 30, 99)]
    assert [len(order) for order in orders] == [0, 1, 5, 30, 30]
    assert all(orders[-1][: len(order)] == order for order in orders)
    assert sorted(orders[-1]) == list(range(30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_never_a_token_without_probability(dtype: torch.dtype) -> None:
    """Also with probabilities as small as the type can hold: they are drawn, and last, if nothing else is left."""
    probs = torch.zeros(40, dtype=dtype)
    probs[[3, 17, 29]] = torch.tensor([0.75, 0.25, torch.finfo(dtype).tiny], dtype=dtype)
    if dtype == torch.float64:
        probs[29] = 1e-300
    for seed in range(300):
        assert Draws(seed, 0).categorical(probs, ("next", (), 0)) in (3, 17)
        order = Draws(seed, 0).order(probs, ("draft", (), 0), 40)
        assert sorted(order) == [3, 17, 29] and order[-1] == 29


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_categorical_at_the_ends_of_the_unit_interval(dtype: torch.dtype, value: float) -> None:
    probs = torch.tensor([0, 0, 0.25, 0, 0.5, 0.25, 0, 0], dtype=dtype)
    expected = {0.0: 2, 2.0**-53: 2, 0.5: 4, 1 - 2.0**-53: 5}[value]
    assert Fixed(0, value=value).categorical(probs, ("next", (), 0)) == expected


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 0.3, 1.0, 7.0, 1e300])
def test_categorical_when_the_number_is_rounded_up_to_the_mass(scale: float) -> None:
    """(1 - 2**-53) times the mass can round to the mass; the last token with probability is the answer then."""
    probs = torch.tensor([0.0, 0.7, 0.3, 0.0], dtype=torch.float64) * scale
    assert Fixed(0, value=1 - 2.0**-53).categorical(probs, ("next", (), 0)) == 2
    assert Fixed(0, value=0.0).categorical(probs, ("next", (), 0)) == 1
    subnormal = torch.tensor([0.0, 5e-324, 0.0], dtype=torch.float64)
    assert Fixed(0, value=1 - 2.0**-53).categorical(subnormal, ("next", (), 0)) == 1


def test_laws_of_one_token() -> None:
    for seed in SEEDS:
        assert Draws(seed).categorical(torch.ones(1), ("next", (), 0)) == 0
        assert Draws(seed).order(torch.ones(1), ("draft", (), 0), 3) == [0]
        one_hot = torch.tensor([0.0, 0.0, 1.0])
        assert Draws(seed).categorical(one_hot, ("next", (), 0)) == 2
        assert Draws(seed).order(one_hot, ("draft", (), 0), 3) == [2]


@pytest.mark.parametrize("probs", [[0.0, 0.0], [math.nan, 0.5]])
def test_a_law_without_mass_is_refused(probs: list[float]) -> None:
    with pytest.raises(ValueError, match="without mass"):
        Draws(0).categorical(torch.tensor(probs), ("next", (), 0))
    assert Draws(0).order(torch.zeros(2), ("draft", (), 0), 2) == []


def test_bernoulli_is_strict() -> None:
    """Probability 0 never happens, 1 always does, at both ends of the interval; a rate of 0.3 is met within 4.5 standard
    deviations of 10,000 (one correct seed in 1e-5)."""
    for value in (0.0, 1 - 2.0**-53):
        assert not Fixed(0, value=value).bernoulli(0.0, ("accept", (), 0))
        assert Fixed(0, value=value).bernoulli(1.0, ("accept", (), 0))
    assert not Draws(0).bernoulli(math.nan, ("accept", (), 0))
    hits = sum(Draws(i).bernoulli(0.3, ("accept", (1,), 0)) for i in range(10_000))
    assert abs(hits - 3000) < 4.5 * math.sqrt(2100)


def test_seeds_are_taken_modulo_2_to_the_64() -> None:
    key = ("next", (), 0)
    assert Draws(-1).uniform(key) == Draws(2**64 - 1).uniform(key)
    assert len({Draws(seed).uniform(key) for seed in (-3, -2, -1, 0, 1, 2, 3)}) == 7


@pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 4096])
def test_the_compiled_token_is_the_plain_one(size: int) -> None:
    """For numbers all over [0, 1), the ends and bounds between tokens too; never a token of zero probability, nor one of a law
    without mass."""
    generator = torch.Generator().manual_seed(size)
    probs = (3 * torch.randn(5, size, generator=generator)).softmax(-1)
    probs[1, size // 2 :] = 0
    probs[2, : size // 2] = 0
    probs[3] = 0
    probs[4] = 1 / size  # a half is a bound between tokens if the size is even
    uniforms = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53, *torch.rand(50, generator=generator, dtype=torch.float64).tolist()]
    for law, uniform in itertools.product(probs, uniforms):
        plain, fast = compiled.OPERATIONS["categorical"]
        token = plain(law, uniform)
        assert fast(compiled.library(), law, uniform) == token
        assert law[token] > 0 if law.sum() > 0 else token == -1


@pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 4096])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 4096])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_compiled_race_is_the_plain_one(size: int, count: int, sparse: bool) -> None:
    """The same entries in the same order; zeros never arrive; addressed by token.

    Both logarithms are off by one unit in the last place at most, and both quotients by half a unit. So the times differ by at
    most three units.
    """
    generator = torch.Generator().manual_seed(size)
    probs = (4 * torch.randn(6, size, generator=generator)).softmax(-1)
    probs[1, ::2] = 0
    probs[2] = 0
    probs[3] = torch.nn.functional.one_hot(torch.tensor(size // 2), size)
    probs[4] = 1e-40  # as small as float32 can be
    token_ids = torch.randperm(10**6, generator=generator)[: 6 * size].view(6, size) if sparse else None
    starts = [Draws(i, 9)._start(("draft", (i,), 0)) for i in range(6)]
    count = min(count, size)
    given = {"starts": starts, "count": count, "token_ids": token_ids}
    plain_race, fast_race = compiled.OPERATIONS["race"]
    plain, found = plain_race(probs, **given), fast_race(compiled.library(), probs, **given)
    torch.testing.assert_close(found.times, plain.times, rtol=3 * 2.0**-52, atol=0)
    arrived = plain.times < float("inf")
    assert torch.equal(found.entries[arrived], plain.entries[arrived])
