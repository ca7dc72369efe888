"""The exact rules for many trees at once. The rules that verify one tree are the reference.

`multiround`, `multiround_iid`, `deterministic` and, on chains, `chain` give one verdict where all of them verify a tree. So
they share one batched form, the operation ``accept`` of `foredraft.kernels`. Logits stay on their device. The operation takes
the random numbers as an array that is indexed by key: ``("accept", path of the node, 0)`` and ``("next", path of the node, 0)``.

Guarantee: the verdicts of the rules. In compiled code they are equal bit for bit. In torch, laws are the rules' own up to
rounding, and a verdict differs only if a random number lies within that rounding of its threshold.

Rounding. Let e be the largest total error of a law of the target (the sum over all tokens), and d that of a draft law. A
rejection with residual mass m leaves an error of at most 2 (e + d) / m, plus a few units of the last place. A draft law without
a token, of mass m before normalisation, has an error of at most 2 d / m. A token of draft probability p and threshold t is
tested with an error of at most (e + t d) / p, and the next token is drawn with an error of at most 2 e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import AcceptanceRule, Verdict
from foredraft.core.errors import UserError
from foredraft.core.law import at_least_float32, limits_of
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.kernels import run
from foredraft.kernels.acceptance import Trees
from foredraft.kernels.laws import as_arguments
from foredraft.rules import RULES
from foredraft.rules.multiround import ForSampled

PURPOSES = ("accept", "next")
"""The purposes of the random numbers, in the order of `Draws.of_nodes`."""


class Verdicts(NamedTuple):
    """The verdicts on packed trees.

    Attributes:
        verdicts: one for each tree.
        is_empty: for each tree and each of its nodes, whether its logits define no law. It is valid for the root and the nodes
            of the path.
    """

    verdicts: list[Verdict]
    is_empty: list[list[bool]]


def verify(
    batch: TreeBatch,
    logits: Float[Tensor, "r v"],
    sampling: Sequence[SamplingParams],
    uniforms: Float[np.ndarray, "2 n"] | None,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Verdicts:
    """Verifies packed trees by the multi-round rule, without processors of the prefix.

    Args:
        batch: trees that `batches` allows.
        logits: row r scores the children of a node.
        sampling: the sampling parameters of each tree.
        uniforms: the random numbers of each node, by purpose; see `Draws.of_nodes`. Not read if all temperatures are 0.
        rows: the row of each root. Those of the other nodes of its tree follow. None: the rows are those of the nodes.

    Raises:
        ValueError: a tree cannot be verified.
        MemoryError: there is not enough memory.
    """
    limits = np.array([_limits(own.temperature, own.min_p, own.top_k, own.top_p) for own in sampling])
    is_greedy = not limits[:, 0].any()
    if logits.is_cpu and not is_greedy:
        logits = at_least_float32(logits)
    trees = Trees(
        offsets=batch.offsets,
        rows=batch.offsets[:-1] if rows is None else rows,
        tokens=batch.tokens,
        parents=batch.parents,
        drawn=batch.drawn,
        draft_row=batch.draft_row,
        limits=limits,
        uniforms=None if is_greedy else uniforms,
    )
    found = run("accept", logits, batch.draft_probs, trees=trees, draft_ids=batch.draft_ids)
    offsets, parents = batch.offsets.tolist(), batch.parents.tolist()
    verdicts, is_empty = [], []
    for b, (last, token) in enumerate(zip(found.last, found.next_tokens, strict=True)):
        begin, end = offsets[b], offsets[b + 1]
        path, node = [], last
        while node > 0:
            path.append(node)
            node = parents[begin + node]
        verdicts.append(Verdict(path[::-1], token, "recovered" if last in parents[begin:end] else "bonus"))
        is_empty.append([value != 0 for value in found.is_empty[begin:end]])
    return Verdicts(verdicts, is_empty)


@lru_cache(maxsize=1024)
def _limits(temperature: float, min_p: float, top_k: int, top_p: float) -> tuple[float, float, int, float]:
    """Returns a row of `foredraft.kernels.acceptance.Trees.limits`."""
    limits = as_arguments(**limits_of(SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)))
    return limits if temperature > 0 else (0.0, *limits[1:])


def batches(rule: AcceptanceRule, tree: DraftTree) -> bool:
    """Returns whether `verify` gives the verdict of `rule` on `tree`. It does not where the rule raises an error."""
    check = _check_of(rule.of(tree) if isinstance(rule, ForSampled) else rule)
    if check is None:
        return False
    try:
        check(tree)
    except UserError:
        return False
    return True


def _check_of(rule: AcceptanceRule) -> Callable[[DraftTree], None] | None:
    return next((row.check for row in RULES.values() if row.batched and row.rule is rule), None)
