"""Acceptance rules: RULES names every one, with its guarantee; `lossy` holds every inexact rule and nothing else does."""

from __future__ import annotations

from typing import NamedTuple

from foredraft.draws import Draws
from foredraft.protocols import AcceptanceRule, Verdict
from foredraft.sampling import TargetLaw
from foredraft.tree import DraftTree, Drawn
from foredraft.verify.block import block
from foredraft.verify.chain import chain
from foredraft.verify.kseq import kseq
from foredraft.verify.lossy import typical
from foredraft.verify.multiround import deterministic, multiround, multiround_iid


class RuleRow(NamedTuple):
    """One rule.

    Attributes:
        drawn: kinds of draws it is made for.
        chains_only: whether it needs a tree without branches.
    """

    rule: AcceptanceRule
    drawn: frozenset[Drawn]
    chains_only: bool
    guarantee: str
    source: str


_D, _I, _W = Drawn.DETERMINISTIC, Drawn.IID, Drawn.WITHOUT_REPLACEMENT
_EXACT = "exact in distribution"

RULES: dict[str, RuleRow] = {
    "chain": RuleRow(chain, frozenset({_D, _I, _W}), True, _EXACT, "Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1"),
    "multiround": RuleRow(
        multiround,
        frozenset({_D, _I, _W}),
        False,
        _EXACT,
        "Sequoia (arXiv 2402.12374), Algorithm 2; DySpec (arXiv 2410.11744), Algorithm 3",
    ),
    "multiround-iid": RuleRow(
        multiround_iid, frozenset({_D, _I}), False, _EXACT, "SpecInfer (arXiv 2305.09781), multi-step speculative sampling"
    ),
    "deterministic": RuleRow(
        deterministic, frozenset({_D}), False, _EXACT, "EAGLE-2 (arXiv 2406.16858), verification of top-k candidates"
    ),
    "kseq": RuleRow(kseq, frozenset({_D, _I}), False, _EXACT, "SpecTr (arXiv 2310.15141), Algorithm 3 (K-SEQ), per token"),
    "block": RuleRow(block, frozenset({_D, _I, _W}), True, _EXACT, "Sun et al. 2024 (arXiv 2403.10444), block verification"),
    "typical": RuleRow(
        typical,
        frozenset({_D, _I, _W}),
        False,
        "lossy: accepts any token above an entropy-dependent threshold; equal to greedy decoding at temperature 0",
        "Medusa (arXiv 2401.10774), section 2.3.1, typical acceptance",
    ),
}


def for_sampled(rule: AcceptanceRule) -> AcceptanceRule:
    """`rule` for trees in which anything was sampled, `multiround`, which is exact for every tree, for all others."""

    def choose(tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        return (rule if tree.drawn.any() else multiround)(tree, target_law, draws)

    return choose
