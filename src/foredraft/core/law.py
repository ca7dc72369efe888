"""The target's law: the probabilities that follow from its logits and the sampling parameters.

The transformations run in the order of vLLM. First come the processors that may depend on the prefix: allowed tokens, bad
words, minimum length, bias, penalties. Then follow temperature, min-p, top-k and top-p. Temperature 0 gives the one-hot law of
the largest logit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from foredraft.core.errors import UserError
from foredraft.core.params import SamplingParams
from foredraft.core.tree import DraftTree
from foredraft.kernels import run
from foredraft.kernels.laws import Largest

PrefixProcessor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
"""``(committed_ids, path_ids, logits_row) -> logits_row``. `committed_ids` are the ids of prompt and output, with the root.
`path_ids` are the ids on the path from below the root to the node. The logits of the node must not be changed in place."""


_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30
"""At the least temperature, only tied tokens keep probability. At the largest, all tokens are equally likely. Beyond these
limits, float32 could not represent the quotients."""


def at_least_float32(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """Converts logits to the precision of laws: float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def warp(logits: Float[Tensor, "n v"], sampling: SamplingParams) -> Float[Tensor, "n v"]:
    """Returns probabilities after temperature, min-p, top-k and top-p, in float32 or float64. One-hot at temperature 0.

    Above temperature 0, a row is NaN if it defines no law: every logit is minus infinity, or one is NaN or infinity.

    All tokens that tie with the last token of top-k are kept. Top-p also keeps the token that crosses the threshold; among
    equally likely tokens, the first.
    """
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits)
    return run("warp", at_least_float32(logits), **limits_of(sampling))


