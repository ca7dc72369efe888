"""Pairs of Markov chains, draft p and target q, on which the theorems are computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from foredraft.core.errors import UserError, shown, why_no_json

Row = Float[np.ndarray, " v"]
Rows = Float[np.ndarray, "s v"]

_SUM_TOLERANCE = 1e-6
"""Largest allowed deviation of a law's sum from 1, for laws typed by hand or in single precision. Laws are normalised."""

_MOST_NUMBERS = 1 << 28
"""Largest number of probabilities in two chains: 2 GiB in float64."""


@dataclass(frozen=True)
class Pair:
    """A draft chain p and a target chain q over the same V tokens.

    The chains may be non-stationary. The last matrix of a chain applies to all later positions, so two matrices make a
    stationary chain.

    Attributes:
        draft, target: matrices of the laws of positions 1, 2, ... The first matrix has one row. Later matrices have V rows,
            one for each last token.
    """

    draft: Sequence[Float[np.ndarray, "_ v"]]
    target: Sequence[Float[np.ndarray, "_ v"]]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.draft[0].shape[1]

    def steps(self, horizon: int) -> Iterator[tuple[Rows, Rows]]:
        """Yields p_n and q_n for n = 1 to `horizon`.

        Raises:
            ValueError: the horizon is below 1.
        """
        if horizon < 1:
            raise UserError(f"horizon must be at least 1 token, got {horizon}")
        for n in range(horizon):
            yield self.draft[min(n, len(self.draft) - 1)], self.target[min(n, len(self.target) - 1)]

    def require_support(self) -> None:
        """Checks that the draft laws cover the target laws.

        Raises:
            ValueError: a token has q > 0 and p = 0 at some position.
        """
        for n, (p, q) in enumerate(self.steps(max(len(self.draft), len(self.target))), start=1):
            bare = np.argwhere((p == 0) & (q > 0))
            if len(bare):
                where = f" after token {bare[0][0]}" if len(p) > 1 else ""
                raise UserError(
                    f"p has no support where q has mass: token {bare[0][1]} at position {n}{where} has q = "
                    f"{q[tuple(bare[0])]:.4g} and p = 0",
                    "Give it some draft probability",
                )


def checked_law(law: Any, name: str) -> Row:
    """Returns a law as a normalised row in float64.

    Args:
        law: a list of probabilities.
        name: name of the law in error messages.

    Raises:
        ValueError: the law is empty, has entries that are negative or not finite, or does not sum to 1.
    """
    row = np.asarray(law, np.float64)
    if row.ndim != 1 or not len(row):
        raise UserError(f"{name} must be a list of probabilities, got {law!r}")
    if not np.isfinite(row).all() or (row < 0).any():
        raise UserError(f"{name} has an entry that is not a probability: {row[~(np.isfinite(row) & (row >= 0))][0]:g}")
    if abs(row.sum() - 1) > _SUM_TOLERANCE:
        raise UserError(f"{name} sums to {row.sum():.6g}, but probabilities must sum to 1")
    return row / row.sum()


def checked_laws(p: Any, q: Any) -> tuple[Row, Row]:
    """Checks two laws over one vocabulary, see `checked_law`.

    Raises:
        ValueError: one of them is not a law, or the vocabularies differ.
    """
    p, q = checked_law(p, "p"), checked_law(q, "q")
    if len(p) != len(q):
        raise UserError(f"p has {len(p)} tokens and q {len(q)}: they must be laws over the same vocabulary")
    return p, q


def iid_pair(p: Any, q: Any) -> Pair:
    """Makes a pair with the same two laws at every position, independent of the tokens before.

    Raises:
        ValueError: p or q is not a law, or they have different numbers of tokens.
    """
    p, q = checked_laws(p, q)
    check_room(len(p), 1)
    return Pair([p[None], np.tile(p, (len(p), 1))], [q[None], np.tile(q, (len(q), 1))])


