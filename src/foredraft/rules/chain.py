"""Token-by-token verification of a chain: the original rule of speculative sampling."""

from __future__ import annotations

from foredraft.core.contracts import Verdict
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree
from foredraft.rules.certain import follow
from foredraft.rules.multiround import require_chain
from foredraft.rules.residual import subtract


def chain(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Accepts each drafted token with probability min(1, target / draft), up to the first rejection.

    Guarantee: exact in distribution.
    Source: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), Algorithm 1; Yin et al. 2024, Algorithm 1.

    Raises:
        ValueError: the tree branches.
    """
    require_unbranched(tree)
    if certain := follow(tree, target_law):
        return certain
    path = list(range(1, tree.num_nodes))
    for node in path:
        parent, token = node - 1, int(tree.tokens[node])
        law, draft = target_law.row(parent), tree.law(parent)
        draft_prob = 1.0 if draft is None else float(draft[token])
        if not draws.bernoulli(float(law[token]) / draft_prob, ("accept", tree.ranks[node], 0)):
            token = draws.categorical(subtract(law, draft, token), ("next", tree.ranks[parent], 0))
            return Verdict(path[:parent], token, "recovered")
    last = tree.num_nodes - 1
    return Verdict(path, draws.categorical(target_law.row(last), ("next", tree.ranks[last], 0)), "bonus")


def require_unbranched(tree: DraftTree) -> None:
    """Checks that `chain` verifies a tree.

    Raises:
        ValueError: the tree branches.
    """
    require_chain(tree, "chain")
