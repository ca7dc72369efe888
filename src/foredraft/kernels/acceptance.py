"""Verifies the trees of a step together by the multi-round rule. There is a compiled version and one in torch.

The compiled version does for each tree what `foredraft.rules.multiround` does, with the same laws, residuals and draws, so its
verdicts are equal bit for bit. The version in torch runs on every device. It tests the r-th child of every node at once, for
one rank r after another. Then it finds the accepted paths by jumps of doubling length, and draws all next tokens. The results
are transferred to the host once. With top-p, a flag for each group of trees is transferred before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.kernels.laws import categorical_rows, warp_rows
from foredraft.kernels.sets import Code
from foredraft.kernels.structures import CTrees
from foredraft.kernels.uniforms import address, sibling_ranks

WITHOUT_REPLACEMENT = 2
"""Value of `drawn` for children drawn without replacement."""

Ids = Int[np.ndarray, " n"]


class Trees(NamedTuple):
    """Packed trees and what decides about them. B trees have M nodes.

    Attributes:
        offsets: tree b holds the nodes ``offsets[b]`` to ``offsets[b + 1] - 1``.
        rows: the row of the logits of each root. The rows of the other nodes of its tree follow.
        tokens, parents, drawn, draft_row: for each node, as in `foredraft.core.tree.TreeBatch`.
        limits: for each tree temperature, logarithm of min_p, top_k and top_p. Temperature 0 is greedy.
        uniforms: for each node two numbers in [0, 1): one for the test of its token, one for the token after it. None if every
            temperature is 0.
    """

    offsets: Int[np.ndarray, " b1"]
    rows: Int[np.ndarray, " b"]
    tokens: Ids
    parents: Ids
    drawn: Ids
    draft_row: Ids
    limits: Float[np.ndarray, "b 4"]
    uniforms: Float[np.ndarray, "2 n"] | None


class Accepted(NamedTuple):
    """The verdicts.

    Attributes:
        last: for each tree the last accepted node, counted within the tree.
        next_tokens: for each tree the token after it.
        lawless: for each tree the first node from the root to `last` whose logits define no law; -1 if there is none.
    """

    last: list[int]
    next_tokens: list[int]
    lawless: list[int]


def accept_compiled(
    code: Code,
    logits: Float[Tensor, "r v"],
    draft_probs: Float[Tensor, "l k"],
    *,
    trees: Trees,
    draft_ids: Int[Tensor, "l k"] | None,
) -> Accepted:
    """Computes `accept` in float32 on a CPU. The threads of compiled forwards share the sampled trees among themselves.

    Raises:
        ValueError: a tree cannot be read.
        MemoryError: there is not enough memory.
    """
    (num_laws, kept), size = draft_probs.shape, logits.shape[1]
    if draft_ids is None and num_laws and kept != size:
        raise ValueError(f"the draft laws have {kept} tokens, but the target has {size}")
    logits, draft_probs = logits.contiguous(), draft_probs.contiguous()
    draft_ids = None if draft_ids is None else draft_ids.contiguous()
    count, nodes, uniforms = len(trees.rows), len(trees.tokens), trees.uniforms
    given = np.concatenate(trees[:6], dtype=np.int64)
    found = np.empty((3, count), np.int64)
    at, out, numbers = address(given), address(found), None if uniforms is None else address(uniforms)
    at_nodes = [at + 8 * (2 * count + 1 + part * nodes) for part in range(4)]
    laws = draft_probs.data_ptr(), None if draft_ids is None else draft_ids.data_ptr(), num_laws, kept
    passed = CTrees(
        *(count, at, at + 8 * (count + 1), *at_nodes, logits.data_ptr(), size, *laws, address(trees.limits)),
        *(numbers, None if numbers is None else numbers + 8 * nodes, out, out + 8 * count, out + 16 * count),
    )
    if code.accept(ctypes.byref(passed)):
        raise MemoryError("not enough memory to verify the trees of a step")
    return _checked(found)


def _checked(found: Int[np.ndarray, "3 b"]) -> Accepted:
    accepted = Accepted(*found.tolist())
    if min(accepted.next_tokens) < 0:
        raise ValueError("a tree cannot be read, or a law has no mass")
    return accepted


_MOST_NUMBERS = 1 << 26
"""Trees are verified in groups of at most this many probabilities, which are 256 MiB in float32. A larger tree is its own
group. A group needs several times that memory."""


def accept(
    logits: Float[Tensor, "r v"], draft_probs: Float[Tensor, "l k"], *, trees: Trees, draft_ids: Int[Tensor, "l k"] | None
) -> Accepted:
    """Verifies packed trees by the multi-round rule, on every device and in every dtype.

    Laws are computed in float32 at least. A step of greedy trees computes none.

    Args:
        logits: they may be on any device.
        draft_probs: the draft laws, moved to the device of the logits.
        trees: the trees and what decides about them.
        draft_ids: the tokens of the draft laws; None if entry j is token j.

    Raises:
        ValueError: a tree cannot be read, or a law has no mass.
    """
    _check(trees, logits.shape[1], len(draft_probs))
    device = logits.device
    table = _Table(draft_probs.to(device), None if draft_ids is None else draft_ids.to(device))
    parts = [_Group(logits, table, group).verdicts() for group in _groups(trees, logits.shape[1])]
    return _checked(torch.cat(parts, dim=1).cpu().numpy())


def _groups(trees: Trees, size: int) -> Iterator[Trees]:
    """Splits trees into groups of bounded size."""
    begin, count = 0, len(trees.rows)
    while begin < count:
        most = int(trees.offsets[begin]) + _MOST_NUMBERS // size
        end = max(begin + 1, int(np.searchsorted(trees.offsets, most, side="right")) - 1)
        first, last = trees.offsets[begin], trees.offsets[end]
        yield Trees(
            offsets=trees.offsets[begin : end + 1] - first,
            rows=trees.rows[begin:end],
            tokens=trees.tokens[first:last],
            parents=trees.parents[first:last],
            drawn=trees.drawn[first:last],
            draft_row=trees.draft_row[first:last],
            limits=trees.limits[begin:end],
            uniforms=None if trees.uniforms is None else trees.uniforms[:, first:last],
        )
        begin = end


def _check(trees: Trees, size: int, num_laws: int) -> None:
    """Checks the indices, because a wrong one on a GPU ends all its work."""
    own = np.arange(len(trees.parents)) - np.repeat(trees.offsets[:-1], np.diff(trees.offsets))
    tokens = trees.tokens[own > 0]
    is_good = ((trees.parents < own) & ((trees.parents >= 0) == (own > 0))).all()
    if not (is_good and (tokens >= 0).all() and (tokens < size).all() and (trees.draft_row < num_laws).all()):
        raise ValueError("a tree cannot be read")


class _Table(NamedTuple):
    """The draft laws."""

    probs: Float[Tensor, "l k"]
    token_ids: Int[Tensor, "l k"] | None

    def rows(self, rows: Ids, size: int, dtype: torch.dtype) -> Float[Tensor, "p v"]:
        """Returns laws over all tokens. Row -1 has no law and gives zeros."""
        found = torch.zeros(len(rows), size, dtype=dtype, device=self.probs.device)
        if not (rows >= 0).any():
            return found
        places = _moved(np.flatnonzero(rows >= 0), found.device)
        chosen = _moved(rows[rows >= 0], found.device)
        probs = self.probs[chosen].to(dtype)
        if self.token_ids is not None:
            probs = probs.new_zeros(len(chosen), size).scatter_(1, self.token_ids[chosen], probs)
        found[places] = probs
        return found


def _moved(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device, non_blocking=True)


class _Group:
    """Some trees while they are verified.

    Attributes:
        parents: the parent of each node in the group; a root is its own.
        accepted: whether each node is accepted once it is tested.
        likeliest: the most likely token after each node; only at temperature 0.
        laws: the law after each node of a sampled tree, or its residual after the tests.
        place: the row of `laws` of each node; 0 at temperature 0.
    """

    def __init__(self, logits: Float[Tensor, "r v"], table: _Table, trees: Trees):
        self.trees, self.table, self.device = trees, table, logits.device
        count, sizes = len(trees.tokens), np.diff(trees.offsets)
        self.tree = np.repeat(np.arange(len(sizes)), sizes)
        begin = trees.offsets[:-1][self.tree]
        self.parents = np.where(trees.parents < 0, np.arange(count), trees.parents + begin)
        self.tokens = _moved(trees.tokens, self.device)
        self.accepted = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.is_empty = torch.zeros(count, dtype=torch.bool, device=self.device)
        self.likeliest = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.place = np.zeros(count, np.int64)
        rows = trees.rows[self.tree] + np.arange(count) - begin
        is_sampled = trees.limits[self.tree, 0] > 0
        if not is_sampled.all():
            self._follow(logits, rows, np.flatnonzero(~is_sampled))
        self.laws: Tensor | None = None
        if is_sampled.any():
            sampled = np.flatnonzero(is_sampled)
            self.place[sampled] = np.arange(len(sampled))
            chosen = _moved(rows[sampled], self.device)
            self.laws = self._laws(logits[chosen], sampled)
            self._test(sampled, self.laws)

    def _follow(self, logits: Float[Tensor, "r v"], rows: Ids, nodes: Ids) -> None:
        """Accepts the most likely tokens at temperature 0."""
        chosen, at = logits[_moved(rows[nodes], self.device)], _moved(nodes, self.device)
        best = chosen.argmax(-1)
        self.likeliest[at] = best
        self.is_empty[at] = ~chosen.gather(1, best[:, None]).isfinite()[:, 0]
        self.accepted[at] = self.tokens[at] == self.likeliest[_moved(self.parents[nodes], self.device)]

    def _laws(self, logits: Float[Tensor, "n v"], nodes: Ids) -> Float[Tensor, "n v"]:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        laws = warp_rows(logits, self.trees.limits[self.tree[nodes]])
        self.is_empty[_moved(nodes, self.device)] = laws[:, 0].isnan()
        return laws.nan_to_num_(1 / laws.shape[1])

    def _test(self, nodes: Ids, laws: Float[Tensor, "n v"]) -> None:
        """Tests the r-th child of every node, for one rank r after another. `laws` become the residuals.

        A test after the first accepted sibling has no effect: the walk leaves the node.
        """
        trees, device = self.trees, self.device
        children = nodes[trees.parents[nodes] >= 0]
        ranks = sibling_ranks(self.parents[children])
        inner = np.unique(self.parents[children])
        slot = np.zeros(len(trees.tokens), np.int64)
        slot[inner] = np.arange(len(inner))
        drafts = self.table.rows(trees.draft_row[inner], laws.shape[1], laws.dtype)
        is_open = torch.ones(len(inner), dtype=torch.bool, device=device)
        assert trees.uniforms is not None
        for rank in range(ranks.max(initial=-1) + 1):
            tested = children[ranks == rank]
            parents = self.parents[tested]
            child, at, here = (_moved(indices, device) for indices in (tested, self.place[parents], slot[parents]))
            token, uniform = self.tokens[child][:, None], _moved(trees.uniforms[0, tested], device)
            is_drawn = _moved(trees.draft_row[parents] >= 0, device)[:, None]
            law, draft = laws[at], drafts[here]
            draft.scatter_(1, token, torch.where(is_drawn, draft.gather(1, token), 1.0))  # one-hot where none was drawn
            prob = draft.gather(1, token)
            still = is_open[here] & (prob[:, 0] > 0)
            is_open[here] = still
            self.accepted[child] = still & (uniform < (law.gather(1, token).double() / prob.double())[:, 0])
            left = (law - draft).clamp_(min=0.0)
            mass = left.sum(-1, keepdim=True)
            laws[at] = torch.where(still[:, None] & (mass > 0), left / mass, law)
            removes = _moved(trees.drawn[parents] == WITHOUT_REPLACEMENT, device)[:, None] | ~is_drawn
            rest = draft.scatter(1, token, 0.0)
            mass = rest.sum(-1, keepdim=True)
            drafts[here] = torch.where(removes, torch.where(mass > 0, rest / mass, rest), draft)

    def verdicts(self) -> Int[Tensor, "3 b"]:
        """Returns the last nodes, the next tokens and the first nodes without a law, on the device."""
        count = len(self.parents)
        nodes, parents = torch.arange(count, device=self.device), _moved(self.parents, self.device)
        candidates = torch.where(self.accepted & (parents != nodes), nodes, count)
        first = torch.full_like(nodes, count).scatter_reduce_(0, parents, candidates, "amin")
        down, up = torch.where(first < count, first, nodes), parents
        lawless = torch.where(self.is_empty, nodes, count)  # of a node and its ancestors; the first of them has the least index
        for _ in range(int(np.diff(self.trees.offsets).max()).bit_length()):
            lawless = lawless.minimum(lawless[up])
            down, up = down[down], up[up]
        roots = _moved(self.trees.offsets[:-1], self.device)
        last = down[roots]
        tokens, lawless = self.likeliest[last], lawless[last]
        if self.laws is not None:
            assert self.trees.uniforms is not None
            law = self.laws[_moved(self.place, self.device)[last]]
            drawn = categorical_rows(law, _moved(self.trees.uniforms[1], self.device)[last])
            tokens = torch.where(_moved(self.trees.limits[:, 0] > 0, self.device), drawn, tokens)
        return torch.stack([last - roots, tokens, torch.where(lawless < count, lawless - roots, -1)])
