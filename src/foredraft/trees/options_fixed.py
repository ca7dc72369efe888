"""Options of the policies that fix the shape of a tree before the draft law is known. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foredraft.core.errors import UserError
from foredraft.trees.options import Options


@dataclass(frozen=True, kw_only=True)
class Chain(Options):
    """A chain, as deep as the budget allows.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    code = "foredraft.trees.chain:chain"

    def grow(self, drafter: Any, work: Any) -> Any:
        """Grows one chain per request, in one call of the drafter if possible; see `foredraft.core.contracts.Grower`."""
        from foredraft.trees.at_once import at_once

        return at_once(self, drafter, work) or super().grow(drafter, work)


@dataclass(frozen=True, kw_only=True)
class Branching(Options):
    """A tree of independent draws with replacement.

    ``merge=False`` grows `num_chains` disjoint chains below the root (Yin et al., Algorithm 4). ``merge=True`` grows
    SpecInfer's tree: at depth d, every draw that reached a node makes ``expansion[d]`` draws below it. A repeated sibling stays
    a leaf, and its draws are made below the first sibling with the same token.

    Attributes:
        num_chains: number of chains, at least 1.
        draft_depth: length of the chains in tokens. None is budget // num_chains.
        expansion: number of draws per node for each depth, such as ``[2, 2, 1]``. None is `num_chains` at the root and 1 below.
        merge: whether equal prefixes share nodes.

    Raises:
        ValueError: a value is out of range.
    """

    code = "foredraft.trees.chain:branching"

    num_chains: int = 4
    draft_depth: int | None = None
    expansion: Sequence[int] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chains < 1 or (self.draft_depth is not None and self.draft_depth < 1):
            raise UserError(f"num_chains and draft_depth must be at least 1, got {self.num_chains}, {self.draft_depth}")
        if self.expansion is not None and (not self.expansion or min(self.expansion) < 1):
            raise UserError("expansion must list a number of draws, at least 1, for every depth", f"got {self.expansion}")

    def depths(self) -> dict[str, int | None]:
        """Returns the depth of each option; see `Options.depths`."""
        return {"draft_depth": self.draft_depth, "expansion": len(self.expansion or ())}


@dataclass(frozen=True, kw_only=True)
class Static(Options):
    """A tree of fixed shape, filled with the most likely tokens of the draft law.

    Attributes:
        paths: the shape as paths of sibling ranks, such as ``[[0], [1], [0, 0]]`` (Medusa's choices). None is the best shape
            for a typical acceptance, at every budget.

    Raises:
        ValueError: a path lacks its parent or an earlier sibling, or a rank is negative.

    Source: Medusa (arXiv 2401.10774), section 2.1.2.
    """

    code = "foredraft.trees.static:static"
    can_sample = False

    paths: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {tuple(path) for path in self.paths or ()}
        if self.paths is not None and len(given) != max(1, len(self.paths)):
            what = "name every node once" if self.paths else "name at least one node"
            raise UserError(f"paths must {what}, got {list(self.paths)[:8]}")
        for path in given:
            before = [path[:-1]] * (len(path) > 1) + [(*path[:-1], rank) for rank in range(path[-1] if path else 0)]
            missing = [needed for needed in before if needed not in given]
            if not path:
                raise UserError(
                    "paths must hold the ranks from the root to every node, so an empty path names none", "Leave it out"
                )
            if min(path) < 0 or missing:
                raise UserError(
                    f"paths must hold the parent and the earlier siblings of every path: {list(path)} lacks "
                    f"{[list(needed) for needed in missing] or 'ranks of 0 or above'}"
                )

    def depths(self) -> dict[str, int | None]:
        """Returns the depth of each option; see `Options.depths`."""
        return {"paths": max(map(len, self.paths or ()), default=0)}


@dataclass(frozen=True, kw_only=True)
class Sequoia(Options):
    """The best tree shape for a measured acceptance vector, filled by draws without replacement.

    Attributes:
        acceptance: probability that the child of each sibling rank is the accepted one. A list, or a mapping with the keys
            ``sampled`` and ``greedy``. None is refused when a tree is grown.
        costs: seconds of each pass, ``{"draft": seconds, "verify": [[nodes, seconds], ...]}``. With costs, the tree has the
            size and depth of the highest expected value per second within the budget.

    Raises:
        ValueError: `acceptance` holds no probabilities, or `costs` has another form.

    Source: Sequoia (arXiv 2402.12374), section 4.1.
    """

    code = "foredraft.trees.static:sequoia"

    acceptance: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    costs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for vector in self.vectors().values():
            if not vector or min(vector) < 0 or max(vector) > 1:
                raise UserError(f"acceptance must be a list of probabilities by sibling rank, got {list(vector)}")
        self.seconds()  # reports wrong costs at once

    def seconds(self) -> tuple[float, tuple[tuple[int, float], ...]] | None:
        """Returns `costs` as the fields of `foredraft.trees.budget.Costs`, or None.

        Raises:
            ValueError: `costs` has another form.
        """
        if self.costs is None:
            return None
        try:
            draft, verify = float(self.costs["draft"]), tuple((int(m), float(s)) for m, s in self.costs["verify"])
            if not verify or min(draft, *(min(pair) for pair in verify)) < 0 or list(verify) != sorted(verify):
                raise ValueError
            return draft, verify
        except (KeyError, TypeError, ValueError):
            example = '{"draft": 0.001, "verify": [[1, 0.02], [16, 0.03]]}'
            raise UserError(
                f"costs must be seconds by rising numbers of nodes, as in {example}, got {dict(self.costs)}"
            ) from None

    def vectors(self) -> dict[str, tuple[float, ...]]:
        """Returns kind of request -> its acceptance vector, for each kind that was measured."""
        if self.acceptance is None:
            return {}
        if isinstance(self.acceptance, Mapping):
            if not self.acceptance.keys() <= {"sampled", "greedy"}:
                raise UserError(f"acceptance must have the keys sampled and greedy, got {', '.join(map(str, self.acceptance))}")
            return {key: tuple(vector) for key, vector in self.acceptance.items()}
        return {"sampled": tuple(self.acceptance), "greedy": tuple(self.acceptance)}
