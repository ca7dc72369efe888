"""The fast path of every exact rule when the target has one possible token per node, as at temperature 0."""

from __future__ import annotations

from foredraft.core.contracts import Verdict
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree


def follow(tree: DraftTree, target_law: TargetLaw) -> Verdict | None:
    """Returns the verdict if all target laws are one-hot, else None.

    Every exact rule accepts a token of target probability 1, whatever its draft probability, and rejects a token of
    probability 0. The residual of a one-hot law is the law itself. So no random number is drawn and no law is computed.

    Guarantee: the same verdict as the exact rule that calls it.
    """
    if not target_law.is_certain:
        return None
    path, node, children, tokens = [], 0, tree.children, tree.tokens
    while children[node]:
        token = target_law.token(node)
        child = next((candidate for candidate in children[node] if tokens[candidate] == token), None)
        if child is None:
            return Verdict(path, token, "recovered")
        path.append(child)
        node = child
    return Verdict(path, target_law.token(node), "bonus")
