"""Measures the tokens per step of large trees at low cost. The target runs only on the accepted path.

A rule asks for the target's distribution at the root, then at the child that it accepted, and so on. `walk` decodes as
`foredraft.engine.decode` does, with the same random numbers and tokens. Only it runs the target on demand, node by node,
instead of on the whole tree. A tree of 768 nodes therefore costs only the rows of its accepted path. The target's time differs,
but it is not measured here.

Trees are not cut before the end of an output. Short outputs therefore show the behaviour of trees of full size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from foredraft import LLM
from foredraft.cache.blocks import num_blocks
from foredraft.cache.pool import prefill
from foredraft.core.contracts import AcceptanceRule, Budget, Target, Work
from foredraft.core.draws import Draws, hash_seed
from foredraft.core.law import likeliest, warp
from foredraft.core.params import SamplingParams
from foredraft.core.shape import MAX_DEPTH
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.drafters.lm import LMDrafter
from foredraft.trees import Options
from foredraft.trees.base import Policy, Sapling, grow_batch

SEQS = 8
DEPTHS = 64


class PathLaw:
    """The target's distributions along one path of a tree, computed on demand. It replaces `TargetLaw`."""

    def __init__(self, target: Target, cache: Any, tree: DraftTree, sampling: SamplingParams):
        self._target, self._cache, self._tree, self._sampling = target, cache, tree, sampling
        self._logits: dict[int, torch.Tensor] = {}

    @property
    def is_certain(self) -> bool:
        """Whether decoding is greedy, as in `TargetLaw`."""
        return self._sampling.temperature == 0

    def token(self, node: int) -> int:
        """Returns the most likely token, as in `TargetLaw`."""
        return likeliest(self._run(node))[0]

    def row(self, node: int) -> torch.Tensor:
        """Returns the distribution at a node, as in `TargetLaw`."""
        return warp(self._run(node), self._sampling)[0]

    def rows(self, nodes: Sequence[int]) -> list[torch.Tensor]:
        """Returns the distributions at a chain's nodes from the root on, as in `TargetLaw`, with one pass."""
        chain = TreeBatch.chains([self._tree.tokens[list(nodes)].tolist()])
        return list(warp(self._target.forward(chain, [self._cache]).logits, self._sampling))

    def _run(self, node: int) -> torch.Tensor:
        if node not in self._logits:
            path = [0, *self._tree.path_to(node)]
            assert all(ancestor in self._logits for ancestor in path[:-1]), "a rule asks for a node after its parent"
            last = len(path) - 1
            chain = TreeBatch.chains([self._tree.tokens[path].tolist()])
            scores = self._target.forward(chain, [self._cache], np.array([last]), start=[last])
            self._logits[node] = scores.logits
        return self._logits[node]


class CountingDrafter(LMDrafter):
    """A drafter that counts its passes per request and the nodes that they evaluate."""

    passes = 0
    evaluated = 0

    def expand(self, states: Any, partial: Any, node_ids: Any) -> Any:
        """Expands nodes as in `LMDrafter`, and counts them."""
        owners = np.searchsorted(partial.offsets, node_ids, side="right")
        self.passes += len(set(owners.tolist()))
        self.evaluated += len(node_ids)
        return super().expand(states, partial, node_ids)


@dataclass
class Watched:
    """A grower that keeps its saplings after they have grown. They hold the acceptance that the draft distribution predicts."""

    grower: Options
    saplings: list[Sapling] = field(default_factory=list)

    @property
    def draft_temperature(self) -> float | int | None:
        """Draft temperature of the grower."""
        return self.grower.draft_temperature

    def samples(self, sampling: SamplingParams) -> bool:
        """Returns whether the grower samples."""
        return self.grower.samples(sampling)

    def cut(self, vocab_size: int) -> int:
        """Returns the grower's `cut`."""
        return self.grower.cut(vocab_size)

    def policy(self, tree: Sapling) -> Policy:
        """Returns the grower's policy, and keeps the sapling."""
        self.saplings.append(tree)
        return self.grower.policy(tree)

    def grow(self, drafter: Any, work: Work) -> TreeBatch:
        """Grows trees as in `foredraft.core.contracts.Grower`, and forgets the saplings before."""
        self.saplings = []
        return grow_batch([self] * len(work), drafter, work)  # type: ignore[list-item]


