"""Faulty rules that an audit must detect. Each is a plausible, inconspicuous error in an implementation of `chain`."""

from __future__ import annotations

from foredraft.core.contracts import AcceptanceRule, Verdict
from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.tree import DraftTree
from foredraft.rules.chain import chain

_SHARPER = 1.6


def other_temperature(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Fault: the rule receives the draft law of another temperature."""
    probs = tree.draft_probs**_SHARPER
    probs = probs / probs.sum(-1, keepdim=True)
    wrong = DraftTree(tree.tokens, tree.parents, tree.drawn, tree.draft_row, probs, tree.draft_ids, tree.vocab_size)
    return chain(wrong, target_law, draws)


def bonus_from_draft(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Fault: the bonus token is drawn from the draft law of the last draft token."""
    verdict = chain(tree, target_law, draws)
    law = tree.law(tree.num_nodes - 2) if tree.num_nodes > 1 else None
    if verdict.kind != "bonus" or law is None:
        return verdict
    return Verdict(verdict.path, draws.categorical(law, ("fault", (), 0)), "bonus")


def residual_kept(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
    """Fault: the residual is not renormalised. Its missing mass goes to the target's most likely token."""
    for node in range(1, tree.num_nodes):
        parent, token = node - 1, int(tree.tokens[node])
        law, draft = target_law.row(parent), tree.law(parent)
        if draft is None:
            return chain(tree, target_law, draws)
        if not draws.bernoulli(float(law[token] / draft[token]), ("accept", tree.ranks[node], 0)):
            left = (law - draft).clamp(min=0)
            left[int(law.argmax())] += 1 - left.sum()
            return Verdict(list(range(1, node)), draws.categorical(left, ("next", tree.ranks[parent], 0)), "recovered")
    last = tree.num_nodes - 1
    return Verdict(list(range(1, last + 1)), draws.categorical(target_law.row(last), ("next", tree.ranks[last], 0)), "bonus")


FAULTS: dict[str, AcceptanceRule] = {
    "other temperature": other_temperature,
    "bonus from the draft law": bonus_from_draft,
    "residual not renormalised": residual_kept,
}
"""Description of the fault -> the faulty rule."""
