"""The interfaces between target, drafter, tree policy, acceptance rule and cache, all in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.core.draws import Draws
from foredraft.core.law import TargetLaw
from foredraft.core.params import SamplingParams
from foredraft.core.shape import Budget as Budget
from foredraft.core.tree import DraftTree, Ids, TreeBatch

Features = Float[Tensor, "m d"]
"""The target's states after its feature layers, concatenated, one row per token."""


class Scores(NamedTuple):
    """The result of one forward.

    Attributes:
        logits: row r scores the children of the r-th requested node.
        features: row m is the target's state at the m-th node that was run; None if no layers were requested.
    """

    logits: Float[Tensor, "r v"]
    features: Features | None = None


@dataclass(frozen=True)
class Verdict:
    """The decision of an acceptance rule.

    Attributes:
        path: the accepted nodes, downwards from the root, which is not included.
        next_token: the token after the path, drawn from the target's law or its residual.
        kind: ``recovered`` if the last node of the path has children, else ``bonus``.
        tv_bounds: only for lossy rules. For each emitted token, an upper bound of the total variation distance between its
            law after its prefix and the target's law. Empty if all bounds are 0.
    """

    path: list[int]
    next_token: int
    kind: str
    tv_bounds: Sequence[float] = ()


@runtime_checkable
class Cache(Protocol):
    """A request's handle into a pool. It holds every committed token except the root."""

    @property
    def length(self) -> int:
        """Number of committed tokens in the cache."""
        ...

    def truncate(self, length: int) -> None:
        """Forgets everything after the first `length` tokens. Raises `ValueError` if the cache holds fewer."""
        ...

    def reserve(self, length: int) -> None:
        """Takes the blocks that are missing for `length` tokens. Raises `RuntimeError` if too few are free."""
        ...


@runtime_checkable
class Pool(Protocol):
    """Memory for the caches of all requests, in blocks. A pool takes only the caches that it allocated.

    Attributes:
        blocks: gives out the blocks, see `foredraft.cache.blocks`.
    """

    blocks: Any

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token; 0 if the pool stores none."""
        ...

    def allocate(self) -> Cache:
        """Returns a new empty cache."""
        ...

    def free(self, cache: Any) -> None:
        """Releases a cache, which must not be used afterwards."""
        ...

    def keep(self, caches: Sequence[Any], paths: Sequence[Sequence[int]]) -> None:
        """Commits, for every request, node 0 of the last tree and then the nodes of its path. Drops all other nodes."""
        ...


@runtime_checkable
class Target(Protocol):
    """The model whose law is preserved. It does not sample or warp logits, and does not know the drafter or the rule.

    Nobody outside writes to its weights. Draft heads read the members from `dtype` to `shared`.

    Attributes:
        has_own_threads: whether its forward runs on threads other than torch's.
        num_weight_bytes: size of the weights that every forward reads. That is all weights except an embedding that is not
            shared with the head.
        vocab_size: number of tokens.
        max_len: the context, in tokens.
        config: the Transformers configuration of the text model; None if there is none.
    """

    has_own_threads: bool
    num_weight_bytes: int
    vocab_size: int
    max_len: int
    config: Any

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings and features."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights, features and logits."""
        ...

    def embed(self, token_ids: Int[Tensor, " n"], /) -> Float[Tensor, "n d"]:
        """Returns the input embeddings of tokens.

        Raises:
            ValueError: the target has none.
        """
        ...

    def head(self, features: Float[Tensor, "n d"], /) -> Float[Tensor, "n v"]:
        """Returns the logits of features after the last norm.

        Raises:
            ValueError: the target's output head cannot run by itself.
        """
        ...

    @property
    def shared(self) -> Mapping[str, Any] | None:
        """The embedding and output head as compiled heads read them in place; None unless compiled code runs the target."""
        ...

    def new_pool(self, blocks: Any) -> Pool:
        """Returns a new pool.

        Args:
            blocks: number of blocks, or the blocks of another pool, whose requests then hold the same blocks in this one.
        """
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
        """Runs every tree over its own cache and scores the packed nodes `rows` (None: all nodes that were run).

        Nodes before ``start[b]`` of tree b were run by earlier calls since the last `keep`, and are not run again. A drafter
        can thus grow a tree in several passes. The lengths of the caches do not change, because only `Pool.keep` commits.
        """
        ...