@dataclass
class Tally:
    """Counts of a walk.

    Attributes:
        steps: number of steps.
        squares: sum of the squares of the numbers of accepted nodes per step, for the standard error.
        nodes: number of nodes of all trees.
        inner: number of nodes with children.
        passes: number of draft passes.
        evaluated: number of nodes that the drafter evaluated.
        promised: by depth, the sum of the nodes' values, which is the predicted number of accepted nodes. The first row counts
            all nodes; the second counts only nodes that are first children, like all of their ancestors.
        accepted: by depth, the number of accepted nodes, in the same two rows.
        width: by depth, the number of nodes.
    """

    steps: int = 0
    squares: int = 0
    nodes: int = 0
    inner: int = 0
    passes: int = 0
    evaluated: int = 0
    promised: np.ndarray = field(default_factory=lambda: np.zeros((2, DEPTHS + 1)))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros((2, DEPTHS + 1)))
    width: np.ndarray = field(default_factory=lambda: np.zeros(DEPTHS + 1))

    def add(self, tree: DraftTree, sapling: Sapling, path: Sequence[int]) -> None:
        """Adds a step to the counts."""
        kept = range(tree.num_nodes) if sapling.kept is None else sapling.kept
        values = np.array([sapling.values[node] for node in kept])
        first = np.array([not any(rank) for rank in tree.ranks])
        self.steps += 1
        self.squares += len(path) ** 2
        self.nodes += tree.num_nodes - 1
        self.inner += sum(map(bool, tree.children))
        self.width += np.bincount(tree.depths, minlength=DEPTHS + 1)
        for row, chosen in enumerate((np.ones_like(first), first)):
            self.promised[row] += np.bincount(tree.depths, weights=values * chosen, minlength=DEPTHS + 1)
            self.accepted[row] += np.bincount(tree.depths[path], weights=chosen[path], minlength=DEPTHS + 1)

    def row(self) -> dict[str, Any]:
        """Makes a row of means per step."""
        mean = float(self.accepted[0].sum()) / self.steps
        return {
            "steps": self.steps,
            "tokens_per_step": round(1 + mean, 4),
            "standard_error": round(math.sqrt(max(0.0, self.squares / self.steps - mean**2) / self.steps), 4),
            "promised_per_step": round(1 + float(self.promised[0, 1:].sum()) / self.steps, 4),
            "nodes_per_step": round(self.nodes / self.steps, 2),
            "inner_nodes": round(self.inner / self.steps, 2),
            "draft_passes": round(self.passes / self.steps, 3),
            "evaluated_nodes": round(self.evaluated / self.steps, 2),
            "depth_mean": round(float(self.width @ np.arange(DEPTHS + 1)) / max(self.nodes, 1), 2),
            "by_depth": {
                name: [round(float(x) / self.steps, 4) for x in values[1:9]]
                for name, values in (
                    ("promised", self.promised[0]),
                    ("accepted", self.accepted[0]),
                    ("promised_first", self.promised[1]),
                    ("accepted_first", self.accepted[1]),
                    ("nodes", self.width),
                )
            },
        }


def walk(llm: LLM, model: Target, grower: Options, rule: AcceptanceRule, prompts: Sequence[list[int]], **how: Any) -> Tally:
    """Decodes the prompts in waves. `how` holds the number of nodes, the temperature and max_tokens."""
    tally, watched = Tally(), Watched(grower)
    drafter = CountingDrafter(model, watched, llm.target.vocab_size, SEQS)
    numbered = list(enumerate(prompts))
    for begin in range(0, len(numbered), SEQS):
        Wave(llm, drafter, rule, tally, **how).run(numbered[begin : begin + SEQS])
    tally.passes, tally.evaluated = drafter.passes, drafter.evaluated
    return tally


@dataclass
class Wave:
    """A group of prompts that are decoded together."""

    llm: LLM
    drafter: CountingDrafter
    rule: AcceptanceRule
    tally: Tally
    nodes: int
    temperature: float
    max_tokens: int

    def run(self, numbered: Sequence[tuple[int, list[int]]]) -> None:
        """Decodes the prompts to their ends. Prompt i has the same random numbers as the i-th request of an `LLM`."""
        pool = self.llm.target.new_pool(num_blocks(self.llm.max_model_len, SEQS))
        sampling = SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)
        running = []
        for number, prompt in numbered:
            cache = pool.allocate()
            prefill(self.llm.target, [cache], [prompt[:-1]])
            draws = Draws(hash_seed(hash_seed(0, number), 0))
            running.append((list(prompt), len(prompt) + self.max_tokens, cache, draws, self.drafter.start(prompt, None, cache)))
        while running:
            self._step(running, pool, sampling)
            done = [request for request in running if request[0][-1] in self.llm.eos_ids or len(request[0]) >= request[1]]
            running = [request for request in running if request not in done]
            for request in done:
                self.drafter.finish(request[4])

    def _step(self, running: Sequence[Any], pool: Any, sampling: SamplingParams) -> None:
        work = Work(
            states=[request[4] for request in running],
            roots=[request[0][-1] for request in running],
            budgets=[Budget(self.nodes, min(MAX_DEPTH, self.nodes))] * len(running),
            sampling=[sampling] * len(running),
            draws=[draw.at(len(tokens)) for tokens, _, _, draw, _ in running],
        )
        batch = self.drafter.propose(work)
        for b, (tokens, most, cache, _, state) in enumerate(running):
            tree = batch[b]
            tree_law = PathLaw(self.llm.target, cache, tree, sampling)
            verdict = self.rule(tree, tree_law, work.draws[b])  # type: ignore[arg-type]
            grown = self.drafter.grower.saplings[b]  # type: ignore[attr-defined]
            self.tally.add(tree, grown, verdict.path)
            new = [*tree.tokens[verdict.path].tolist(), verdict.next_token]
            pool.keep([cache], [list(range(1, len(verdict.path) + 1))])
            self.drafter.observe(state, new, None, verdict.path)
            ends = [i + 1 for i, token in enumerate(new) if token in self.llm.eos_ids]
            tokens += new[: min([len(new), most - len(tokens), *ends[:1]])]
