"""Acceptance rules. `RULES` is the table of all rules and their guarantees. Every inexact rule is in `lossy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

from foredraft.core.shape import Drawn


@cache
def _imported(code: str) -> Callable[..., Any]:
    module, name = code.split(":")
    return getattr(import_module(f"foredraft.rules.{module}"), name)


class RuleRow(NamedTuple):
    """One row of the table of rules.

    Attributes:
        code: ``module:function`` within this package. It is imported when the rule is used.
        drawn: kinds of draws that the rule supports.
        chains_only: whether the rule needs a tree without branches.
        guarantee: whether the rule is exact, and how it deviates if it is lossy.
        source: the paper.
        options: config keys that are arguments of the rule.
        exact_with: options for which a lossy rule is exact.
        batched: code of the check of a tree, after which `foredraft.rules.batched` may give the verdict of the rule for many
            trees at once. Empty if the rule decides tree by tree.
    """

    code: str
    drawn: frozenset[Drawn]
    chains_only: bool
    guarantee: str
    source: str
    options: Sequence[str] = ()
    exact_with: Mapping[str, Any] = {}
    batched: str = ""

    @property
    def rule(self) -> Callable[..., Any]:
        """The rule, a `foredraft.core.contracts.AcceptanceRule`."""
        return _imported(self.code)

    @property
    def check(self) -> Callable[..., None] | None:
        """The check that `batched` names. It raises `ValueError` for the trees for which the rule does. None without it."""
        return _imported(self.batched) if self.batched else None

    def claim(self, options: Mapping[str, Any]) -> str:
        """Returns the guarantee of the rule with these options."""
        exact = self.exact_with and all(options.get(key) == value for key, value in self.exact_with.items())
        return _EXACT if exact else self.guarantee

    def with_options(self, **options: Any) -> Callable[..., Any]:
        """Returns the rule with these options fixed."""
        return partial(self.rule, **options) if options else self.rule


_D, _I, _W = Drawn.DETERMINISTIC, Drawn.IID, Drawn.WITHOUT_REPLACEMENT
_EXACT = "exact in distribution"

RULES: dict[str, RuleRow] = {
    "chain": RuleRow(
        "chain:chain",
        frozenset({_D, _I, _W}),
        True,
        _EXACT,
        "Leviathan et al. 2023 (arXiv 2211.17192), Algorithm 1",
        batched="chain:require_unbranched",
    ),
    "multiround": RuleRow(
        "multiround:multiround",
        frozenset({_D, _I, _W}),
        False,
        _EXACT,
        "Sequoia (arXiv 2402.12374), Algorithm 2; DySpec (arXiv 2410.11744), Algorithm 3",
        batched="multiround:require_nothing",
    ),
    "multiround-iid": RuleRow(
        "multiround:multiround_iid",
        frozenset({_D, _I}),
        False,
        _EXACT,
        "SpecInfer (arXiv 2305.09781), multi-step speculative sampling",
        batched="multiround:require_independent",
    ),
    "deterministic": RuleRow(
        "multiround:deterministic",
        frozenset({_D}),
        False,
        _EXACT,
        "EAGLE-2 (arXiv 2406.16858), verification of top-k candidates",
        batched="multiround:require_unsampled",
    ),
    "kseq": RuleRow(
        "kseq:kseq", frozenset({_D, _I}), False, _EXACT, "SpecTr (arXiv 2310.15141), Algorithm 3 (K-SEQ), per token"
    ),
    "block": RuleRow(
        "block:block", frozenset({_D, _I, _W}), True, _EXACT, "Sun et al. 2024 (arXiv 2403.10444), block verification"
    ),
    "typical": RuleRow(
        "lossy:typical",
        frozenset({_D, _I, _W}),
        False,
        "lossy: accepts any token above an entropy-dependent threshold; equal to greedy decoding at temperature 0",
        "Medusa (arXiv 2401.10774), section 2.3.1, typical acceptance",
    ),
    "tolerance": RuleRow(
        "lossy:tolerance",
        frozenset({_D, _I, _W}),
        True,
        "lossy: over-accepts by epsilon; the output reports a bound on the distance of every token's law",
        "Yin et al. 2024 (arXiv 2411.00841), section 4, Decoding-OPT",
        ("epsilon",),
        {"epsilon": 0},
    ),
    "uno": RuleRow(
        "lossy:uno",
        frozenset({_D, _I, _W}),
        True,
        "lossy, even at epsilon 0: over-accepts by epsilon and redraws from the target's law; for comparison",
        "Yin et al. 2024 (arXiv 2411.00841), section 4.3, Decoding-UNO",
        ("epsilon",),
    ),
}
