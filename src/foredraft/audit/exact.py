"""Computes exact laws by enumeration, with a `Draws` that visits every branch.

Drafting is enumerated first, which gives a law over distinct trees. Then the rule is enumerated on each tree. This
factorisation requires that the rule and the drafting use different random numbers. So `Replay` records the keys of all random
numbers, and raises if a key is used twice or if the rule uses a key of the drafting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import AcceptanceRule, Budget, Verdict, Work
from foredraft.core.draws import Draws, Key
from foredraft.core.law import TargetLaw
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.models.table import random_law
from foredraft.rules.batched import PURPOSES

T = TypeVar("T")

_DEPTH = 3
_PREFIX = (0,)


class Replay:
    """One run of a random program. `script` gives the option of each choice. Choices beyond its end take the first option.

    Attributes:
        num_options: number of possible options of each choice so far.
        asked: keys of the random numbers so far.
        cells: for each of these keys, the interval of the uniform number that gives the outcome of the run.
        prob: probability of the run so far.
    """

    def __init__(self, script: list[int], forbidden: frozenset[Key]):
        self.script, self.forbidden = script, forbidden
        self.num_options: list[int] = []
        self.asked: set[Key] = set()
        self.cells: dict[Key, tuple[float, float]] = {}
        self.prob = 1.0

    def ask(self, key: Key) -> None:
        """Records the key of a random number.

        Raises:
            AssertionError: the key was used before, or by the drafting.
        """
        if key in self.asked:
            raise AssertionError(f"the random number with key {key} was used twice")
        if key in self.forbidden:
            raise AssertionError(f"the rule used the random number with key {key}, which the drafting used before")
        self.asked.add(key)

    def choose(self, weights: Sequence[float]) -> int:
        """Returns one of the options of positive weight."""
        place = len(self.num_options)
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        if place == len(self.script):
            self.script.append(0)
        self.num_options.append(len(possible))
        chosen = possible[self.script[place]]
        self.prob *= weights[chosen]
        return chosen

    def numbers(self, tree: DraftTree, share: float) -> Float[np.ndarray, "2 n"]:
        """Returns random numbers of all nodes that lead to this run, as a batched rule takes them.

        Args:
            tree: the tree that the run verified.
            share: place of each number within its interval, between 0 and 1. A key that the run did not ask gets ``1 - share``:
                its number must not matter.
        """
        cells = [[self.cells.get((purpose, path, 0), (1 - share, 1 - share)) for path in tree.ranks] for purpose in PURPOSES]
        low, high = np.moveaxis(np.array(cells), -1, 0)
        return low + share * (high - low)


@dataclass(frozen=True)
class Branches(Draws):
    """A `Draws` that branches at every random number. `enumerate_branches` visits all branches."""

    replay: Replay = field(kw_only=True)

    def at(self, num_committed: int) -> Branches:
        """Returns the same branches at another position of the output."""
        return replace(self, num_committed=num_committed)

    def _ask(self, key: Key) -> None:
        self.replay.ask((f"{self.num_committed}:{key[0]}", key[1], key[2]))

    def bernoulli(self, prob: float, key: Key) -> bool:
        """Branches into both outcomes; see `Draws.bernoulli`."""
        self._ask(key)
        prob = min(1.0, prob)
        is_hit = self.replay.choose([1 - prob, prob]) == 1
        self.replay.cells[key] = (0.0, prob) if is_hit else (prob, 1.0)
        return is_hit

    def categorical(self, probs: Tensor, key: Key) -> int:
        """Branches into every token of positive probability; see `Draws.categorical`."""
        self._ask(key)
        weights = (probs.double() / probs.double().sum()).tolist()
        token = self.replay.choose(weights)
        before = sum(weights[:token])
        self.replay.cells[key] = before, before + weights[token]
        return token

    def order(self, probs: Tensor, key: Key, k: int) -> list[int]:
        """Branches into every order of `k` tokens; see `Draws.order`."""
        self._ask(key)
        left, order = probs.double().clone(), []
        while len(order) < k and left.sum() > 0:
            order.append(self.replay.choose((left / left.sum()).tolist()))
            left[order[-1]] = 0
        return order

    def uniform(self, key: Key) -> float:
        """Raises an error: a number by itself has infinitely many values, and cannot be enumerated."""
        raise AssertionError(f"{key} asks for a uniform number, which cannot be enumerated")

    def of_nodes(self, *given: Any) -> None:  # type: ignore[override]
        """Returns None: single numbers cannot be enumerated. `Replay.numbers` gives those of one branch."""

    def order_rows(  # type: ignore[override]
        self, draws: Sequence[Any], probs: Tensor, keys: Sequence[Key], k: int, token_ids: Tensor | None = None
    ) -> list[list[int]]:
        """Runs `order` for several rows; see `Draws.order_rows`."""
        return [draw.order(row, key, k) for draw, row, key in zip(draws, probs, keys, strict=True)]


def enumerate_branches(run: Callable[[Any], T], forbidden: frozenset[Key] = frozenset()) -> Iterator[tuple[float, T, Replay]]:
    """Yields every outcome of `run(draws)` with its probability. Calls `run` once per outcome, depth-first over the choices."""
    script: list[int] = []
    while True:
        replay = Replay(script, forbidden)
        result = run(Branches(0, replay=replay))
        yield replay.prob, result, replay
        while script and script[-1] + 1 == replay.num_options[len(script) - 1]:
            script.pop()
        if not script:
            return
        script[-1] += 1


class TableExpander:
    """A drafter for tree policies that reads its draft logits from a law of the whole prefix.

    Attributes:
        num_passes: number of calls of `expand`.
        num_evaluated: number of nodes that these calls evaluated.
    """

    def __init__(self, law: Callable[[tuple[int, ...]], np.ndarray], vocab_size: int, prefix: Prefix):
        self.law, self.vocab_size, self.prefix = law, vocab_size, prefix
        self.num_passes = self.num_evaluated = 0

    def expand(self, states: Sequence[Any], partial: TreeBatch, node_ids: np.ndarray) -> Tensor:
        """Returns the draft logits after each node."""
        self.num_passes += 1
        self.num_evaluated += len(node_ids)
        tree = partial[0]
        rows = [self.law((*self.prefix, *(int(tree.tokens[i]) for i in tree.path_to(int(node))))) for node in node_ids]
        return torch.from_numpy(np.stack(rows)).log()


def target_law_of(law: Callable[[tuple[int, ...]], np.ndarray], tree: DraftTree, prefix: Prefix, temperature: float):
    """Returns the target's law on a tree, from a law of the whole prefix."""
    return TargetLaw(_logits_of(law, tree, prefix), SamplingParams(temperature=temperature))


