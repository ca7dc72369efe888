"""Options of the policies whose trees follow the draft law. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from foredraft.core.errors import UserError
from foredraft.trees.options import Options


@dataclass(frozen=True, kw_only=True)
class TopK(Options):
    """EAGLE-2's dynamic tree.

    The k best nodes of each layer get their k most likely children. Of all layers, the nodes of highest path probability are
    kept.

    Attributes:
        topk: k, at least 1.
        draft_depth: number of layers, at least 1. The default 6 is the depth of EAGLE-2's released code, which makes 5
            expansions after the first.

    Raises:
        ValueError: a value is out of range.

    Source: Li et al., EAGLE-2 (arXiv 2406.16858), section 4.
    """

    code = "foredraft.trees.topk:topk"
    can_sample = False

    topk: int = 10
    draft_depth: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk < 1 or self.draft_depth < 1:
            raise UserError(f"topk and draft_depth must be at least 1, got {self.topk}, {self.draft_depth}")

    def depths(self) -> dict[str, int | None]:
        """Returns the depth of each option; see `Options.depths`."""
        return {"draft_depth": self.draft_depth}


@dataclass(frozen=True, kw_only=True)
class Opt(Options):
    """OPT-Tree: adds layers while the expected accepted tokens of the best tree within the budget grow by more than `delta`.

    Attributes:
        delta: least gain in expected accepted tokens that pays for another draft pass, between 0 and 1. A useful value is at
            least the cost of a draft pass divided by the cost of a target pass.

    Raises:
        ValueError: `delta` is out of range.

    Source: Wang et al., OPT-Tree (arXiv 2406.17276), Algorithm 1.
    """

    code = "foredraft.trees.topk:opt"
    can_sample = False

    delta: float | int = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.delta <= 1:
            raise UserError(f"delta must be between 0 and 1, got {self.delta}")


@dataclass(frozen=True, kw_only=True)
class DySpec(Options):
    """DySpec's greedy tree: exactly the tree of Algorithm 1, grown in a few batched passes.

    Attributes:
        width: number of the best frontier nodes that each pass expands, at least 1. It does not change the tree. A larger
            width needs fewer passes, but evaluates some nodes in vain. 1 is the sequential order of the paper. None is half of
            the budget, at most 8.

    Raises:
        ValueError: `width` is below 1.

    Source: Xiong et al., DySpec (arXiv 2410.11744), Algorithm 1.
    """

    code = "foredraft.trees.dyspec:dyspec"

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)


@dataclass(frozen=True, kw_only=True)
class DySpecCalibrated(Options):
    """DySpec's greedy tree with values from measured acceptance instead of draft probability.

    DySpec estimates the acceptance of a child by its draft probability. At temperature 1 a first child is accepted far more
    often, and a second child is tested far less often (`docs/dyspec.md`), so its trees are too flat.

    Attributes:
        acceptance_by_prob: measured acceptance under the keys ``sampled`` and ``greedy``, in the form that
            `foredraft calibrate` writes; see `foredraft.trees.acceptance.AcceptanceTable`.
        width: as in `DySpec`.

    Raises:
        ValueError: `width` is below 1, or `acceptance_by_prob` has another form.
    """

    code = "foredraft.trees.dyspec:dyspec_calibrated"

    acceptance_by_prob: Mapping[str, Any] | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)
        _ = self.tables  # reports wrong tables at once

    @cached_property
    def tables(self) -> dict[str, Any]:
        """Kind of request -> its `AcceptanceTable`, for each kind that was measured."""
        if not self.acceptance_by_prob:
            return {}
        from foredraft.trees.acceptance import AcceptanceTable

        return {kind: AcceptanceTable.read(given) for kind, given in self.acceptance_by_prob.items()}


@dataclass(frozen=True, kw_only=True)
class DySpecThreshold(Options):
    """DySpec's layer-wise tree: makes every draw whose value is at least a threshold, with one pass per layer.

    Both versions of the paper print the test the other way round. If a layer would exceed the budget, the draws of lowest value
    are not made.

    Attributes:
        threshold: least value of a draw that is made, above 0 and at most 1. None is 1 / budget.

    Raises:
        ValueError: `threshold` is out of range.

    Source: Xiong et al., DySpec (arXiv 2410.11744), Algorithm 2.
    """

    code = "foredraft.trees.dyspec:dyspec_threshold"

    threshold: float | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold must be above 0 and at most 1 (or None), got {self.threshold}")

    def least(self, size: int) -> float:
        """Returns the threshold for a budget of `size` nodes."""
        return self.threshold if self.threshold is not None else 1 / max(size, 1)


def _check_width(width: int | None) -> None:
    if width is not None and width < 1:
        raise UserError(f"width must be at least 1 (or None), got {width}")
