"""The law that sampling parameters make of a target's logits.

Order of the transformations, as in vLLM: processors that may depend on the prefix (allowed tokens, bad words, minimum
length, bias, penalties), then temperature, min-p, top-k, top-p. Temperature 0 is the one-hot law of the largest logit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_double, c_int64, c_void_p
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.compiled import compiled_for
from foredraft.params import SamplingParams
from foredraft.tree import DraftTree

PrefixProcessor = Callable[[Sequence[int], Sequence[int], Tensor], Tensor]
"""``(committed_ids, path_ids, logits_row) -> logits_row``: the ids of the prompt and output so far (root included), those on
the path from the root to the node, and the node's logits, which must not be changed in place."""


_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-30, 1e30
"""Nothing but ties is left at the least, nothing but equal shares at the most; beyond them float32 could not divide."""

_SAFE_TEMPERATURE = 1e-3
"""From here on no logit that a model gives leaves float32 when it is divided; the softmax itself takes off the largest."""


def at_least_float32(logits: Float[Tensor, "*n v"]) -> Float[Tensor, "*n v"]:
    """The precision that laws are computed in."""
    return logits if logits.dtype == torch.float64 else logits.float()


def warp(logits: Float[Tensor, "n v"], sampling: SamplingParams) -> Float[Tensor, "n v"]:
    """Probabilities after temperature, min-p, top-k and top-p; one-hot at temperature 0. Float32 at least.

    Ties at the edge of top-k are all kept; top-p keeps the token that crosses the mass, the first of equal ones.
    """
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits)
    scaled = at_least_float32(logits)
    code = compiled_for(scaled)
    return _warp(scaled, sampling) if code is None else _warp_compiled(code, scaled, sampling)


def _temperature(sampling: SamplingParams) -> float:
    return float(min(max(sampling.temperature, _LEAST_TEMPERATURE), _MOST_TEMPERATURE))


def _warp_compiled(code: CDLL, logits: Float[Tensor, "n v"], sampling: SamplingParams) -> Float[Tensor, "n v"]:
    """The twin of `_warp` by `compiled/laws.c`, which does not sort."""
    logits = logits.contiguous()
    probs = torch.empty_like(logits)
    size = logits.shape[-1]
    code.foredraft_laws(
        c_void_p(logits.data_ptr()),
        *(c_int64(logits.numel() // size), c_int64(size), c_double(_temperature(sampling))),
        *(c_double(math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf), c_int64(max(sampling.top_k, 0))),
        *(c_double(sampling.top_p), c_void_p(probs.data_ptr())),
    )
    return probs


def _warp(scaled: Float[Tensor, "n v"], sampling: SamplingParams) -> Float[Tensor, "n v"]:
    """On every device and in every dtype."""
    temperature = _temperature(sampling)
    if temperature < _SAFE_TEMPERATURE or sampling.min_p > 0:
        scaled = scaled - scaled.amax(-1, keepdim=True)
    if temperature != 1:
        scaled = scaled / temperature
    if sampling.min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(sampling.min_p), -math.inf)
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    if sampling.top_p < 1:
        probs = scaled.softmax(-1)
        scaled = scaled.masked_fill(~likeliest_of_mass(probs, sampling.top_p), -math.inf)
    return scaled.softmax(-1)


_FEW = 256
"""So many likeliest tokens mostly hold the mass of top-p: to find them takes a tenth of the time of sorting all."""


def likeliest_of_mass(probs: Float[Tensor, "n v"], mass: float) -> Bool[Tensor, "n v"]:
    """The likeliest tokens of each row, up to the one with which they reach `mass`; of equal ones the first."""
    few = probs.topk(min(_FEW, probs.shape[-1])).values
    enough = few.sum(-1) >= mass * (1 + 1e-6)  # whichever way it is added up
    found = few if bool(enough.all()) else _descending(probs)
    count = (found.cumsum(-1) - found < mass).sum(-1, keepdim=True)
    least = found.gather(-1, count - 1)
    kept, equal = probs > least, probs == least
    wanted = count - kept.sum(-1, keepdim=True)
    return kept | (equal & (equal.cumsum(-1) <= wanted))


def _descending(probs: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Every row sorted; on a CPU by numpy, whose vectorised sort is much faster than torch's."""
    if probs.device.type != "cpu":
        return probs.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(probs.numpy(), axis=-1)[:, ::-1].copy())


class Largest(NamedTuple):
    """The largest numbers of each row, largest first, and where they are."""

    values: Float[Tensor, "n k"]
    places: Int[Tensor, "n k"]


_FEW_LARGEST = 64
"""So many are found faster one by one than by sorting."""


def largest(x: Float[Tensor, "n v"], k: int) -> Largest:
    """At most `k` of each row. Which of equal ones come first hangs on who finds them: of compiled code, the first."""
    count = min(k, x.shape[1])
    code = compiled_for(x)
    if code is None or not 0 < count <= _FEW_LARGEST:
        return Largest(*x.topk(count))
    x = x.contiguous()
    found = Largest(x.new_empty(len(x), count), torch.empty(len(x), count, dtype=torch.int64))
    sizes = (c_int64(one) for one in (*x.shape, count))
    code.foredraft_largest(c_void_p(x.data_ptr()), *sizes, *(c_void_p(one.data_ptr()) for one in found))
    return found


def likeliest(logits: Float[Tensor, "n v"]) -> list[int]:
    """The token of the largest logit in each row, the first of equal ones."""
    if _is_numpys(logits):
        return logits.numpy().argmax(-1).tolist()  # a tenth of the time of torch's, which does not vectorise it
    return logits.argmax(-1).tolist()


def _are_finite(logits: Float[Tensor, "n v"], token_ids: Sequence[int]) -> list[bool]:
    """Whether the logit of ``token_ids[i]`` in row i is a finite number."""
    if _is_numpys(logits):
        rows = logits.numpy()
        return [math.isfinite(rows[place]) for place in enumerate(token_ids)]
    ids = torch.tensor(token_ids, device=logits.device)
    return logits.gather(-1, ids[:, None]).isfinite().flatten().tolist()


def _is_numpys(logits: Tensor) -> bool:
    """Whether numpy can read it, which takes a part of the time that torch takes for small work."""
    return logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64)


