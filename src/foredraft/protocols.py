"""The whole contract between the parts, on one page. ``docs`` and `README` name who implements what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from foredraft.draws import Draws
from foredraft.params import SamplingParams
from foredraft.sampling import TargetLaw
from foredraft.shape import Budget as Budget
from foredraft.tree import DraftTree, Ids, TreeBatch


class Scores(NamedTuple):
    """What one forward gives: ``logits[r]`` scores the children of the r-th node asked for; ``features[m]`` is the target's
    state at the m-th node that was run (None unless layers were asked for)."""

    logits: Float[Tensor, "r v"]
    features: Float[Tensor, "m d"] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a rule decided.

    Attributes:
        path: accepted nodes from below the root downwards.
        next_token: the token after them, drawn from the target's law or its residual.
        kind: ``recovered`` if the last node of the path had children, else ``bonus``.
        tv_bounds: of a lossy rule, per emitted token a bound of the total variation distance between the law that it had
            after its prefix and the target's; empty where all are 0.
    """

    path: list[int]
    next_token: int
    kind: str
    tv_bounds: Sequence[float] = ()


@runtime_checkable
class Cache(Protocol):
    """A request's handle into a pool. Holds every committed token except the root."""

    length: int

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` tokens."""
        ...


@runtime_checkable
class Pool(Protocol):
    """Room for the caches of a number of requests."""

    def allocate(self) -> Any:
        """A new empty cache. Raises RuntimeError when every slot is taken."""
        ...

    def copy(self, cache: Any) -> Any:
        """A new cache with the contents of another."""
        ...

    def free(self, cache: Any) -> None:
        """Gives a cache back; it must not be used afterwards."""
        ...

    def keep(self, caches: Sequence[Any], paths: Sequence[Sequence[int]]) -> None:
        """Commits, for every request, node 0 of the tree last run and then the nodes of its path; forgets the others."""
        ...


@runtime_checkable
class Target(Protocol):
    """A model whose law is preserved. It never samples, never warps logits and knows no drafter and no rule.

    Attributes:
        has_own_threads: whether its forward runs on threads that are not torch's.
        num_weight_bytes: of the weights that every forward reads, which is all but an embedding apart from the head.
    """

    has_own_threads: bool
    num_weight_bytes: int
    vocab_size: int
    max_len: int
    config: Any

    def new_pool(self, num_slots: int, max_len: int) -> Any:
        """Room for `num_slots` requests of at most `max_len` tokens each."""
        ...

    def forward(
        self,
        batch: TreeBatch,
        caches: Sequence[Any],
        rows: Ids | None = None,
        *,
        start: Sequence[int] | None = None,
        feature_layers: Sequence[int] = (),
    ) -> Scores:
        """Runs every tree over its own cache and scores the packed nodes `rows` (None: all that were run).

        Nodes before ``start[b]`` of tree b were run by earlier calls since the last `keep` and are not run again, so that
        a drafter can grow a tree in several passes. Lengths of caches do not change: `Pool.keep` commits.
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. Weights live in the object, what belongs to a request in its state. It never accepts anything, never
    calls the target's forward and never writes its cache."""

    feature_layers: Sequence[int]

    def start(self, tokens: Sequence[int], features: Float[Tensor, "m d"] | None) -> Any:
        """The state of a new request; ``features[j]`` is the target's state at ``tokens[j]`` (the root has none, and a prompt
        of one token has None, as has a drafter that names no layers)."""
        ...

    def propose(
        self,
        states: Sequence[Any],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree a request, within its budget. Node 0 is the last committed token."""
        ...

    def observe(self, state: Any, tokens: Sequence[int], features: Float[Tensor, "m d"] | None, path: Sequence[int]) -> None:
        """Tells what was committed: ``features[j]`` is the target's state at the node before ``tokens[j]``.

        tokens     path[0]  path[1]  ...  path[-1]   next
        features   root     path[0]  ...  path[-2]   path[-1]
        """
        ...

    def finish(self, state: Any) -> None:
        """Gives back what the request held."""
        ...


@runtime_checkable
class Expander(Protocol):
    """A drafter that computes the law after any path, as autoregressive drafters do."""

    vocab_size: int

    def expand(self, states: Sequence[Any], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Draft logits after each of the packed nodes `node_ids`, whose parents were expanded before."""
        ...


@runtime_checkable
class Grower(Protocol):
    """A tree policy. It may look at a token only after the decision to draw it."""

    def grow(
        self,
        drafter: Expander,
        states: Sequence[Any],
        roots: Sequence[int],
        budgets: Sequence[Budget],
        sampling: Sequence[SamplingParams],
        draws: Sequence[Draws],
    ) -> TreeBatch:
        """One tree for each request, within its budget; ``roots[b]`` is the last committed token of request b."""
        ...


@runtime_checkable
class AcceptanceRule(Protocol):
    """A pure function from a tree and the target's law on it to what is accepted. It sees no model, cache or temperature."""

    def __call__(self, tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        """What of `tree` is accepted, and the token that follows."""
        ...