def check_room(vocab_size: int, matrices: int) -> None:
    """Checks that two chains of `matrices` matrices each fit in memory.

    Raises:
        ValueError: they are too large.
    """
    numbers = 2 * matrices * vocab_size**2
    if numbers > _MOST_NUMBERS:
        raise UserError(
            f"vocabulary too large to enumerate: two chains of {matrices} matrices over {vocab_size} tokens have {numbers:,} "
            f"numbers, and the limit is {_MOST_NUMBERS:,}",
            "Take fewer tokens or a shorter horizon",
        )


def random_pair(vocab_size: int, horizon: int, seed: int, *, closeness: float | int = 0.0, stationary: bool = False) -> Pair:
    """Draws a random pair. Each row comes from a flat Dirichlet distribution.

    Args:
        vocab_size: number of tokens.
        horizon: number of positions with matrices of their own.
        seed: seed of the draws.
        closeness: weight of q in p, 0 to 1. At 0, p and q are independent; at 1, they are equal.
        stationary: whether all positions after the first have the same matrix.

    Raises:
        ValueError: vocabulary or horizon are below 1, closeness is outside 0 to 1, or the pair is too large.
    """
    if vocab_size < 1 or horizon < 1:
        raise UserError(f"vocabulary and horizon must be at least 1, got {vocab_size} and {horizon}")
    if not 0 <= closeness <= 1:
        raise UserError(f"closeness must be between 0 and 1, got {closeness}")
    check_room(vocab_size, 1 if stationary else horizon)
    rng, flat = np.random.default_rng(seed), np.ones(vocab_size)
    sizes = [1, vocab_size] if stationary else [1] + [vocab_size] * (horizon - 1)
    target = [rng.dirichlet(flat, size) for size in sizes]
    own = [rng.dirichlet(flat, size) for size in sizes]
    return Pair([closeness * q + (1 - closeness) * p for p, q in zip(own, target, strict=True)], target)


def read_pair(path: Path) -> Pair:
    """Reads a pair from a JSON file: ``{"draft": [...], "target": [...]}``.

    Each value is a law, or a list of matrices as in `Pair`.

    Raises:
        ValueError: the file cannot be read, or does not hold two chains over the same vocabulary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        draft, target = content["draft"], content["target"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot read laws from {str(path)!r} ({why_no_json(error)})",
            'give a file with a JSON object of "draft" and "target"',
        ) from None
    for name, chain in (("draft", draft), ("target", target)):
        if not isinstance(chain, list) or not chain:
            raise UserError(f"{name!r} of {str(path)!r} must be a law (a list) or a list of matrices, got {shown(chain)}")
    if np.ndim(np.asarray(draft[0], dtype=object)) == 0:
        return iid_pair(draft, target)
    chains = [
        [_matrix(rows, f"{name}[{n}]") for n, rows in enumerate(chain)]
        for name, chain in (("draft", draft), ("target", target))
    ]
    sizes = {matrix.shape[1] for chain in chains for matrix in chain}
    if len(sizes) > 1:
        raise UserError(f"{str(path)!r} has laws over vocabularies of different sizes: {sorted(sizes)}")
    [size] = sizes
    for chain in chains:
        for n, matrix in enumerate(chain):
            if len(matrix) != (size if n else 1):
                raise UserError(
                    f"matrix {n} of {str(path)!r} has {len(matrix)} rows, but the first matrix needs 1 and later ones {size}"
                )
    return Pair(*chains)


def _matrix(rows: Any, name: str) -> Rows:
    return np.stack([checked_law(row, f"{name} row {i}") for i, row in enumerate(rows)])


def total_variation(p: Rows, q: Rows) -> Float[np.ndarray, " s"]:
    """Computes the total variation distance TV(p, q) of every row."""
    return np.abs(p - q).sum(-1) / 2


def residual(p: Rows, q: Rows) -> Rows:
    """Computes the law after a rejection of every row, ``norm([q - p]+)``; q itself where q - p is nowhere positive."""
    left = np.maximum(q - p, 0.0)
    mass = left.sum(-1, keepdims=True)
    return np.where(mass > 0, left / np.where(mass > 0, mass, 1.0), q)
