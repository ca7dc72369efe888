"""Multi-round verification: tests siblings in turn against the residual of the target's law.

One function serves every way of drawing. After a rejection the target's law becomes its residual ``norm([target - draft]+)``.
Only the update of the draft law differs:

    iid                   kept                          SpecInfer (arXiv 2305.09781), multi-step speculative sampling
    without_replacement   rejected token zeroed, rest   Sequoia (arXiv 2402.12374), Algorithm 2
                          renormalised                  DySpec (arXiv 2410.11744), Algorithm 3
    deterministic         one-hot at the next sibling   EAGLE-2 (arXiv 2406.16858): accept with the remaining probability
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from foredraft.core.contracts import AcceptanceRule, Verdict
from foredraft.core.draws import Draws
from foredraft.core.errors import UserError
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree, Drawn
from foredraft.rules.certain import follow
from foredraft.rules.residual import subtract, without

Tested = tuple[int | None, Float[Tensor, " v"]]
"""The accepted child, or None if all were rejected. Then the second entry is the law of the next token, not normalised."""


def multiround(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Verifies a tree by the multi-round rule. ``tree.drawn`` says how the children of each node were drawn.

    Guarantee: exact in distribution.
    Source: DySpec, Algorithm 3. The random number is uniform; the paper prints a normal one.
    """
    return verify(tree, target_law, draws, test_children)


def multiround_iid(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Runs `multiround` on siblings that were drawn independently with replacement, or are deterministic.

    Guarantee: exact in distribution.
    Source: SpecInfer (arXiv 2305.09781), section 4.3.

    Raises:
        ValueError: siblings were drawn without replacement.
    """
    require_independent(tree)
    return multiround(tree, target_law, draws)


def deterministic(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Runs `multiround` on deterministic siblings, which were chosen and not sampled.

    Guarantee: exact in distribution.
    Source: EAGLE-2 (arXiv 2406.16858), released code: accept a candidate with its remaining target probability.

    Raises:
        ValueError: siblings were sampled.
    """
    require_unsampled(tree)
    return multiround(tree, target_law, draws)


def verify(tree: DraftTree, target_law: TargetLaw, draws: Draws, test: Callable[..., Tested]) -> Verdict:
    """Walks down a tree and tests the children of each node by `test`, which takes the arguments of `test_children`."""
    if certain := follow(tree, target_law):
        return certain
    path, node, law = [], 0, target_law.row(0)
    while tree.children[node]:
        child, residual = test(tree, node, law, draws)
        if child is None:
            return Verdict(path, draws.categorical(residual, ("next", tree.ranks[node], 0)), "recovered")
        path.append(child)
        node, law = child, target_law.row(child)
    return Verdict(path, draws.categorical(law, ("next", tree.ranks[node], 0)), "bonus")


def require_nothing(tree: DraftTree) -> None:
    """Accepts every tree: `multiround` is exact for all."""


def require_independent(tree: DraftTree) -> None:
    """Checks that `multiround_iid` is exact for a tree.

    Raises:
        ValueError: siblings were drawn without replacement.
    """
    require_drawn(tree, {Drawn.DETERMINISTIC, Drawn.IID}, "multiround-iid")


def require_unsampled(tree: DraftTree) -> None:
    """Checks that `deterministic` is exact for a tree.

    Raises:
        ValueError: siblings were sampled.
    """
    require_drawn(tree, {Drawn.DETERMINISTIC}, "deterministic")


def require_drawn(tree: DraftTree, allowed: Collection[Drawn], rule: str) -> None:
    """Checks that the children of every node were drawn in an allowed way.

    A single sampled child counts as drawn both with and without replacement.

    Args:
        tree: the tree.
        allowed: ways of drawing for which the rule is exact.
        rule: name of the rule in the message.

    Raises:
        ValueError: children were drawn in another way.
    """
    if Drawn.DETERMINISTIC in allowed and not tree.drawn.any():
        return
    for node, siblings in enumerate(tree.children):
        drawn = Drawn(int(tree.drawn[node])) if siblings else Drawn.DETERMINISTIC
        single = len(siblings) == 1 and drawn is not Drawn.DETERMINISTIC and Drawn.IID in allowed
        if siblings and drawn not in allowed and not single:
            names = ", ".join(sorted(way.name.lower() for way in allowed))
            raise UserError(
                f"rule {rule!r} is exact for children drawn {names} only, but those of node {node} are {drawn.name.lower()}",
                "Use rule 'multiround', which is exact for every tree",
            )


def require_chain(tree: DraftTree, rule: str) -> None:
    """Checks that a tree is a chain.

    Raises:
        ValueError: a node has more than one child.
    """
    for node, siblings in enumerate(tree.children):
        if len(siblings) > 1:
            raise UserError(
                f"rule {rule!r} verifies chains, but node {node} of the tree has {len(siblings)} children",
                "Use tree 'chain', or rule 'multiround'",
            )


def test_children(tree: DraftTree, node: int, residual: Float[Tensor, " v"], draws: Draws) -> Tested:
    """Tests the children of `node` in turn.

    Args:
        tree: the tree.
        node: a node with children.
        residual: the target's law after `node`.
        draws: random numbers of the request.

    Returns:
        The accepted child, or None if all were rejected, and the residual of the target's law.
    """
    drawn, draft = tree.drawn[node], tree.law(node)
    for child in tree.children[node]:
        token = int(tree.tokens[child])
        draft_prob = 1.0 if draft is None else float(draft[token])
        if not draft_prob > 0:  # up to rounding, the earlier siblings exhausted the draft law
            return None, residual
        if draws.bernoulli(float(residual[token]) / draft_prob, ("accept", tree.ranks[child], 0)):
            return child, residual
        residual = subtract(residual, draft, token)
        if draft is not None and drawn == Drawn.WITHOUT_REPLACEMENT:
            draft = without(draft, token)
    return None, residual


@dataclass(frozen=True)
class ForSampled:
    """A rule that applies `rule` to trees with sampled children, and `multiround` to all others."""

    rule: AcceptanceRule

    def of(self, tree: DraftTree) -> AcceptanceRule:
        """Returns the rule that verifies `tree`."""
        return self.rule if tree.drawn.any() else multiround

    def __call__(self, tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        """Verifies a tree, see `foredraft.core.contracts.AcceptanceRule`."""
        return self.of(tree)(tree, target_law, draws)
