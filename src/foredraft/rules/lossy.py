"""Lossy rules, which change the output distribution. They are separate from the exact rules."""

from __future__ import annotations

import math

import torch

from foredraft.core.contracts import Verdict
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree
from foredraft.rules.multiround import require_chain

_EPSILON = 0.09
_DELTA = 0.3


def typical(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Accepts every token whose target probability exceeds min(0.09, 0.3 exp(-entropy)), and keeps the longest such path.

    Of equally long paths it keeps the most likely one. The next token is drawn from the target's law. The reference code also
    accepts the first token of a tree, because it is the target's greedy choice. Here the root is that token.

    Guarantee: lossy. ``tv_bounds`` is 1 for every accepted token and for the next token: no smaller bound is known.
    Source: Medusa (arXiv 2401.10774), section 2.3.1; thresholds of the released code.
    """
    best, stack = (0, 0.0, 0), [(0, 0.0, 0)]
    while stack:
        length, logprob, node = stack.pop()
        best = max(best, (length, logprob, node), key=lambda entry: entry[:2])
        law = target_law.row(node)
        positive = law[law > 0]
        threshold = min(_EPSILON, _DELTA * math.exp(float((positive * positive.log()).sum())))
        for child in tree.children[node]:
            prob = float(law[int(tree.tokens[child])])
            if prob > threshold:
                stack.append((length + 1, logprob + math.log(prob), child))
    node = best[2]
    token = draws.categorical(target_law.row(node), ("next", tree.ranks[node], 0))
    kind = "recovered" if tree.children[node] else "bonus"
    path = tree.path_to(node)
    return Verdict(path, token, kind, tv_bounds=[1.0] * (len(path) + 1) if tree.num_nodes > 1 else ())


def tolerance(tree: DraftTree, target_law: TargetLaw, draws: Draws, epsilon: float | int = 0.1) -> Verdict:
    """Accepts each token of a chain with probability min(1, (target + epsilon) / draft), and redraws from the best residual.

    Guarantee: lossy. The total variation distance of each emitted token's law from the target's is at most ``tv_bounds``. The
    bound is the loss by Theorem 4. By Theorem 5 it is also the rejection probability that the rule saves. With epsilon 0 the
    rule is ``chain``.
    Source: Yin et al. 2024 (arXiv 2411.00841), section 4: over-acceptance with the best residual, "Decoding-OPT".

    Raises:
        ValueError: the tree branches, or epsilon is negative.
    """
    return _over_accept(tree, target_law, draws, epsilon, "tolerance")


def uno(tree: DraftTree, target_law: TargetLaw, draws: Draws, epsilon: float | int = 0.1) -> Verdict:
    """Accepts tokens as `tolerance` does, but redraws from the target's law after a rejection.

    Guarantee: lossy, even at epsilon 0. ``tv_bounds`` is as in `tolerance`, computed for this redraw.
    Source: Yin et al. 2024 (arXiv 2411.00841), section 4.3, "Decoding-UNO". The paper uses it for comparison.

    Raises:
        ValueError: the tree branches, or epsilon is negative.
    """
    return _over_accept(tree, target_law, draws, epsilon, "uno", from_residual=False)


def _over_accept(
    tree: DraftTree, target_law: TargetLaw, draws: Draws, epsilon: float | int, rule: str, *, from_residual: bool = True
) -> Verdict:
    require_chain(tree, rule)
    if not epsilon >= 0:
        raise UserError(f"epsilon must be 0 or more, got {epsilon}")
    path, bounds = list(range(1, tree.num_nodes)), []
    for node in path:
        parent, token = node - 1, int(tree.tokens[node])
        law, draft = target_law.row(parent), tree.law(parent)
        if draft is None:
            draft = torch.zeros_like(law)
            draft[token] = 1.0
        accepted = draft.minimum(law + epsilon)  # b p, with b = min(1, (q + epsilon) / p)
        missing = (law - accepted).clamp_(min=0.0)
        redraw = missing / missing.sum() if from_residual and missing.sum() > 0 else law
        rejects = max(0.0, 1 - float(accepted.sum()))
        bounds.append(float((law - accepted - rejects * redraw).abs().sum()) / 2)
        if not draws.bernoulli(float(accepted[token]) / float(draft[token]), ("accept", tree.ranks[node], 0)):
            return Verdict(path[:parent], draws.categorical(redraw, ("next", tree.ranks[parent], 0)), "recovered", bounds)
    last = tree.num_nodes - 1
    next_token = draws.categorical(target_law.row(last), ("next", tree.ranks[last], 0))
    return Verdict(path, next_token, "bonus", [*bounds, 0.0] if bounds else ())
