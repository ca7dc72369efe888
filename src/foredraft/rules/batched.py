"""The exact rules for many trees at once. The rules that verify one tree are the reference.

`multiround`, `multiround_iid`, `deterministic` and, on chains, `chain` give the same verdict on a tree that they may verify. So
they share one batched form, the operation ``accept`` of `foredraft.kernels`. Logits stay on their device. The operation takes
the random numbers as an array that is indexed by node. They are those of the keys ``("accept", path of the node, 0)`` and
``("next", path of the node, 0)``.

Guarantee: the verdicts of the rules. Compiled code gives them bit for bit. In torch, laws are equal to the rules' own up to
rounding. There a verdict differs only in two cases: a random number lies within that rounding of its threshold, or the mass of
the kept tokens lies within that rounding of top-p.

Rounding in float32. Let r be the largest logit divided by the temperature, in absolute value. A law over V tokens then has a
total error (the sum over all tokens) of at most e = 2^-22 (8 + r + V / 16), and a stored draft law has none. A draft law with
the error d keeps the mass m without a token; normalised, it has the error 2 d / m + 2^-22. A rejection that leaves the mass m
gives a residual with the error 2 (e + d) / m + 2^-22. A token of draft probability p and threshold t is tested with the error
(e + t d) / p + 2^-22. The next token is drawn with the error 2 e. In float64, 2^-51 stands for 2^-22.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.contracts import AcceptanceRule, Verdict
from foredraft.core.law import at_least_float32, limits_of
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.kernels import run
from foredraft.kernels.acceptance import Trees
from foredraft.kernels.laws import as_arguments
from foredraft.rules import RULES
from foredraft.rules.multiround import ForSampled, multiround

PURPOSES = ("accept", "next")
"""The purposes of the random numbers, in the order of `Draws.of_nodes`."""


class Verdicts(NamedTuple):
    """The verdicts on packed trees.

    Attributes:
        verdicts: one for each tree.
        lawless: for each tree the first node from the root along the path whose logits define no law; -1 if there is none.
    """

    verdicts: list[Verdict]
    lawless: list[int]


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
        rows: the row of each root. The rows of the other nodes of its tree follow. None: node i has row i.

    Raises:
        ValueError: a tree cannot be verified.
        MemoryError: there is not enough memory.
    """
    is_greedy = all(own.temperature == 0 for own in sampling)
    if logits.is_cpu and not is_greedy:
        logits = at_least_float32(logits)
    trees = Trees(
        offsets=batch.offsets,
        rows=batch.offsets[:-1] if rows is None else rows,
        tokens=batch.tokens,
        parents=batch.parents,
        drawn=batch.drawn,
        draft_row=batch.draft_row,
        limits=np.array([_limits(own.temperature, own.min_p, own.top_k, own.top_p) for own in sampling]),
        uniforms=None if is_greedy else uniforms,
    )
    found = run("accept", logits, batch.draft_probs, trees=trees, draft_ids=batch.draft_ids)
    offsets, parents = batch.offsets.tolist(), batch.parents.tolist()
    verdicts = []
    for b, (last, token) in enumerate(zip(found.last, found.next_tokens, strict=True)):
        own = parents[offsets[b] : offsets[b + 1]]
        path, node = [], last
        while node > 0:
            path.append(node)
            node = own[node]
        verdicts.append(Verdict(path[::-1], token, "recovered" if last in own else "bonus"))
    return Verdicts(verdicts, found.lawless)


@lru_cache(maxsize=1024)
def _limits(temperature: float, min_p: float, top_k: int, top_p: float) -> tuple[float, float, int, float]:
    """Returns a row of `foredraft.kernels.acceptance.Trees.limits`."""
    limits = as_arguments(**limits_of(SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)))
    return limits if temperature > 0 else (0.0, *limits[1:])


def batched_form(rule: AcceptanceRule) -> Callable[[DraftTree], bool] | None:
    """Returns a check of trees: whether `verify` gives the verdict of `rule` on a tree. None if it never does.

    The check is False for a tree on which the rule raises an error.
    """
    if isinstance(rule, ForSampled):
        sampled, unsampled = batched_form(rule.rule), batched_form(multiround)
        forms = [form or (lambda tree: False) for form in (unsampled, sampled)]
        return lambda tree: forms[rule.of(tree) is rule.rule](tree)
    check = next((row.check for row in RULES.values() if row.batched and row.rule is rule), None)
    return None if check is None else partial(_passes, check)


def _passes(check: Callable[[DraftTree], None], tree: DraftTree) -> bool:
    try:
        check(tree)
    except Exception:  # the rule raises it too, for this tree alone
        return False
    return True
