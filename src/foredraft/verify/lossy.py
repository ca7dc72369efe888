"""Rules that change the output law, kept apart from the exact ones."""

from __future__ import annotations

import math

import torch

from foredraft.draws import Draws
from foredraft.protocols import Verdict
from foredraft.sampling import TargetLaw
from foredraft.tree import DraftTree
from foredraft.verify.multiround import require_chain

_EPSILON = 0.09
_DELTA = 0.3


def typical(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Accepts every token whose target probability exceeds min(0.09, 0.3 exp(-entropy)); keeps the longest such path.

    Among equally long paths the most likely one is kept. The next token is drawn from the target's law. (The reference code
    accepts the first token of a tree because it is the target's own greedy choice; here the root is that token.)

    Guarantee: lossy. ``tv_bounds`` is 1 for every accepted token and the one after them: no smaller bound is known.
    Source: Medusa (arXiv 2401.10774), section 2.3.1; thresholds of the released code.
    """
    best, stack = (0, 0.0, 0), [(0, 0.0, 0)]
    while stack:
        length, logprob, node = stack.pop()
        best = max(best, (length, logprob, node), key=lambda one: one[:2])
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
    """Accepts each token of a chain with min(1, (target + epsilon) / draft); after a rejection the law that loses least.

    Guarantee: lossy. Each emitted token's law is at most ``tv_bounds`` away from the target's; that bound is what the rule
    loses by Theorem 4, and by Theorem 5 also the probability of a rejection that it saved. Epsilon 0 is rule ``chain``.
    Source: Yin et al. 2024 (arXiv 2411.00841), section 4: over-acceptance with the best residual, "Decoding-OPT".

    Raises:
        ValueError: the tree branches, or epsilon is negative.
    """
    return _over_accept(tree, target_law, draws, epsilon, "tolerance")


def uno(tree: DraftTree, target_law: TargetLaw, draws: Draws, epsilon: float | int = 0.1) -> Verdict:
    """Accepts as `tolerance` does, and redraws from the target's law itself after a rejection.

    Guarantee: lossy, also at epsilon 0. ``tv_bounds`` as in `tolerance`, for this redraw.
    Source: Yin et al. 2024 (arXiv 2411.00841), section 4.3, "Decoding-UNO", the comparison.

    Raises:
        ValueError: the tree branches, or epsilon is negative.
    """
    return _over_accept(tree, target_law, draws, epsilon, "uno")


def _over_accept(tree: DraftTree, target_law: TargetLaw, draws: Draws, epsilon: float | int, rule: str) -> Verdict:
    require_chain(tree, rule)
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be 0 or more, got {epsilon}")
    path, bounds = list(range(1, tree.num_nodes)), []
    for node in path:
        parent, token = node - 1, int(tree.tokens[node])
        law, draft = target_law.row(parent), tree.law(parent)
        if draft is None:
            draft = torch.zeros_like(law)
            draft[token] = 1.0
        accepted = draft.minimum(law + epsilon)  # b p, with b = min(1, (q + epsilon) / p)
        missing = (law - accepted).clamp_(min=0.0)
        redraw = law if rule == "uno" or not missing.sum() > 0 else missing / missing.sum()
        rejects = max(0.0, 1 - float(accepted.sum()))
        bounds.append(float((law - accepted - rejects * redraw).abs().sum()) / 2)
        if not draws.bernoulli(float(accepted[token]) / float(draft[token]), ("accept", tree.ranks[node], 0)):
            return Verdict(path[:parent], draws.categorical(redraw, ("next", tree.ranks[parent], 0)), "recovered", bounds)
    last = tree.num_nodes - 1
    next_token = draws.categorical(target_law.row(last), ("next", tree.ranks[last], 0))
    return Verdict(path, next_token, "bonus", [*bounds, 0.0] if bounds else ())