def one_hot(token_ids: Tensor, like: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """The law that surely gives ``token_ids[i]`` in row i."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(like.shape, dtype=dtype, device=like.device).scatter_(-1, token_ids[..., None], 1.0)


_FORBIDDING = ("allowed_token_ids", "bad_words", "min_tokens", "logit_bias")
"""Parameters that can take every chance from a token."""

_FORBIDS_NOTHING = (None, 0, [], {}, ())
"""Their values that do not."""


class Solid(NamedTuple):
    """Rows of logits that all make a law, and which of them did not.

    Attributes:
        logits: as given, but 0 for every token in a row that `is_empty`.
        is_empty: no token of the row can be drawn: every logit is minus infinity, or one of them is NaN or infinite.
    """

    logits: Float[Tensor, "n v"]
    is_empty: Bool[Tensor, " n"]


def solid(logits: Float[Tensor, "n v"]) -> Solid:
    """Replaces rows of which no law can be made, so that whatever follows needs no case for them."""
    is_empty = ~logits.amax(-1).isfinite()  # NaN is larger than every number
    return Solid(logits.masked_fill(is_empty[:, None], 0.0) if bool(is_empty.any()) else logits, is_empty)


class TargetLaw:
    """The target's law at each node of one tree, after sampling parameters; computed on demand and kept.

    At a node where every token is forbidden, or where the logits are not numbers, there is no law. `row` and `token` then give
    an arbitrary one, and `failure` says why. Rules need no case for it: an exact rule is exact for whatever law stands there,
    so an output that ends at the first node with a `failure` has the right law up to that end.

    Where more is asked than the likeliest tokens, logits come to the CPU, all at once: a rule asks for row after row, which
    would cost a card more in launches and waits than in work.

    Args:
        logits: row i scores the children of node i.
        sampling: what to make of them.
        tree: needed only if there are `processors`.
        committed_ids: prompt and output so far, root included.
        processors: those parts of `sampling` that depend on the prefix, see `prefix_processors`.
    """

    def __init__(
        self,
        logits: Float[Tensor, "n v"],
        sampling: SamplingParams,
        tree: DraftTree | None = None,
        committed_ids: Sequence[int] = (),
        processors: Sequence[PrefixProcessor] = (),
    ):
        self._logits = logits
        self._sampling = sampling
        self._tree = tree
        self._committed_ids = committed_ids
        self._processors = processors
        self._rows: dict[int, Tensor] = {}
        self._empty: dict[int, bool] = {}
        self._likeliest: list[int] | None = None

    @property
    def is_certain(self) -> bool:
        """Whether every row is one-hot, as at temperature 0; then `token` says where, without a row."""
        return self._sampling.temperature == 0

    def token(self, node: int) -> int:
        """The one token that can follow `node` where the law `is_certain`."""
        assert self.is_certain
        if self._processors:
            logits = self._processed(node)
            token = int(logits.argmax(-1))
            self._empty[node] = not math.isfinite(logits[token])
            return token
        if self._likeliest is None:
            self._likeliest = likeliest(self._logits)
            self._empty.update(enumerate(map(operator.not_, _are_finite(self._logits, self._likeliest))))
        return self._likeliest[node]

    def row(self, node: int) -> Float[Tensor, " v"]:
        """Probabilities of the token after `node`."""
        return self.rows([node])[0]

    def rows(self, nodes: Sequence[int]) -> list[Float[Tensor, " v"]]:
        """`row` of several nodes, those not computed yet in one go."""
        missing = [node for node in dict.fromkeys(nodes) if node not in self._rows]
        if missing:
            logits, is_empty = solid(torch.stack([self._processed(node) for node in missing]))
            self._empty.update(zip(missing, is_empty.tolist(), strict=True))
            self._rows.update(zip(missing, warp(logits, self._sampling), strict=True))
        return [self._rows[node] for node in nodes]

    def failure(self, node: int) -> str | None:
        """Why no token can follow `node`; None where one can."""
        if node not in self._empty:
            self.token(node) if self.is_certain else self.row(node)
        if not self._empty[node]:
            return None
        if not self._here[node].amax().isfinite():
            return "the model's logits are not numbers (NaN or infinity). Check its weights, or choose a wider dtype"
        given = [name for name in _FORBIDDING if getattr(self._sampling, name) not in _FORBIDS_NOTHING]
        return f"every token is forbidden by {' and '.join(given) or 'the request'}. Allow at least one token"

    def raw_logprobs(self, node: int) -> Float[Tensor, " v"]:
        """Log-probabilities of the model itself after `node`, before any transformation."""
        return at_least_float32(self._here[node]).log_softmax(-1)

    @cached_property
    def _here(self) -> Float[Tensor, "n v"]:
        """The logits on a CPU."""
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
