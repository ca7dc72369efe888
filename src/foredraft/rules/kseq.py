"""K-SEQ: tests k independent drafts, each with the same discounted acceptance probability."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Verdict
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree, Drawn
from foredraft.rules.multiround import Tested, require_drawn, test_children, verify


def kseq(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Tests k independent siblings in turn. Accepts each with probability min(1, target / (rho draft)).

    Let beta = sum_x min(draft, target / rho). The probability that a sibling is accepted is reached = 1 - (1 - beta)^k, and rho
    solves reached = rho beta. If no sibling is accepted, the next token is drawn from the common residual
    target - min(draft, target / rho) reached / beta, normalised. Deterministic siblings are tested as in `multiround`.

    Guarantee: exact in distribution.
    Source: Sun et al. 2023, SpecTr (arXiv 2310.15141), Algorithm 3 and Theorem 2, one token at a time.

    Raises:
        ValueError: siblings were drawn without replacement.
    """
    require_drawn(tree, {Drawn.DETERMINISTIC, Drawn.IID}, "kseq")
    return verify(tree, target_law, draws, _test_siblings)


def _test_siblings(tree: DraftTree, node: int, law: Float[Tensor, " v"], draws: Draws) -> Tested:
    draft = tree.law(node)
    if draft is None:
        return test_children(tree, node, law, draws)
    law, draft = law.double(), draft.double()
    rho = discount(law, draft, len(tree.children[node]))
    for child in tree.children[node]:
        token = int(tree.tokens[child])
        if draws.bernoulli(float(law[token]) / (rho * float(draft[token])), ("accept", tree.ranks[child], 0)):
            return child, law
    accepted = draft.minimum(law / rho)
    beta = float(accepted.sum())
    if not beta > 0:
        return None, law
    reached = 1 - (1 - beta) ** len(tree.children[node])
    left = (law - accepted * (reached / beta)).clamp_(min=0.0)
    return None, left if left.sum() > 0 else law


def discount(law: Float[Tensor, " v"], draft: Float[Tensor, " v"], k: int) -> float:
    """Returns the least rho in [1, k] with 1 - (1 - beta(rho))^k <= rho beta(rho), by bisection from above.

    Every rho that satisfies the inequality is lossless. The least accepts most, and reaches equality up to rounding.

    Source: SpecTr, equation 5.
    """
    target_probs, draft_probs = law.double().cpu().numpy(), draft.double().cpu().numpy()
    low, high = 1.0, float(k)
    rho = low
    for _ in range(42):  # to 1e-12 of k
        beta = float(np.minimum(draft_probs, target_probs / rho).sum())
        if 1 - (1 - beta) ** k <= rho * beta:
            high = rho
        else:
            low = rho
        if high == 1.0:
            break
        rho = (low + high) / 2
    return high
