"""Decides which tokens a step gives each sequence. Trees whose rule has a batched form are verified together."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Verdict
from foredraft.core.law import TargetLaw, likeliest
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.engine.request import Sequence
from foredraft.engine.scores import law_of
from foredraft.rules.batched import PURPOSES, verify

_log = logging.getLogger("foredraft")

_SMALL_BATCH_LOGITS = 1 << 18
"""With this many logits at most, trees at temperature 0 are verified one by one on a CPU. Their largest logits are found in
microseconds, less than the fixed cost of a batch. With more logits a batch gains, because it reads only the rows that it
visits. This was measured with trees of 9 rows of 4096 logits on two cores."""


class Case(NamedTuple):
    """A sequence on whose tree a step decides.

    Attributes:
        tree: its tree; None for plain decoding.
        rows: the rows of the tree's logits.
    """

    sequence: Sequence
    tree: DraftTree | None
    rows: slice


@dataclass
class Decision:
    """What was decided on the tree of a sequence. `tree` is None for plain decoding."""

    tree: DraftTree | None
    law: TargetLaw
    verdict: Verdict


def decide(cases: Items[Case], logits: Float[Tensor, "r v"], whole: TreeBatch | None) -> list[Decision | Exception]:
    """Returns the decision on each case, or the error of its law or rule, which concerns no other case.

    Args:
        logits: the scores of the nodes of all trees.
        whole: the trees of all cases with their draft laws, if they are packed already.
    """
    found: dict[int, Decision] = {}
    is_small = logits.is_cpu and logits.numel() <= _SMALL_BATCH_LOGITS
    groups = _batched(cases, is_small=is_small)
    if is_small and not groups and len(cases) > 1:
        found |= _plain_decisions(cases, logits)
    for places in groups:
        try:
            packed = whole if whole is not None and len(places) == len(cases) else _packed([cases[i] for i in places])
            found |= zip(places, _together([cases[i] for i in places], packed, logits), strict=False)
        except Exception as error:  # verified alone, only the case at fault fails
            reason = type(error).__name__, error
            _log.warning("the trees of a step cannot be verified together (%s: %s); each is verified alone", *reason)
    return [found[i] if i in found else _alone(case, logits) for i, case in enumerate(cases)]


def _plain_decisions(cases: Items[Case], logits: Float[Tensor, "r v"]) -> dict[int, Decision]:
    """Returns the decisions on cases at temperature 0 without a tree and without processors, by place."""
    is_plain = [case.tree is None and _is_certain(case) and not case.sequence.processors for case in cases]
    plain = [*compress(range(len(cases)), is_plain)]
    if not plain:
        return {}
    tokens, are_finite = likeliest(logits)
    views, found = logits.split(1), dict[int, Decision]()
    for i in plain:
        row = cases[i].rows.start
        law = TargetLaw(views[row], cases[i].sequence.sampling, is_empty={0: not are_finite[row]})
        found[i] = Decision(None, law, Verdict([], tokens[row], "plain"))
    return found


def _batched(cases: Items[Case], *, is_small: bool) -> list[list[int]]:
    """Returns the groups of cases that are decided together, by place. They have no processors and share a table of laws.

    Args:
        is_small: whether trees at temperature 0 are better decided alone. So is a single root.
    """
    is_alone = len(cases) == 1 and cases[0].tree is None
    if is_alone or (is_small and all(map(_is_certain, cases))):
        return []
    tables: dict[int, list[int]] = {}
    for i, (sequence, tree, _) in enumerate(cases):
        if not sequence.processors and (tree is None or sequence.drafting.batches(tree)):
            tables.setdefault(0 if tree is None or not len(tree.draft_probs) else id(tree.draft_probs), []).append(i)
    without_laws = tables.pop(0, None)
    if without_laws:
        places = next(iter(tables), 0)
        tables[places] = sorted([*tables.get(places, ()), *without_laws])
    return [*tables.values()]


def _is_certain(case: Case) -> bool:
    return case.sequence.sampling.temperature == 0


def _packed(cases: Items[Case]) -> TreeBatch:
    return TreeBatch.joined([tree or TreeBatch.roots(sequence.token_ids[-1:])[0] for sequence, tree, _ in cases])


def _together(cases: Items[Case], packed: TreeBatch, logits: Float[Tensor, "r v"]) -> list[Decision]:
    """Returns the decision on every case. The list is empty if the draws of a sequence give no array of numbers."""
    sampling = [case.sequence.sampling for case in cases]
    uniforms = None
    if any(params.temperature > 0 for params in sampling):
        draws = [case.sequence.draws.at(len(case.sequence.token_ids)) for case in cases]
        uniforms = draws[0].of_nodes(draws, PURPOSES, packed.offsets, packed.parents)
        if uniforms is None:
            return []
    rows = np.array([case.rows.start for case in cases])
    found = verify(packed, logits, sampling, uniforms, rows)
    decisions = []
    for (sequence, tree, own), verdict, lawless in zip(cases, found.verdicts, found.lawless, strict=True):
        is_empty = {node: node == lawless for node in (0, *verdict.path)}
        law = TargetLaw(logits[own], sequence.sampling, tree, is_empty=is_empty)
        if tree is None:
            verdict = Verdict([], verdict.next_token, "plain")
        decisions.append(Decision(tree, law, verdict))
    return decisions


def _alone(case: Case, logits: Float[Tensor, "r v"]) -> Decision | Exception:
    """Returns the decision of the rule of one tree, or its error."""
    sequence, tree, rows = case
    try:
        law = law_of(sequence, logits if rows == slice(0, len(logits)) else logits[rows], tree)
        if tree is None and law.is_certain:
            return Decision(None, law, Verdict([], law.token(0), "plain"))
        draws = sequence.draws.at(len(sequence.token_ids))
        if tree is None:
            return Decision(None, law, Verdict([], draws.categorical(law.row(0), ("next", (), 0)), "plain"))
        return Decision(tree, law, sequence.drafting.rule(tree, law, draws))
    except Exception as error:
        return error
