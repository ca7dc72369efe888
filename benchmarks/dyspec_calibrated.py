"""Whether the rule accepts a child, against its draft probability: trials on real text, and DySpec's tree led by them.

DySpec takes the draft probability of a child for the probability that it is accepted. Here that is measured, on training
prompts, by sibling rank and draft probability, and `Calibrated` grows DySpec's tree with the measured one in its place. The
output stays exact: the table is fixed beforehand, and a draw is still decided on before its token is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from foredraft import LLM
from foredraft.bench.calibrate import RANKS, all_logits
from foredraft.draws import Draws
from foredraft.grow import DySpec
from foredraft.grow.base import Policy, Sapling, draft_sampling
from foredraft.protocols import Target
from foredraft.sampling import SamplingParams, TargetLaw, warp
from foredraft.tree import DraftTree, Drawn
from foredraft.verify import RULES

EDGES = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
"""Bins of the draft probability."""

RANK_EDGES = np.array([0, 1, 2, 3, 5, 9, 17])
"""First ranks of the groups of siblings that share a row of a table."""

_PRIOR = 20
"""A bin's share is drawn to the share of its ranks as if by so many trials."""


class Trials(NamedTuple):
    """Children that the rule tested: sibling rank, probability under the law that the child was drawn from (its earlier
    siblings taken out), whether it was accepted."""

    ranks: np.ndarray
    probs: np.ndarray
    accepted: np.ndarray


class Way(NamedTuple):
    """How children are drafted for a target temperature: the temperature of their law, and whether they are drawn."""

    temperature: float
    draft_temperature: float
    sampled: bool


def trials(llm: LLM, model: Target, texts: Sequence[Any], ways: Sequence[Way]) -> dict[Way, Trials]:
    """At every position of the target's own outputs, up to `RANKS` children and what the multi-round rule makes of them."""
    found: dict[Way, list[tuple[int, float, bool]]] = {way: [] for way in ways}
    for number, text in enumerate(texts):
        ids, begin = text.prompt_token_ids + text.outputs[0].token_ids, len(text.prompt_token_ids) - 1
        target_rows, draft_rows = (all_logits(one, ids[:-1])[begin:] for one in (llm.target, model))
        for place, (target, draft) in enumerate(zip(target_rows, draft_rows, strict=True)):
            for way, rows in found.items():
                rows += test_children(target, draft, way, Draws(number, place))
    return {way: Trials(*map(np.array, zip(*rows, strict=True))) for way, rows in found.items()}


def test_children(target: torch.Tensor, draft: torch.Tensor, way: Way, draws: Draws) -> list[tuple[int, float, bool]]:
    """The tested children of one node as (rank, probability, accepted), in order."""
    law = warp(draft[None], SamplingParams(temperature=way.draft_temperature))
    tokens = draws.order(law[0], ("draft", (), 0), RANKS) if way.sampled else law[0].topk(RANKS).indices.tolist()
    size, drawn = len(tokens) + 1, Drawn.WITHOUT_REPLACEMENT if way.sampled else Drawn.DETERMINISTIC
    row = np.full(size, -1)
    row[0] = 0 if way.sampled else -1
    tree = DraftTree(np.array([0, *tokens]), np.array([-1] + [0] * len(tokens)), np.full(size, int(drawn)), row, law)
    laws = TargetLaw(target.expand(size, -1), SamplingParams(temperature=way.temperature))
    path = RULES["multiround"].rule(tree, laws, draws).path
    probs = law[0][tokens].double().numpy()
    tested = path[0] if path else len(tokens)
    return [(rank, prob, rank == tested - 1 and bool(path)) for rank, prob in enumerate(conditional(probs)[:tested].tolist())]


def conditional(probs: np.ndarray) -> np.ndarray:
    """Probability of each child under the law without its earlier siblings."""
    before = np.concatenate([[0.0], probs.cumsum()[:-1]])
    return np.minimum(1.0, probs / np.maximum(1 - before, 1e-9))