def _logits_of(law: Callable[[tuple[int, ...]], np.ndarray], tree: DraftTree, prefix: Prefix) -> Tensor:
    rows = [law((*prefix, *(int(tree.tokens[i]) for i in tree.path_to(node)))) for node in range(tree.num_nodes)]
    return torch.from_numpy(np.stack(rows)).log()


Prefix = tuple[int, ...]
"""Tokens before the drafted ones."""

Grown = dict[bytes, tuple[float, DraftTree, frozenset[Key]]]
"""Content of a tree -> (its probability, the tree, the keys of the random numbers that drew it)."""


def tree_law(grower: Any, draft: Callable, vocab_size: int, budget: Budget, temperature: float, prefix: Prefix) -> Grown:
    """Returns the law over the distinct trees of a policy, with the keys of the random numbers that it used."""
    trees: Grown = {}

    def run(draws: Any) -> DraftTree:
        drafter = TableExpander(draft, vocab_size, prefix)
        sampling = SamplingParams(temperature=temperature)
        return grower.grow(drafter, Work([None], [prefix[-1]], [budget], [sampling], [draws]))[0]

    for prob, tree, replay in enumerate_branches(run):
        laws = b"".join(b"-" if (row := tree.law(node)) is None else row.numpy().tobytes() for node in range(tree.num_nodes))
        key = b"|".join([tree.tokens.tobytes(), tree.parents.tobytes(), tree.drawn.tobytes(), laws])
        before, _, keys = trees.get(key, (0.0, tree, frozenset()))
        trees[key] = (before + prob, tree, keys | replay.asked)
    return trees


