"""Trees of a fixed shape: which ranks are drafted is settled before the draft law is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foredraft.grow.base import Options, Policy, Sapling
from foredraft.grow.budget import Costs, Path, best_paths

TYPICAL_ACCEPTANCE = tuple(0.55 * 0.45**rank for rank in range(10))
"""Acceptance by sibling rank that the default shapes are made for: 0.55 for the first child, as small drafters reach it,
and each further child less than half as likely. A measured vector gives better trees: that is what `Sequoia` is for."""


@dataclass(frozen=True, kw_only=True)
class Static(Options):
    """A tree of given sibling ranks, filled with the most likely tokens of the draft law.

    Attributes:
        paths: list of rank paths, as Medusa's choices: ``[[0], [1], [0, 0]]``. None is a sensible shape for every budget.

    Source: Medusa (arXiv 2401.10774), section 2.1.2.
    """

    paths: Sequence[Sequence[int]] | None = None

    can_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {tuple(path) for path in self.paths or ()}
        for path in given:
            before = [path[:-1]] * (len(path) > 1) + [(*path[:-1], rank) for rank in range(path[-1] if path else 0)]
            missing = [one for one in before if one not in given]
            if not path or min(path) < 0 or missing:
                raise ValueError(
                    f"paths must hold, with a path, its parent and its earlier siblings: {list(path)} lacks "
                    f"{[list(one) for one in missing] or 'ranks of 0 or above'}"
                )

    def policy(self, tree: Sapling) -> Policy:
        if self.paths is None:
            return fill(tree, best_paths(TYPICAL_ACCEPTANCE, tree.budget))
        paths = sorted((tuple(path) for path in self.paths), key=lambda path: (len(path), path))
        return fill(tree, [path for path in paths if len(path) <= tree.budget.depth][: tree.budget.nodes])


@dataclass(frozen=True, kw_only=True)
class Sequoia(Options):
    """The best positional tree for a measured acceptance vector, filled by draws without replacement.

    Attributes:
        acceptance: probability, by sibling rank, that this child is the accepted one; a list, or a mapping with the keys
            ``sampled`` and ``greedy``. None is refused when a tree is grown.
        costs: ``{"draft": seconds a pass, "verify": [[nodes, seconds], ...]}``; with it, size and depth are those of the
            highest expected value per second within the budget.

    Source: Sequoia (arXiv 2402.12374), section 4.1.
    """

    acceptance: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    costs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for vector in self._vectors().values():
            if not vector or min(vector) < 0 or max(vector) > 1:
                raise ValueError(f"acceptance must hold probabilities by sibling rank, got {list(vector)}")
        if self.costs is not None:
            self._costs()  # says now what is wrong with them

    def _costs(self) -> Costs | None:
        if self.costs is None:
            return None
        try:
            return Costs(float(self.costs["draft"]), tuple((int(m), float(s)) for m, s in self.costs["verify"]))
        except (KeyError, TypeError, ValueError):
            example = '{"draft": 0.001, "verify": [[1, 0.02], [16, 0.03]]}'
            raise ValueError(f"costs must be seconds as in {example}, got {dict(self.costs)}") from None

    def _vectors(self) -> dict[str, tuple[float, ...]]:
        if self.acceptance is None:
            return {}
        if isinstance(self.acceptance, Mapping):
            return {key: tuple(self.acceptance[key]) for key in ("sampled", "greedy") if key in self.acceptance}
        return {"sampled": tuple(self.acceptance), "greedy": tuple(self.acceptance)}

    def policy(self, tree: Sapling) -> Policy:
        vectors = self._vectors()
        if not vectors:
            raise ValueError(
                "tree 'sequoia' needs a measured acceptance vector by sibling rank: give it as the config key 'acceptance' "
                "(for instance [0.6, 0.15, 0.07]), or measure it with `foredraft calibrate`"
            )
        vector = vectors.get("sampled" if tree.sampled else "greedy") or next(iter(vectors.values()))
        return fill(tree, best_paths(vector, tree.budget, self._costs()))


def fill(tree: Sapling, paths: Sequence[Path]) -> Policy:
    """Grows the shape `paths`, a layer a pass; a node whose law has too few tokens gets fewer children."""
    at: dict[Path, int] = {(): 0}
    for depth in range(1, max(map(len, paths), default=0) + 1):
        wanted: dict[Path, int] = {}
        for path in paths:
            if len(path) == depth and path[:-1] in at:
                wanted[path[:-1]] = wanted.get(path[:-1], 0) + 1
        if not wanted:
            break
        nodes = [at[parent] for parent in wanted]
        laws = yield nodes
        picked = tree.pick(nodes, laws, max(wanted.values()))
        for (parent, count), node, children in zip(wanted.items(), nodes, picked, strict=True):
            for rank, (token, prob) in enumerate(children.pairs()[:count]):
                at[(*parent, rank)] = tree.add(node, token, prob, tree.way)
