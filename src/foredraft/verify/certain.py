"""What every exact rule does where the target leaves no choice: the fast twin of all of them at temperature 0."""

from __future__ import annotations

from foredraft.protocols import Verdict
from foredraft.sampling import TargetLaw
from foredraft.tree import DraftTree


def follow(tree: DraftTree, target_law: TargetLaw) -> Verdict | None:
    """The path of the only tokens that the target would give; None where it leaves a choice.

    A draft of probability 1 under the target is accepted by every exact rule whatever its draft probability, one of
    probability 0 by none, and the residual of a one-hot law is that law: so nothing is drawn, and no law is computed.

    Guarantee: the same verdict as the rule that asks.
    """
    if not target_law.is_certain:
        return None
    path, node, children, tokens = [], 0, tree.children, tree.tokens
    while children[node]:
        token = target_law.token(node)
        child = next((one for one in children[node] if tokens[one] == token), None)
        if child is None:
            return Verdict(path, token, "recovered")
        path.append(child)
        node = child
    return Verdict(path, target_law.token(node), "bonus")
