"""Options of every grower: plain dataclasses that check their own values. Loads neither torch nor numpy.

The algorithm of each one stands in the module that its `code` names, and is loaded when a tree is grown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from foredraft.shape import MAX_DEPTH

LARGE_VOCABULARY, LARGE_CUT = 8192, 256
"""Above this vocabulary size a draft law is cut to its likeliest tokens: whole laws would cost more than the draft model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that every grower has.

    Attributes:
        draft_temperature: temperature of the draft law; None is the request's, or 0.6 for a greedy request.
        draft_sampling: ``auto`` takes the most likely tokens at target temperature 0; ``sampled`` draws there too.
        draft_top_k: the draft law keeps this many of its likeliest tokens; 0 keeps all, None keeps 256 of a large vocabulary.
    """

    draft_temperature: float | int | None = None
    draft_sampling: str = "auto"
    draft_top_k: int | None = None

    can_sample: ClassVar[bool] = True
    """Whether its trees are ever drawn; a policy that only takes the likeliest tokens does not draw."""
    code: ClassVar[str] = ""
    """Module and function of the policy, as ``module:function``."""

    def __post_init__(self) -> None:
        if self.draft_temperature is not None and not self.draft_temperature > 0:
            raise ValueError(f"draft_temperature must be above 0 (or None), got {self.draft_temperature}")
        if self.draft_sampling not in ("auto", "sampled"):
            raise ValueError(f"draft_sampling must be 'auto' or 'sampled', got {self.draft_sampling!r}")
        if self.draft_top_k is not None and self.draft_top_k < 0:
            raise ValueError(f"draft_top_k must be at least 0 (or None), got {self.draft_top_k}")
        for name, depth in self.depths().items():
            if depth is not None and depth > MAX_DEPTH:
                raise ValueError(f"{name} must be at most {MAX_DEPTH} deep, got {depth}")

    def depths(self) -> dict[str, int | None]:
        """Depths that these options ask for, by option; each may be at most `MAX_DEPTH`."""
        return {}

    def cut(self, vocab_size: int) -> int:
        """Number of tokens that a draft law keeps."""
        usual = LARGE_CUT if vocab_size > LARGE_VOCABULARY else 0
        return min(vocab_size, (usual if self.draft_top_k is None else self.draft_top_k) or vocab_size)

    def samples(self, sampling: Any) -> bool:
        """Whether children are drawn for a request with these `SamplingParams`; else they are the likeliest tokens."""
        return self.can_sample and (self.draft_sampling == "sampled" or sampling.temperature > 0)

    def policy(self, tree: Any) -> Any:
        """Grows one `foredraft.grow.base.Sapling`: a generator, see `foredraft.grow.base.Policy`."""
        module, name = self.code.split(":")
        return getattr(import_module(module), name)(self, tree)

    def grow(self, drafter: Any, states: Sequence[Any], roots: Sequence[int], budgets: Any, sampling: Any, draws: Any) -> Any:
        """One tree for each request by this policy; see `foredraft.protocols.Grower`."""
        from foredraft.grow.base import grow_batch

        return grow_batch([self] * len(states), drafter, states, roots, budgets, sampling, draws)


@dataclass(frozen=True, kw_only=True)
class Chain(Options):
    """One drafted token after another, as deep as the budget allows.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    code = "foredraft.grow.chain:chain"


@dataclass(frozen=True, kw_only=True)
class Branching(Options):
    """Independent draws with replacement.

    With ``merge=False``, `num_chains` disjoint chains below the root (Yin et al., Algorithm 4). With ``merge=True``,
    SpecInfer's tree: at depth d every draw that reached a node makes ``expansion[d]`` draws below it; a repeated sibling stays
    as a leaf, and what would grow below it hangs under the first of its kind.

    Attributes:
        num_chains: how many chains.
        draft_depth: their length; None is budget // num_chains.
        expansion: draws per node and depth, as ``[2, 2, 1]``; None is `num_chains` at the root and 1 below.
        merge: whether equal prefixes share nodes.
    """

    code = "foredraft.grow.chain:branching"

    num_chains: int = 4
    draft_depth: int | None = None
    expansion: Sequence[int] | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_chains < 1 or (self.draft_depth is not None and self.draft_depth < 1):
            raise ValueError(f"num_chains and draft_depth must be at least 1, got {self.num_chains}, {self.draft_depth}")
        if self.expansion is not None and (not self.expansion or min(self.expansion) < 1):
            raise ValueError(f"expansion must list a number of draws, at least 1, for every depth; got {self.expansion}")

    def depths(self) -> dict[str, int | None]:
        """See `Options.depths`."""
        return {"draft_depth": self.draft_depth, "expansion": len(self.expansion or ())}