@dataclass(frozen=True)
class Work:
    """The requests of one step for which a drafter proposes trees. Every list has one entry per request.

    Attributes:
        states: the states that `Drafter.start` returned.
        roots: the last committed token of each request.
        budgets: the largest tree of each request.
        sampling: the sampling parameters of each request.
        draws: the random numbers of each request in this step.
    """

    states: Sequence[Any]
    roots: Sequence[int]
    budgets: Sequence[Budget]
    sampling: Sequence[SamplingParams]
    draws: Sequence[Draws]

    def __len__(self) -> int:
        return len(self.states)

    def part(self, requests: Sequence[int], states: Sequence[Any]) -> Work:
        """Returns the work of some requests for another drafter, which has its own `states` of them."""
        return Work(
            states=states,
            roots=[self.roots[b] for b in requests],
            budgets=[self.budgets[b] for b in requests],
            sampling=[self.sampling[b] for b in requests],
            draws=[self.draws[b] for b in requests],
        )

    def capped(self, room: Sequence[int]) -> Work:
        """Returns the same work with the depth of tree b limited to ``room[b]``. There is no tree if it is 0."""
        limits = [*zip(self.budgets, room, strict=True)]
        if all(left >= depth > 0 for (_, depth), left in limits):
            return self
        budgets = [Budget(nodes, min(depth, left)) if left else Budget(0, 0) for (nodes, depth), left in limits]
        return replace(self, budgets=budgets)


@runtime_checkable
class Drafter(Protocol):
    """Proposes trees. The object holds the weights, and a separate state holds the data of each request.

    A drafter never accepts tokens, never calls the target's forward and never writes the target's cache.

    Attributes:
        feature_layers: the target's layers whose features the drafter needs; empty if it needs none.
        ahead: number of positions behind the committed tokens that a step writes even if its tree is smaller.
        bytes_per_token: bytes of its own keys and values of one token; 0 if it has none.
    """

    feature_layers: Sequence[int]
    ahead: int
    bytes_per_token: int

    def start(self, tokens: Sequence[int], features: Features | None, cache: Any = None, first: int = 0) -> Any:
        """Returns the state of a new request.

        Args:
            tokens: the prompt. Its last token is the root.
            features: row j is the target's state at ``tokens[first + j]``; the root has none. None without rows or
                `feature_layers`.
            cache: the target's cache of the request. A drafter stores its own keys and values in the same blocks. None gives
                the request blocks of its own.
            first: number of tokens whose keys and values another request left in these blocks, also those of this drafter.
        """
        ...

    def propose(self, work: Work) -> TreeBatch:
        """Returns one tree per request, within its budget. Node 0 is the root."""
        ...

    def observe(self, state: Any, tokens: Sequence[int], features: Features | None, path: Sequence[int]) -> None:
        """Receives the committed tokens. ``features[j]`` is the target's state at the node before ``tokens[j]``.

        tokens     path[0]  path[1]  ...  path[-1]   next
        features   root     path[0]  ...  path[-2]   path[-1]

        After steps without drafting, a call brings all their tokens at once, with an empty path.
        """
        ...

    def written(self, state: Any) -> int | None:
        """Returns for how many tokens the drafter's keys and values are final; None if it has none."""
        ...

    def finish(self, state: Any) -> None:
        """Releases the resources of the request."""
        ...


@runtime_checkable
class Expander(Protocol):
    """A drafter that can compute the law after any path, as autoregressive drafters do."""

    vocab_size: int

    def expand(self, states: Sequence[Any], partial: TreeBatch, node_ids: Ids) -> Float[Tensor, "n v"]:
        """Returns draft logits after each of the packed nodes `node_ids`, whose parents were expanded before."""
        ...


@runtime_checkable
class Grower(Protocol):
    """A tree policy. It must decide to draw a token before it sees the token."""

    def grow(self, drafter: Expander, work: Work) -> TreeBatch:
        """Returns one tree per request, within its budget. Node 0 is the root."""
        ...


@runtime_checkable
class AcceptanceRule(Protocol):
    """A pure function that maps a tree and the target's law on it to a verdict. It sees no model, cache or temperature."""

    def __call__(self, tree: DraftTree, target_law: TargetLaw, draws: Draws) -> Verdict:
        """Returns the accepted path of `tree` and the token that follows it."""
        ...
