"""Shared parts of all tree policies: building one tree, and growing the trees of a batch together.

A policy is a generator for one request. It yields the nodes whose draft laws it needs, receives the laws and adds children,
until the tree is complete. `grow_batch` runs the policies of a batch in lockstep, so each round is one call of the drafter.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import Budget, Expander, Work
from foredraft.core.draws import Draws
from foredraft.core.law import largest, lawful, limits_of
from foredraft.core.params import SamplingParams
from foredraft.core.tree import Drawn, TreeBatch


class Siblings(NamedTuple):
    """Children picked for one node, in draw order: their tokens and their draft probabilities."""

    tokens: Int[np.ndarray, " k"]
    probs: Float[np.ndarray, " k"]

    def pairs(self) -> list[tuple[int, float]]:
        """Returns (token, draft probability) for each child."""
        return list(zip(self.tokens.tolist(), self.probs.tolist(), strict=True))


@dataclass(frozen=True)
class Laws:
    """Draft laws of some nodes, one row per node, on the CPU.

    Attributes:
        probs: probability of each entry.
        token_ids: token of each entry, most likely first, if the laws are cut to their most likely tokens. None means that
            entry j is token j.
    """

    probs: Float[Tensor, "n k"]
    token_ids: Int[Tensor, "n k"] | None = None

    def __getitem__(self, rows: slice) -> Laws:
        return Laws(self.probs[rows], None if self.token_ids is None else self.token_ids[rows])

    def siblings(self, row: int, entries: Sequence[int]) -> Siblings:
        """Returns some entries of a row as siblings."""
        places = np.asarray(entries, np.int64)
        tokens = places if self.token_ids is None else self.token_ids[row].numpy()[places]
        return Siblings(tokens, self.probs[row].double().numpy()[places])

    @staticmethod
    def joined(parts: Sequence[Laws]) -> Laws:
        """Concatenates laws that are cut to the same number of tokens."""
        ids = [part.token_ids for part in parts if part.token_ids is not None]
        return Laws(torch.cat([part.probs for part in parts]), torch.cat(ids) if ids else None)


Policy = Generator[list[int], Laws, None]
"""Grows one tree: yields nodes, and is sent their draft laws."""


@runtime_checkable
class PolicyOptions(Protocol):
    """What growing asks of the options of a policy, see `foredraft.trees.options.Options`."""

    @property
    def draft_temperature(self) -> float | int | None:
        """Temperature of the draft law."""

    def cut(self, vocab_size: int) -> int:
        """Returns the number of tokens that a draft law keeps."""
        ...

    def samples(self, sampling: SamplingParams) -> bool:
        """Returns whether a request draws children."""
        ...

    def policy(self, tree: Any) -> Policy:
        """Returns the policy that grows a `Sapling`."""
        ...

    def grow(self, drafter: Any, work: Any) -> TreeBatch:
        """Grows one tree per request; see `foredraft.core.contracts.Grower`."""
        ...


GREEDY_DRAFT_TEMPERATURE = 0.6
"""Draft temperature for greedy requests, as in the experiments of DySpec and Sequoia."""


@dataclass
class Sapling:
    """A tree that is still growing. Node 0 is the root. Lists have one entry per node.

    Attributes:
        root: token of the root.
        budget: largest number of nodes and largest depth, the root not included.
        draws: random numbers of the request.
        sampled: whether children are sampled. If not, the most likely tokens are taken.
        tokens: token ids.
        parents: parent of each node, -1 for the root.
        depths: depth of each node, 0 for the root.
        ranks: sibling ranks on the path from the root to each node.
        values: estimated probability that each node is accepted: the draft probability of its path.
        drawn: how the children of each node are drawn, a `Drawn`.
        rows: row of each node's draft law, -1 without a law.
        num_children: number of children of each node.
        kept: nodes that remain in the finished tree, or None for all.
        num_passes: number of calls of the drafter so far.
        num_evaluated: number of nodes that these calls evaluated.
    """

    root: int
    budget: Budget
    draws: Draws
    sampled: bool
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ranks: list[tuple[int, ...]] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    num_children: list[int] = field(default_factory=list)
    kept: list[int] | None = None
    num_passes: int = 0
    num_evaluated: int = 0

    def __post_init__(self) -> None:
        self._append(self.root, -1, 0, (), 1.0)

    def add(self, parent: int, token: int, prob: float, drawn: Drawn) -> int:
        """Adds a last child of `parent` and returns its node. `prob` is the draft probability of `token`."""
        rank = self.num_children[parent]
        self.num_children[parent] += 1
        self.drawn[parent] = drawn
        value = self.values[parent] * prob
        return self._append(token, parent, self.depths[parent] + 1, (*self.ranks[parent], rank), value)

    def _append(self, token: int, parent: int, depth: int, ranks: tuple[int, ...], value: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
        self.ranks.append(ranks)
        self.values.append(value)
        self.drawn.append(Drawn.DETERMINISTIC)
        self.rows.append(-1)
        self.num_children.append(0)
        return len(self.tokens) - 1

    def pick(self, nodes: Sequence[int], laws: Laws, k: int) -> list[Siblings]:
        """Picks up to `k` distinct children of each node, in draw order.

        They are sampled without replacement if `sampled`, else they are the most likely tokens in descending order. Which of
        the two holds does not depend on any token.
        """
        if self.sampled:
            keys = [("draft", self.ranks[node], 0) for node in nodes]
            arrivals = self.draws.order_rows([self.draws] * len(nodes), laws.probs, keys, k, laws.token_ids)
            return [laws.siblings(row, entries) for row, entries in enumerate(arrivals)]
        if laws.token_ids is not None:
            tokens, probs = laws.token_ids[:, :k], laws.probs[:, :k]
        else:
            probs, tokens = largest(laws.probs, k)
        tokens, probs = tokens.numpy(), probs.numpy().astype(np.float64)
        if min(probs[:, -1].tolist()) > 0:
            return [Siblings(*row) for row in zip(tokens, probs, strict=True)]
        counts = (probs > 0).sum(1).tolist()  # positive entries come first
        return [Siblings(tokens[row, :count], probs[row, :count]) for row, count in enumerate(counts)]

    def draw(self, node: int, laws: Laws, k: int) -> list[int]:
        """Adds `k` independent draws below `node` and returns the new nodes. `laws` holds the law of `node` only."""
        entries = [self.draws.categorical(laws.probs[0], ("draft", self.ranks[node], i)) for i in range(k)]
        return [self.add(node, token, prob, Drawn.IID) for token, prob in laws.siblings(0, entries).pairs()]

    @property
    def way(self) -> Drawn:
        """How `pick` draws children."""
        return Drawn.WITHOUT_REPLACEMENT if self.sampled else Drawn.DETERMINISTIC

    def keep_only(self, nodes: Sequence[int]) -> None:
        """Restricts the tree to `nodes`: they include the root, with parents before children and siblings in draw order."""
        self.kept = list(nodes)


def draft_sampling(sampling: SamplingParams, draft_temperature: float | int | None) -> SamplingParams:
    """Returns the sampling parameters of the draft law: those of the request, at the draft temperature.

    A greedy request needs a separate temperature: at 0 the draft law would be one-hot and every tree a chain.
    """
    temperature = draft_temperature or sampling.temperature or GREEDY_DRAFT_TEMPERATURE
    return sampling.at_temperature(temperature)


def grow_batch(growers: Sequence[PolicyOptions], drafter: Expander, work: Work) -> TreeBatch:
    """Grows one tree per request, each by its own policy. Each round is one call of the drafter for the whole batch."""
    trees = [
        Sapling(root, budget, draw, grower.samples(params))
        for grower, root, budget, draw, params in zip(growers, work.roots, work.budgets, work.draws, work.sampling, strict=True)
    ]
    laws = [draft_sampling(params, grower.draft_temperature) for grower, params in zip(growers, work.sampling, strict=True)]
    policies = [grower.policy(tree) for grower, tree in zip(growers, trees, strict=True)]
    wanted = [_advance(policy, None) for policy in policies]
    passes: list[Laws] = []
    num_rows, sampled = 0, any(tree.sampled for tree in trees)
    while any(wanted):
        grown = [tree.tokens for tree in trees], [tree.parents for tree in trees]
        partial = TreeBatch.chains(*grown) if num_rows else TreeBatch.roots(work.roots)
        node_ids = np.concatenate([np.asarray(w, np.int64) + partial.offsets[b] for b, w in enumerate(wanted)])
        logits = drafter.expand(work.states, partial, node_ids)
        found = _warp_batch(logits, laws, wanted, max(grower.cut(logits.shape[1]) for grower in growers))
        if sampled:  # verification needs only laws that tokens were drawn from
            passes.append(found)
        done = 0
        for b, nodes in enumerate(wanted):
            if nodes:
                for i, node in enumerate(nodes):
                    trees[b].rows[node] = num_rows + done + i
                trees[b].num_passes += 1
                trees[b].num_evaluated += len(nodes)
                wanted[b] = _advance(policies[b], found[done : done + len(nodes)])
                done += len(nodes)
        num_rows += done
    return pack(trees, Laws.joined(passes) if passes else None, drafter.vocab_size)


def _advance(policy: Policy, laws: Laws | None) -> list[int]:
    """Returns the nodes that `policy` needs next, or none if its tree is complete."""
    try:
        return next(policy) if laws is None else policy.send(laws)
    except StopIteration:
        return []


def _warp_batch(
    logits: Float[Tensor, "n v"], laws: Sequence[SamplingParams], wanted: Sequence[Sequence[int]], cut: int
) -> Laws:
    """Returns draft laws on the CPU. On a GPU, single draws would cost more in kernel launches than in work."""
    token_ids = None
    if cut < logits.shape[1]:
        logits, token_ids = (part.cpu() for part in logits.topk(cut))
    logits = logits.cpu()
    if all(limits_of(law) == limits_of(laws[0]) for law in laws[1:]):
        return Laws(lawful(logits, laws[0]).probs, token_ids)
    parts = logits.split([len(nodes) for nodes in wanted])
    return Laws(torch.cat([lawful(part, law).probs for part, law in zip(parts, laws, strict=True)]), token_ids)


def pack(trees: Sequence[Sapling], laws: Laws | None, vocab_size: int) -> TreeBatch:
    """Packs trees into a batch, restricted to the nodes that they keep. A node without sampled children has no draft row."""
    tokens, parents, drawn, rows, offsets = [], [], [], [], [0]
    for tree in trees:
        if tree.kept is None:
            tokens += tree.tokens
            parents += tree.parents
            chosen = range(len(tree.tokens))
        else:
            chosen = tree.kept
            place = {node: i for i, node in enumerate(chosen)} | {-1: -1}
            tokens += [tree.tokens[node] for node in chosen]
            parents += [place[tree.parents[node]] for node in chosen]
        inner = {tree.parents[node] for node in chosen}
        drawn += [tree.drawn[node] if node in inner else 0 for node in chosen]
        rows += [tree.rows[node] if tree.drawn[node] and node in inner else -1 for node in chosen]
        offsets.append(len(tokens))
    columns = {"tokens": tokens, "parents": parents, "drawn": drawn, "draft_row": rows, "offsets": offsets}
    whole = laws or Laws(torch.empty(0, 0))
    arrays = {name: np.asarray(column, np.int64) for name, column in columns.items()}
    return TreeBatch(**arrays, draft_probs=whole.probs, draft_ids=whole.token_ids, vocab_size=vocab_size)


@dataclass(frozen=True)
class ByTemperature:
    """Uses one policy for greedy requests and another for sampled requests.

    Attributes:
        greedy: policy at temperature 0.
        sampled: policy at temperatures above 0.
    """

    greedy: PolicyOptions
    sampled: PolicyOptions

    def grow(self, drafter: Expander, work: Work) -> TreeBatch:
        """Grows one tree per request; see `foredraft.core.contracts.Grower`."""
        growers = [self.sampled if params.temperature > 0 else self.greedy for params in work.sampling]
        if all(grower is growers[0] for grower in growers):
            return growers[0].grow(drafter, work)
        return grow_batch(growers, drafter, work)