@dataclass(frozen=True)
class Acceptance:
    """Measured acceptance of a tested child, by rank and draft probability.

    Attributes:
        share: by group of ranks and bin of probability.
        mean: by group of ranks.
    """

    share: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, found: Trials) -> Acceptance:
        """From trials."""
        group = np.searchsorted(RANK_EDGES, found.ranks, side="right") - 1
        place = np.clip(np.searchsorted(EDGES, found.probs, side="right") - 1, 0, len(EDGES) - 2)
        shape = len(RANK_EDGES), len(EDGES) - 1
        tested, accepted = np.zeros(shape), np.zeros(shape)
        np.add.at(tested, (group, place), 1)
        np.add.at(accepted, (group, place), found.accepted)
        mean = accepted.sum(1) / np.maximum(tested.sum(1), 1)
        return cls((accepted + _PRIOR * mean[:, None]) / (tested + _PRIOR), mean)

    def of_children(self, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For siblings in order, their acceptance when tested, and what it is before their tokens are known."""
        group = np.searchsorted(RANK_EDGES, np.arange(len(probs)), side="right") - 1
        place = np.clip(np.searchsorted(EDGES, conditional(probs), side="right") - 1, 0, len(EDGES) - 2)
        return self.share[group, place], self.mean[group]

    def reach_only(self) -> Acceptance:
        """With draws valued as the paper does, by the probability that they are reached."""
        return Acceptance(self.share, np.ones_like(self.mean))

    def rank_only(self) -> Acceptance:
        """Without a look at the draft probability: Sequoia's tree, found by DySpec."""
        return Acceptance(np.repeat(self.mean[:, None], self.share.shape[1], axis=1), self.mean)


@dataclass
class _Judged:
    """A sapling whose children DySpec values by measured acceptance a instead of draft probability.

    A child at rank i is worth v(u) a_i prod_{j<i} (1 - a_j); making the draw, before its token is seen, is worth
    v(u) m_i / m_0 prod_{j<i} (1 - a_j), m_i the mean acceptance of rank i. DySpec asks for probabilities p with 1 - p_0 - ... -
    p_{i-1} = the worth of draw i, so it is given the differences; where nothing is drawn, tokens are known and p is the worth.
    """

    tree: Sapling
    acceptance: Acceptance
    worth: dict[tuple[int, int], float] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tree, name)

    def pick(self, nodes: Sequence[int], laws: torch.Tensor, k: int) -> list[list[tuple[int, float]]]:
        """As in `Sapling`, with probabilities that lead DySpec by worth; no more children than were measured."""
        picked = self.tree.pick(nodes, laws, min(k, RANKS))
        return [self._judge(node, children) for node, children in zip(nodes, picked, strict=True)]

    def _judge(self, node: int, children: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        if not children:
            return []
        tokens, probs = zip(*children, strict=True)
        share, mean = self.acceptance.of_children(np.array(probs))
        reached = np.concatenate([[1.0], (1 - share).cumprod()])
        worth = reached[:-1] * share
        self.worth.update({(node, token): float(one) for token, one in zip(tokens, worth, strict=True)})
        if self.tree.sampled:
            draw = np.minimum.accumulate(reached[:-1] * mean / mean[0])
            worth = draw - np.append(draw[1:], 0.0)
        return list(zip(tokens, worth.tolist(), strict=True))

    def add(self, parent: int, token: int, prob: float, drawn: Drawn) -> int:
        """As in `Sapling`; the value is the worth."""
        return self.tree.add(parent, token, self.worth[parent, token], drawn)


@dataclass(frozen=True, kw_only=True)
class Calibrated(DySpec):
    """DySpec's tree by measured acceptance.

    Attributes:
        acceptance: for this temperature.
    """

    acceptance: Acceptance

    def policy(self, tree: Sapling) -> Policy:
        """As `DySpec`."""
        return super().policy(_Judged(tree, self.acceptance))  # type: ignore[arg-type]


def own_way(temperature: float, grower: DySpec) -> Way:
    """How a grower drafts for a temperature."""
    sampling = SamplingParams(temperature=temperature)
    return Way(temperature, float(draft_sampling(sampling, grower.draft_temperature).temperature), grower.samples(sampling))
