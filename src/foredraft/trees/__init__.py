"""Tree policies: how a drafter grows a token tree. `GROWERS` is the table of all policies."""

from __future__ import annotations

from typing import NamedTuple

from foredraft.core.shape import Drawn
from foredraft.trees.options import Options
from foredraft.trees.options_dynamic import DySpec, DySpecCalibrated, DySpecThreshold, Opt, TopK
from foredraft.trees.options_fixed import Branching, Chain, Sequoia, Static


class GrowerRow(NamedTuple):
    """One row of the table of policies.

    Attributes:
        grower: class of the policy's options, a dataclass. It imports the policy when a tree is grown.
        needs: capability that the drafter must have, see `foredraft.drafters.DRAFTERS`.
        drawn: how children are drawn at temperatures above 0. At temperature 0 all children are deterministic, unless
            `draft_sampling` is ``sampled``.
        rule: name of the best exact rule for the trees of the policy.
        chains_only: whether the trees never branch.
        source: the paper.
    """

    grower: type[Options]
    needs: str
    drawn: Drawn
    rule: str
    chains_only: bool
    source: str


_D, _I, _W = Drawn.DETERMINISTIC, Drawn.IID, Drawn.WITHOUT_REPLACEMENT

GROWERS: dict[str, GrowerRow] = {
    "chain": GrowerRow(Chain, "expand", _I, "block", True, "Leviathan et al. 2023 (arXiv 2211.17192)"),
    "branching": GrowerRow(
        Branching, "expand", _I, "multiround-iid", False, "Yin et al. 2024 (arXiv 2411.00841), Algorithm 4; SpecInfer"
    ),
    "static": GrowerRow(Static, "expand", _D, "deterministic", False, "Medusa (arXiv 2401.10774), section 2.1.2"),
    "sequoia": GrowerRow(Sequoia, "expand", _W, "multiround", False, "Sequoia (arXiv 2402.12374), section 4.1"),
    "topk": GrowerRow(TopK, "expand", _D, "deterministic", False, "EAGLE-2 (arXiv 2406.16858), section 4"),
    "opt": GrowerRow(Opt, "expand", _D, "deterministic", False, "OPT-Tree (arXiv 2406.17276), Algorithm 1"),
    "dyspec": GrowerRow(DySpec, "expand", _W, "multiround", False, "DySpec (arXiv 2410.11744), Algorithm 1"),
    "dyspec-calibrated": GrowerRow(
        DySpecCalibrated,
        "expand",
        _W,
        "multiround",
        False,
        "DySpec, Algorithm 1, with acceptance measured as in Sequoia, section 4.1",
    ),
    "dyspec-threshold": GrowerRow(DySpecThreshold, "expand", _W, "multiround", False, "DySpec (arXiv 2410.11744), Algorithm 2"),
}