def joint_law(
    trees: Grown, rule: AcceptanceRule, target: Callable, vocab_size: int, length: int, *, temperature: float, prefix: Prefix
) -> np.ndarray:
    """Returns the joint law of `length` tokens: those that the rule emits on every tree, continued by the target."""
    emitted: dict[tuple[int, ...], float] = defaultdict(float)
    for branch in branches_of(trees, rule, target, temperature, prefix):
        emitted[emitted_by(branch.tree, branch.verdict)] += branch.prob
    return continued(emitted, target, vocab_size, length, temperature, prefix)


class Branch(NamedTuple):
    """One outcome of a rule on one tree."""

    prob: float
    tree: DraftTree
    logits: Tensor
    verdict: Verdict
    replay: Replay


def branches_of(trees: Grown, rule: AcceptanceRule, target: Callable, temperature: float, prefix: Prefix) -> Iterator[Branch]:
    """Yields every outcome of a rule on every tree."""
    for prob, tree, keys in trees.values():
        logits = _logits_of(target, tree, prefix)
        law = TargetLaw(logits, SamplingParams(temperature=temperature))

        def run(draws: Any, tree: DraftTree = tree, law: TargetLaw = law) -> Verdict:
            return rule(tree, law, draws)

        for share, verdict, replay in enumerate_branches(run, keys):
            yield Branch(prob * share, tree, logits, verdict, replay)


def emitted_by(tree: DraftTree, verdict: Verdict) -> tuple[int, ...]:
    """Returns the tokens that a verdict emits."""
    return (*tree.tokens[verdict.path].tolist(), verdict.next_token)


def continued(
    emitted: Mapping[tuple[int, ...], float], target: Callable, size: int, length: int, temperature: float, prefix: Prefix
) -> np.ndarray:
    """Returns the joint law of `length` tokens that start with the emitted ones and go on by the target."""
    joint = np.zeros((size,) * length)
    for tokens in product(range(size), repeat=length):
        for cut in range(length + 1):  # spreads every emitted prefix over its continuations
            if tokens[:cut] in emitted:
                joint[tokens] += emitted[tokens[:cut]] * chain_prob(target, tokens, cut, temperature, prefix)
    return joint


def chain_prob(target: Callable, tokens: tuple[int, ...], start: int, temperature: float, prefix: Prefix) -> float:
    """Returns the target's probability of ``tokens[start:]`` after ``tokens[:start]``."""
    prob = 1.0
    for i in range(start, len(tokens)):
        row = target((*prefix, *tokens[:i]))
        prob *= float(row.argmax() == tokens[i]) if temperature == 0 else row[tokens[i]]
    return prob


def target_joint(target: Callable, vocab_size: int, length: int, temperature: float, prefix: Prefix) -> np.ndarray:
    """Returns the target's joint law of `length` tokens, the reference for `joint_law`."""
    probs = [chain_prob(target, tokens, 0, temperature, prefix) for tokens in product(range(vocab_size), repeat=length)]
    return np.array(probs).reshape((vocab_size,) * length)


def enumerated_error(grower: Any, rule: AcceptanceRule, size: int, nodes: int, temperature: float) -> float:
    """Returns the largest error of an enumerated law over two draft laws and two target laws of the whole prefix.

    The error is the difference between the target's joint law and that of the rule's output, continued by the target. `size`
    is the size of the vocabulary and `nodes` the number of nodes of the trees of `grower`.
    """
    worst, length = 0.0, min(nodes, _DEPTH) + 1
    drafts = [random_law(size, 1), random_law(size, 2, zeros=0.3, concentration=0.6)]
    targets = [random_law(size, 3), random_law(size, 4, zeros=0.3)]
    for draft in drafts:
        trees = tree_law(grower, draft, size, Budget(nodes, min(nodes, _DEPTH)), temperature, _PREFIX)
        for target in targets:
            law = joint_law(trees, rule, target, size, length, temperature=temperature, prefix=_PREFIX)
            worst = max(worst, float(np.abs(law - target_joint(target, size, length, temperature, _PREFIX)).max()))
    return worst
