"""Whether the rule accepts a child, against its draft probability: trials on real text, and tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from foredraft import LLM
from foredraft.bench.calibrate import RANKS, all_logits
from foredraft.draws import Draws
from foredraft.grow.acceptance import AcceptanceTable, Trial, conditional
from foredraft.grow.base import draft_sampling
from foredraft.grow.dyspec import DySpec, DySpecCalibrated
from foredraft.params import SamplingParams
from foredraft.protocols import Target
from foredraft.sampling import TargetLaw, warp
from foredraft.tree import DraftTree, Drawn
from foredraft.verify import RULES


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
    probs = conditional(law[0][tokens].double().numpy())
    tested = path[0] if path else len(tokens)
    return [(rank, prob, rank == tested - 1 and bool(path)) for rank, prob in enumerate(probs[:tested].tolist())]


def table_of(found: Trials) -> AcceptanceTable:
    """Acceptance by sibling rank and draft probability."""
    return AcceptanceTable.measured([Trial(*one) for one in zip(*(column.tolist() for column in found), strict=True)])


def reach_only(table: AcceptanceTable) -> AcceptanceTable:
    """With draws valued as the paper does, by the probability that they are reached."""
    return replace(table, mean=np.ones_like(table.mean))


def rank_only(table: AcceptanceTable) -> AcceptanceTable:
    """Without a look at the draft probability: Sequoia's tree, found by DySpec."""
    return replace(table, share=np.repeat(table.mean[:, None], table.share.shape[1], axis=1))


def calibrated(table: AcceptanceTable, width: int = 8) -> DySpecCalibrated:
    """DySpec's tree by a table, whatever the temperature."""
    return DySpecCalibrated(width=width, acceptance_by_prob=dict.fromkeys(("sampled", "greedy"), table.written()))


def own_way(temperature: float, grower: DySpec) -> Way:
    """How a grower drafts for a temperature."""
    sampling = SamplingParams(temperature=temperature)
    return Way(temperature, float(draft_sampling(sampling, grower.draft_temperature).temperature), grower.samples(sampling))
