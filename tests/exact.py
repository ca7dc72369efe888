"""What the tests of exactness share: the enumeration of the package, and measured acceptance that is made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from foredraft.audit.cells import batched_joint_law
from foredraft.audit.exact import (
    Branches,
    Grown,
    Replay,
    TableExpander,
    chain_prob,
    enumerate_branches,
    joint_law,
    target_joint,
    target_law_of,
    tree_law,
)
from foredraft.core.contracts import Budget
from foredraft.core.params import SamplingParams
from foredraft.engine.engine import Engine
from foredraft.engine.options import EngineOptions
from foredraft.engine.request import Sequence as Output
from foredraft.trees.acceptance import PROB_EDGES, RANK_EDGES

__all__ = [
    "MEASURED",
    "Branches",
    "Grown",
    "Replay",
    "TableExpander",
    "any_table",
    "batched_joint_law",
    "chain_prob",
    "collapse",
    "decoded",
    "enumerate_branches",
    "expected_tokens",
    "joint_law",
    "target_joint",
    "target_law_of",
    "tree_law",
]


def expected_tokens(trees: Grown, rule: Any, target: Any, temperature: float, prefix: tuple[int, ...]) -> float:
    """Returns the expected number of tokens of one step, including the recovered or bonus token."""
    total = 0.0
    for prob, tree, keys in trees.values():
        law = target_law_of(target, tree, prefix, temperature)
        for share, verdict, _ in enumerate_branches(lambda draws, tree=tree, law=law: rule(tree, law, draws), keys):
            total += prob * share * (len(verdict.path) + 1)
    return total


def any_table(seed: int = 0) -> dict[str, Any]:
    """Some measured acceptance, as a draft model's calibration has it: later siblings are accepted less often."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.arange(1, len(RANK_EDGES) + 1)
    tables = [(rng.uniform(0.2, 0.6, (len(RANK_EDGES), len(PROB_EDGES))) * scale[:, None], 0.4 * scale) for _ in range(2)]
    return {kind: {"share": s.tolist(), "mean": m.tolist()} for kind, (s, m) in zip(("sampled", "greedy"), tables, strict=True)}


MEASURED: dict[str, dict[str, Any]] = {
    "sequoia": {"acceptance": [0.7, 0.15, 0.05]},
    "dyspec-calibrated": {"acceptance_by_prob": any_table()},
}
"""Options that a tree cannot do without, as a calibration would give them."""


def collapse(path: Sequence[int], blank: int) -> tuple[int, ...]:
    """Collapses a path of frames: merges repeats, then removes blanks.

    Apply it only once, because the result may contain repeats: the path 1 blank 1 collapses to 1 1.
    """
    merged = [token for i, token in enumerate(path) if i == 0 or token != path[i - 1]]
    return tuple(token for token in merged if token != blank)


def decoded(
    target: Any,
    prompt: Sequence[int],
    sampling: SamplingParams,
    draws: Any,
    max_len: int,
    *,
    drafter: Any = None,
    rule: Any = None,
    budget: Budget | None = None,
    eos: int | None = None,
    processors: Sequence[Any] | None = None,
    costs: Any = None,
) -> Output:
    """One output of an engine of its own, with these random numbers, and with other processors where some are given."""
    ends = [] if eos is None else [eos]
    options: dict[str, Any] = (
        {"drafter": drafter, "rule": rule, "budget": budget, "costs": costs} if drafter is not None else {}
    )
    engine = Engine(target, max_model_len=max_len, options=EngineOptions(max_num_seqs=1), eos_ids=ends, **options)
    [output] = engine.add_request(None, list(prompt), sampling).sequences
    output.draws = draws
    if processors is not None:
        output.processors = processors
    while engine.has_unfinished_requests():
        engine.step()
        cache = output.cache
        assert cache is None or cache.length == len(output.token_ids) - 1
    assert engine.scheduler.pool.blocks.num_free == engine.scheduler.pool.blocks.count
    if output.cause is not None:
        raise output.cause
    return output
