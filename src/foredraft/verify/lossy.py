"""Rules that change the output law, kept apart from the exact ones."""

from __future__ import annotations

import math

from foredraft.draws import Draws
from foredraft.protocols import Verdict
from foredraft.sampling import TargetLaw
from foredraft.tree import DraftTree

_EPSILON = 0.09
_DELTA = 0.3


def typical(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Accepts every token whose target probability exceeds min(0.09, 0.3 exp(-entropy)); keeps the longest such path.

    Among equally long paths the most likely one is kept. The next token is drawn from the target's law. (The reference code
    accepts the first token of a tree because it is the target's own greedy choice; here the root is that token.)

    Guarantee: lossy. ``tv_bound`` is 1 where any token was accepted without a test of the law, that is, no bound is known.
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
    return Verdict(tree.path_to(node), token, kind, tv_bound=1.0 if node else 0.0)
