"""Trials on real text of whether the rule accepts a child, by its draft probability, and acceptance tables from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from foredraft import LLM
from foredraft.bench.calibrate import RANKS, all_logits
from foredraft.core.contracts import Target
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw, warp
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, Drawn
from foredraft.rules import RULES
from foredraft.trees.acceptance import AcceptanceTable, Trial, conditional
from foredraft.trees.base import draft_sampling
from foredraft.trees.dyspec import DySpec, DySpecCalibrated


class Trials(NamedTuple):
    """Children that the rule tested.

    Attributes:
        ranks: sibling rank.
        probs: probability under the distribution from which the child was drawn, without its earlier siblings.
        accepted: whether the child was accepted.
    """

    ranks: np.ndarray
    probs: np.ndarray
    accepted: np.ndarray


class Way(NamedTuple):
    """How children are drafted.

    Attributes:
        temperature: temperature of the target.
        draft_temperature: temperature of the draft distribution.
        sampled: whether children are sampled; if not, the most likely ones are taken.
    """

    temperature: float
    draft_temperature: float
    sampled: bool


def trials(llm: LLM, model: Target, texts: Sequence[Any], ways: Sequence[Way]) -> dict[Way, Trials]:
    """Offers up to `RANKS` children to the multi-round rule at every position of the target's outputs."""
    found: dict[Way, list[tuple[int, float, bool]]] = {way: [] for way in ways}
    for number, text in enumerate(texts):
        ids, begin = text.prompt_token_ids + text.outputs[0].token_ids, len(text.prompt_token_ids) - 1
        target_rows, draft_rows = (all_logits(scored, ids[:-1])[begin:] for scored in (llm.target, model))
        for place, (target, draft) in enumerate(zip(target_rows, draft_rows, strict=True)):
            for way, rows in found.items():
                rows += test_children(target, draft, way, Draws(number, place))
    return {way: Trials(*map(np.array, zip(*rows, strict=True))) for way, rows in found.items()}


def test_children(target: torch.Tensor, draft: torch.Tensor, way: Way, draws: Draws) -> list[tuple[int, float, bool]]:
    """Returns the tested children of one node as (rank, probability, accepted), in order."""
    law = warp(draft[None], SamplingParams(temperature=way.draft_temperature))
    tokens = draws.order(law[0], ("draft", (), 0), RANKS) if way.sampled else law[0].topk(RANKS).indices.tolist()
    size, drawn = len(tokens) + 1, Drawn.WITHOUT_REPLACEMENT if way.sampled else Drawn.DETERMINISTIC
    row = np.full(size, -1)
    row[0] = 0 if way.sampled else -1
    tree = DraftTree(np.array([0, *tokens]), np.array([-1] + [0] * len(tokens)), np.full(size, int(drawn)), row, law)
    laws = TargetLaw(target.expand(size, -1), SamplingParams(temperature=way.temperature))
    path = RULES["multiround"].rule(tree, laws, draws).path
    probs = conditional(law[0][tokens].double().numpy())
    tested = path[0] if path else len(tokens)
    return [(rank, prob, rank == tested - 1 and bool(path)) for rank, prob in enumerate(probs[:tested].tolist())]


def table_of(found: Trials) -> AcceptanceTable:
    """Computes the acceptance by sibling rank and draft probability."""
    return AcceptanceTable.measured([Trial(*row) for row in zip(*(column.tolist() for column in found), strict=True)])


def reach_only(table: AcceptanceTable) -> AcceptanceTable:
    """Returns the table with the paper's value of a draw, the probability that it is reached."""
    return replace(table, mean=np.ones_like(table.mean))


def rank_only(table: AcceptanceTable) -> AcceptanceTable:
    """Returns the table without the effect of the draft probability, with which DySpec finds Sequoia's tree."""
    return replace(table, share=np.repeat(table.mean[:, None], table.share.shape[1], axis=1))


def calibrated(table: AcceptanceTable, width: int = 8) -> DySpecCalibrated:
    """Makes the grower of DySpec's tree with a table, for all temperatures."""
    return DySpecCalibrated(width=width, acceptance_by_prob=dict.fromkeys(("sampled", "greedy"), table.written()))


def own_way(temperature: float, grower: DySpec) -> Way:
    """Returns how a grower drafts at a temperature of the target."""
    sampling = SamplingParams(temperature=temperature)
    return Way(temperature, float(draft_sampling(sampling, grower.draft_temperature).temperature), grower.samples(sampling))
