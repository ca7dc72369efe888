"""Block verification: accepts a chain up to the last position that passes, not up to the first that fails."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import Verdict
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw, one_hot
from foredraft.core.tree import DraftTree
from foredraft.rules.certain import follow
from foredraft.rules.multiround import require_chain


def block(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Accepts the longest prefix of the chain that passes its own random test.

    Let x_1..x_g be the drafted tokens. Then r_0 = 1, r_i = min(1, r_{i-1} target(x_i) / draft(x_i)), and
    S_i = sum_x [r_i target(x | x_1..x_i) - draft(x | x_1..x_i)]+. The probability that prefix i passes is
    h_i = S_i / (S_i + 1 - r_i) for i < g, and h_g = r_g. The accepted length is the largest i whose uniform number is at most
    h_i.

    Guarantee: exact in distribution. The expected number of accepted tokens is never below that of `chain`.
    Source: Sun et al. 2024 (arXiv 2403.10444), Algorithm 2.

    Raises:
        ValueError: the tree branches.
    """
    require_chain(tree, "block")
    if certain := follow(tree, target_law):
        return certain
    last = tree.num_nodes - 1
    laws = target_law.rows(range(last + 1))
    accepted, law, ratio = 0, laws[0] if last == 0 else _excess(tree, 0, laws[0], 1.0), 1.0
    for node in range(1, last + 1):
        token, draft = int(tree.tokens[node]), tree.law(node - 1)
        ratio = min(1.0, ratio * float(laws[node - 1][token]) / (1.0 if draft is None else float(draft[token])))
        left = laws[node] if node == last else _excess(tree, node, laws[node], ratio)
        excess = float(left.sum())
        accept_prob = ratio if node == last else excess / (excess + (1 - ratio)) if excess > 0 else float(ratio == 1)
        if draws.bernoulli(accept_prob, ("accept", tree.ranks[node], 0)):
            accepted, law = node, left if excess > 0 else laws[node]
    if not law.sum() > 0:  # target and draft agree up to rounding at the root, so rejecting everything has probability 0
        law = laws[0]
    token = draws.categorical(law, ("next", tree.ranks[accepted], 0))
    return Verdict(list(range(1, accepted + 1)), token, "bonus" if accepted == last else "recovered")


def _excess(tree: DraftTree, node: int, law: Float[Tensor, " v"], ratio: float) -> Float[Tensor, " v"]:
    """Returns ``[ratio * target - draft]+`` after `node`, not normalised."""
    draft = tree.law(node)
    if draft is None:
        draft = one_hot(law.new_tensor([int(tree.tokens[node + 1])]).long(), law[None])[0]
    return (ratio * law - draft).clamp_(min=0.0)
