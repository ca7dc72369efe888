"""Options of the tree policies: dataclasses that check their values. Imports neither torch nor numpy.

The algorithm of a policy is in the module that `Options.code` names. It is imported when a tree is grown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, ClassVar

from foredraft.core.shape import MAX_DEPTH

LARGE_VOCABULARY, LARGE_CUT = 8192, 256
"""Above the first vocabulary size, a draft law keeps the second number of most likely tokens by default. Whole laws would cost
more than the draft model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every tree policy.

    Attributes:
        draft_temperature: temperature of the draft law, above 0. None is the temperature of the request, or 0.6 for a greedy
            request.
        draft_sampling: how children are chosen at temperature 0. ``auto`` takes the most likely tokens, ``sampled`` draws them.
            At temperatures above 0 they are always drawn, unless the policy never draws.
        draft_top_k: number of most likely tokens that the draft law keeps. 0 keeps all. None keeps 256 if the vocabulary is
            larger than 8192, else all.

    Raises:
        ValueError: a value is out of range.
    """

    draft_temperature: float | int | None = None
    draft_sampling: str = "auto"
    draft_top_k: int | None = None

    can_sample: ClassVar[bool] = True
    """Whether the policy draws children. False means that it always takes the most likely tokens."""
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
        """Returns option -> the depth that it asks for. Each depth is at most `MAX_DEPTH`."""
        return {}

    def cut(self, vocab_size: int) -> int:
        """Returns the number of tokens that a draft law keeps."""
        usual = LARGE_CUT if vocab_size > LARGE_VOCABULARY else 0
        return min(vocab_size, (usual if self.draft_top_k is None else self.draft_top_k) or vocab_size)

    def samples(self, sampling: Any) -> bool:
        """Returns whether a request with these `SamplingParams` draws children. If not, it takes the most likely tokens."""
        return self.can_sample and (self.draft_sampling == "sampled" or sampling.temperature > 0)

    def policy(self, tree: Any) -> Any:
        """Returns the generator that grows one `foredraft.trees.base.Sapling`, see `foredraft.trees.base.Policy`."""
        module, name = self.code.split(":")
        return getattr(import_module(module), name)(self, tree)

    def grow(self, drafter: Any, work: Any) -> Any:
        """Grows one tree per request by this policy; see `foredraft.core.contracts.Grower`."""
        from foredraft.trees.base import grow_batch

        return grow_batch([self] * len(work), drafter, work)


@dataclass(frozen=True, kw_only=True)
class Chain(Options):
    """A chain, as deep as the budget allows.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).
    """

    code = "foredraft.trees.chain:chain"


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
            raise ValueError(f"num_chains and draft_depth must be at least 1, got {self.num_chains}, {self.draft_depth}")
        if self.expansion is not None and (not self.expansion or min(self.expansion) < 1):
            raise ValueError(f"expansion must list a number of draws, at least 1, for every depth; got {self.expansion}")

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
            raise ValueError(f"paths must {what}, got {list(self.paths)[:8]}")
        for path in given:
            before = [path[:-1]] * (len(path) > 1) + [(*path[:-1], rank) for rank in range(path[-1] if path else 0)]
            missing = [needed for needed in before if needed not in given]
            if not path:
                raise ValueError(
                    "paths must hold the ranks from the root to every node, so an empty path names none. Leave it out"
                )
            if min(path) < 0 or missing:
                raise ValueError(
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
                raise ValueError(f"acceptance must be a list of probabilities by sibling rank, got {list(vector)}")
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
            raise ValueError(
                f"costs must be seconds by rising numbers of nodes, as in {example}, got {dict(self.costs)}"
            ) from None

    def vectors(self) -> dict[str, tuple[float, ...]]:
        """Returns kind of request -> its acceptance vector, for each kind that was measured."""
        if self.acceptance is None:
            return {}
        if isinstance(self.acceptance, Mapping):
            if not self.acceptance.keys() <= {"sampled", "greedy"}:
                raise ValueError(
                    f"acceptance must have the keys sampled and greedy, got {', '.join(map(str, self.acceptance))}"
                )
            return {key: tuple(vector) for key, vector in self.acceptance.items()}
        return {"sampled": tuple(self.acceptance), "greedy": tuple(self.acceptance)}


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
            raise ValueError(f"topk and draft_depth must be at least 1, got {self.topk}, {self.draft_depth}")

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
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")


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
            raise ValueError(f"threshold must be above 0 and at most 1 (or None), got {self.threshold}")

    def least(self, size: int) -> float:
        """Returns the threshold for a budget of `size` nodes."""
        return self.threshold if self.threshold is not None else 1 / max(size, 1)


def _check_width(width: int | None) -> None:
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1 (or None), got {width}")