@dataclass(frozen=True, kw_only=True)
class Static(Options):
    """A tree of given sibling ranks, filled with the most likely tokens of the draft law.

    Attributes:
        paths: list of rank paths, as Medusa's choices: ``[[0], [1], [0, 0]]``. None is a sensible shape for every budget.

    Source: Medusa (arXiv 2401.10774), section 2.1.2.
    """

    code = "foredraft.grow.static:static"
    can_sample = False

    paths: Sequence[Sequence[int]] | None = None

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

    def depths(self) -> dict[str, int | None]:
        """See `Options.depths`."""
        return {"paths": max(map(len, self.paths or ()), default=0)}


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

    code = "foredraft.grow.static:sequoia"

    acceptance: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    costs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for vector in self.vectors().values():
            if not vector or min(vector) < 0 or max(vector) > 1:
                raise ValueError(f"acceptance must hold probabilities by sibling rank, got {list(vector)}")
        self.seconds()  # reports wrong costs at once

    def seconds(self) -> tuple[float, tuple[tuple[int, float], ...]] | None:
        """`costs` as the fields of `foredraft.grow.budget.Costs`."""
        if self.costs is None:
            return None
        try:
            draft, verify = float(self.costs["draft"]), tuple((int(m), float(s)) for m, s in self.costs["verify"])
            if not verify or min(draft, *(min(pair) for pair in verify)) < 0 or list(verify) != sorted(verify):
                raise ValueError
            return draft, verify
        except (KeyError, TypeError, ValueError):
            example = '{"draft": 0.001, "verify": [[1, 0.02], [16, 0.03]]}'
            raise ValueError(
                f"costs must be seconds by rising numbers of nodes, as in {example}, got {dict(self.costs)}"
            ) from None

    def vectors(self) -> dict[str, tuple[float, ...]]:
        """Acceptance by sibling rank, for each kind of request that was measured."""
        if self.acceptance is None:
            return {}
        if isinstance(self.acceptance, Mapping):
            return {key: tuple(self.acceptance[key]) for key in ("sampled", "greedy") if key in self.acceptance}
        return {"sampled": tuple(self.acceptance), "greedy": tuple(self.acceptance)}


@dataclass(frozen=True, kw_only=True)
class TopK(Options):
    """EAGLE-2's dynamic tree: the k best nodes of a layer are expanded into their k likeliest children; the nodes of the
    highest path probability over all layers are kept.

    Attributes:
        topk: k.
        draft_depth: layers; 6 is the depth of EAGLE-2's released code (5 expansions after the first).

    Source: Li et al., EAGLE-2 (arXiv 2406.16858), section 4.
    """

    code = "foredraft.grow.topk:topk"
    can_sample = False

    topk: int = 10
    draft_depth: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk < 1 or self.draft_depth < 1:
            raise ValueError(f"topk and draft_depth must be at least 1, got {self.topk}, {self.draft_depth}")

    def depths(self) -> dict[str, int | None]:
        """See `Options.depths`."""
        return {"draft_depth": self.draft_depth}


@dataclass(frozen=True, kw_only=True)
class Opt(Options):
    """OPT-Tree: layers are added while the expected acceptance of the best tree of n nodes still grows by more than `delta`.

    Attributes:
        delta: least gain in expected accepted tokens that pays for one more draft pass: between the cost of a draft pass in
            target passes and 1.

    Source: Wang et al., OPT-Tree (arXiv 2406.17276), Algorithm 1.
    """

    code = "foredraft.grow.topk:opt"
    can_sample = False

    delta: float | int = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")


@dataclass(frozen=True, kw_only=True)
class DySpec(Options):
    """The greedy tree of Algorithm 1, exactly, in a few batched passes.

    Attributes:
        width: how many of the best frontier nodes are expanded a pass; 1 is the paper's sequential order. The tree is the
            same for every width. More nodes a pass cost fewer passes and some nodes evaluated in vain. None is half of the
            budget, at most 8.
    """

    code = "foredraft.grow.dyspec:dyspec"

    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)


@dataclass(frozen=True, kw_only=True)
class DySpecCalibrated(Options):
    """The greedy tree by measured acceptance: a draw is made where acceptance, not draft probability, promises most.

    DySpec takes the draft probability of a child for the chance that it is accepted. At temperature 1 a first child is accepted
    far more often than that, and a second one tested far less often (`docs/dyspec.md`), so its trees are too flat.

    Attributes:
        acceptance_by_prob: `sampled` and `greedy`, each as `foredraft calibrate` writes it; see `AcceptanceTable`.
        width: as in `DySpec`.
    """

    code = "foredraft.grow.dyspec:dyspec_calibrated"

    acceptance_by_prob: Mapping[str, Any] | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_width(self.width)
        _ = self.tables  # reports wrong tables at once

    @cached_property
    def tables(self) -> dict[str, Any]:
        """An `AcceptanceTable` for each kind of request that was measured."""
        if not self.acceptance_by_prob:
            return {}
        from foredraft.grow.acceptance import AcceptanceTable

        return {kind: AcceptanceTable.read(given) for kind, given in self.acceptance_by_prob.items()}


@dataclass(frozen=True, kw_only=True)
class DySpecThreshold(Options):
    """The layer-wise variant of Algorithm 2: every draw whose value is not below a threshold, one pass a layer.

    The paper prints the test the other way round in both versions. If a layer would exceed the budget, the draws of lower
    value are left out before they are made.

    Attributes:
        threshold: least value of a draw that is made; None is 1 / budget.
    """

    code = "foredraft.grow.dyspec:dyspec_threshold"

    threshold: float | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1 (or None), got {self.threshold}")

    def least(self, size: int) -> float:
        """The threshold for a budget of `size` nodes."""
        return self.threshold if self.threshold is not None else 1 / max(size, 1)


def _check_width(width: int | None) -> None:
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 (or None), got {width}")