def limits_of(sampling: SamplingParams) -> dict[str, Any]:
    """Returns the sampling parameters that `warp` applies, as arguments of the operation."""
    temperature = float(min(max(sampling.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE))
    return {
        "temperature": temperature,
        "min_p": float(sampling.min_p),
        "top_k": sampling.top_k,
        "top_p": float(sampling.top_p),
    }


def largest(x: Float[Tensor, "n v"], k: int) -> Largest:
    """Returns the `k` largest numbers of each row, or all if a row has fewer.

    Compiled code returns the first of equal numbers first. The order of equal numbers is undefined otherwise.
    """
    return run("largest", x, count=min(k, x.shape[1]))


def likeliest(logits: Float[Tensor, "n v"]) -> tuple[list[int], list[bool]]:
    """Returns the token with the largest logit in each row, the first of equal ones, and whether that logit is finite."""
    if logits.is_cpu and logits.dtype in (torch.float32, torch.float64):
        rows = logits.numpy()  # its argmax takes a tenth of the time of torch's, which is not vectorised
        token_ids: list[int] = rows.argmax(-1).tolist()
        return token_ids, [math.isfinite(rows[place]) for place in enumerate(token_ids)]
    ids = logits.argmax(-1)
    return ids.tolist(), logits.gather(-1, ids[:, None]).isfinite().flatten().tolist()


def one_hot(token_ids: Tensor, like: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Returns the law whose row i has probability 1 at ``token_ids[i]``."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(like.shape, dtype=dtype, device=like.device).scatter_(-1, token_ids[..., None], 1.0)


_FORBIDDING = ("allowed_token_ids", "bad_words", "min_tokens", "logit_bias")
"""Sampling parameters that can forbid tokens."""

_FORBIDS_NOTHING = (None, 0, [], {}, ())
"""Values of these parameters that forbid nothing."""


class Lawful(NamedTuple):
    """Laws of several rows of logits.

    Attributes:
        probs: the probabilities; some law where the logits define none.
        is_empty: whether a row defines no law, because every logit is minus infinity, or one is NaN or infinity.
    """

    probs: Float[Tensor, "n v"]
    is_empty: list[bool]


def lawful(logits: Float[Tensor, "n v"], sampling: SamplingParams) -> Lawful:
    """Computes `warp`, and replaces the rows that define no law, so that later code needs no special case."""
    probs = warp(logits, sampling)
    if sampling.temperature == 0:
        return Lawful(probs, [not finite for finite in likeliest(logits)[1]])
    is_empty = [prob != prob for prob in probs[:, 0].tolist()]  # a row without a law is NaN
    return Lawful(probs.nan_to_num(1 / logits.shape[1]) if any(is_empty) else probs, is_empty)


class TargetLaw:
    """The target's law at each node of one tree, after sampling parameters. Rows are computed on demand and stored.

    A node has no law if every token is forbidden, or if its logits are NaN or infinite. `row` and `token` then return an
    arbitrary law, and `failure` gives the reason. Rules need no special case. An exact rule is exact for any law, so an output
    that ends at the first node with a `failure` has the right law up to that end.

    All logits are copied to the CPU at once, unless only the most likely tokens are needed. A rule requests row after row. On a
    GPU, launches and waits would cost more time than the work itself.

    Args:
        logits: row i scores the children of node i.
        sampling: the sampling parameters.
        tree: required only with `processors`.
        committed_ids: ids of prompt and output so far, including the root.
        processors: the parts of `sampling` that depend on the prefix, see `prefix_processors`.
        is_empty: whether a node has no law, for the nodes for which that is known.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"],
        sampling: SamplingParams,
        tree: DraftTree | None = None,
        committed_ids: Sequence[int] = (),
        processors: Sequence[PrefixProcessor] = (),
        *,
        is_empty: Mapping[int, bool] = MappingProxyType({}),
    ):
        self._logits = logits
        self._sampling = sampling
        self._tree = tree
        self._committed_ids = committed_ids
        self._processors = processors
        self._rows: dict[int, Tensor] = {}
        self._empty = dict(is_empty)
        self._likeliest: list[int] | None = None

    @property
    def is_certain(self) -> bool:
        """Whether every row is one-hot, as at temperature 0. Then `token` returns the token without computing a row."""
        return self._sampling.temperature == 0

    def token(self, node: int) -> int:
        """Returns the only token that can follow `node`. The law must be `is_certain`."""
        assert self.is_certain
        if self._processors:
            logits = self._processed(node)
            token = int(logits.argmax(-1))
            self._empty[node] = not math.isfinite(logits[token])
            return token
        if self._likeliest is None:
            self._likeliest, are_finite = likeliest(self._logits)
            self._empty.update(enumerate(map(operator.not_, are_finite)))
        return self._likeliest[node]

    def row(self, node: int) -> Float[Tensor, " v"]:
        """Returns the probabilities of the token after `node`."""
        return self.rows([node])[0]

    def rows(self, nodes: Sequence[int]) -> list[Float[Tensor, " v"]]:
        """Returns `row` for several nodes. Rows that are not stored yet are computed together."""
        missing = [node for node in dict.fromkeys(nodes) if node not in self._rows]
        if missing:
            probs, is_empty = lawful(torch.stack([self._processed(node) for node in missing]), self._sampling)
            self._empty.update(zip(missing, is_empty, strict=True))
            self._rows.update(zip(missing, probs, strict=True))
        return [self._rows[node] for node in nodes]

    def failure(self, node: int) -> UserError | None:
        """Returns the reason why no token can follow `node`; None if a token can follow."""
        if node not in self._empty:
            self.token(node) if self.is_certain else self.row(node)
        if not self._empty[node]:
            return None
        if not self._here[node].amax().isfinite():
            return UserError("the model's logits contain NaN or infinity", "check its weights, or choose a wider dtype")
        given = [name for name in _FORBIDDING if getattr(self._sampling, name) not in _FORBIDS_NOTHING]
        return UserError(f"every token is forbidden by {' and '.join(given) or 'the request'}", "allow at least one token")

    def raw_logprobs(self, node: int) -> Float[Tensor, " v"]:
        """Returns the log-probabilities of the model after `node`, before any transformation."""
        return at_least_float32(self._here[node]).log_softmax(-1)

    @cached_property
    def _here(self) -> Float[Tensor, "n v"]:
        """The logits on the CPU."""
        return self._logits.cpu()

    def _processed(self, node: int) -> Tensor:
        logits = self._here[node]
        if self._processors:
            assert self._tree is not None, "prefix processors need the tree"
            logits = at_least_float32(logits)
            path_ids = [int(self._tree.tokens[i]) for i in self._tree.path_to(node)]
            for processor in self._processors:
                logits = processor(self._committed_ids, path_ids, logits)
        return logits
