"""Computes the exact law of a batched rule, which takes its random numbers as an array, from cells of these numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from foredraft.audit.exact import Grown, Prefix, branches_of, continued, emitted_by
from foredraft.core.contracts import AcceptanceRule
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.rules.batched import verify

SHARES = (1e-3, 0.5, 1 - 1e-3)
"""Places within an interval of random numbers at which a batched rule is tried: near both ends, and in the middle."""


def batched_joint_law(
    trees: Grown, rule: AcceptanceRule, target: Callable, vocab_size: int, length: int, *, temperature: float, prefix: Prefix
) -> np.ndarray:
    """Computes `joint_law` for the batched form of a rule, `foredraft.rules.batched.verify`.

    The branches of the rule divide all random numbers into cells. The batched form is given numbers of each cell at `SHARES`,
    and each of its verdicts gets an equal share of the probability of the cell.
    """
    branches = [*branches_of(trees, rule, target, temperature, prefix)]
    batch, logits = _packed([branch.tree for branch in branches for _ in SHARES]), [branch.logits for branch in branches]
    numbers = [branch.replay.numbers(branch.tree, share) for branch in branches for share in SHARES]
    rows = np.cumsum([0, *(len(own) for own in logits[:-1])], dtype=np.int64).repeat(len(SHARES))
    sampling = [SamplingParams(temperature=temperature)] * len(batch)
    found = verify(batch, torch.cat(logits), sampling, np.concatenate(numbers, axis=1), rows)
    emitted: dict[tuple[int, ...], float] = defaultdict(float)
    for i, verdict in enumerate(found.verdicts):
        branch = branches[i // len(SHARES)]
        emitted[emitted_by(branch.tree, verdict)] += branch.prob / len(SHARES)
    return continued(emitted, target, vocab_size, length, temperature, prefix)


def _packed(trees: Sequence[DraftTree]) -> TreeBatch:
    """Packs trees with tables of their own. The laws of the batch are over the whole vocabulary."""
    laws: list[Tensor] = []
    rows: dict[int, list[int]] = {}
    for tree in trees:
        if id(tree) not in rows:
            own = [tree.law(node) for node in range(tree.num_nodes)]
            places = np.cumsum([law is not None for law in own]) - 1 + len(laws)
            rows[id(tree)] = [-1 if law is None else int(place) for law, place in zip(own, places, strict=True)]
            laws += [law for law in own if law is not None]
    return replace(
        TreeBatch.joined([replace(tree, draft_probs=torch.empty(0, 0), draft_ids=None) for tree in trees]),
        draft_row=np.concatenate([rows[id(tree)] for tree in trees]),
        draft_probs=torch.stack(laws) if laws else torch.empty(0, 0),
    )
