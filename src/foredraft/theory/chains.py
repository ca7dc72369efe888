"""Pairs of Markov chains, draft p and target q: what the theorems are computed on, and how such pairs come about."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from foredraft.errors import shown

Row = Float[np.ndarray, " v"]
Rows = Float[np.ndarray, "s v"]

_SUM_TOLERANCE = 1e-6
"""Laws typed by hand or kept in single precision sum to 1 up to this; they are normalised."""

_MOST_NUMBERS = 1 << 28
"""What two chains may hold: 2 GiB in float64."""


@dataclass(frozen=True)
class Pair:
    """A draft chain p and a target chain q over the same V tokens, non-stationary in general.

    Attributes:
        draft, target: the laws of positions 1, 2, ...; the first has one row, later ones a row per last token. Beyond the
            last matrix that one is used on, so that two entries make a stationary chain.
    """

    draft: Sequence[Float[np.ndarray, "_ v"]]
    target: Sequence[Float[np.ndarray, "_ v"]]

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.draft[0].shape[1]

    def steps(self, horizon: int) -> Iterator[tuple[Rows, Rows]]:
        """p_n and q_n for n = 1 to `horizon`.

        Raises:
            ValueError: the horizon is below 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 token, got {horizon}")
        for n in range(horizon):
            yield self.draft[min(n, len(self.draft) - 1)], self.target[min(n, len(self.target) - 1)]

    def require_support(self) -> None:
        """Checks that the draft law covers the target's.

        Raises:
            ValueError: some token has target mass and no draft mass.
        """
        for n, (p, q) in enumerate(self.steps(max(len(self.draft), len(self.target))), start=1):
            bare = np.argwhere((p == 0) & (q > 0))
            if len(bare):
                where = f" after token {bare[0][0]}" if len(p) > 1 else ""
                raise ValueError(
                    f"p has no support where q has mass: token {bare[0][1]} at position {n}{where} has q = "
                    f"{q[tuple(bare[0])]:.4g} and p = 0. Give it some draft probability"
                )


def checked_law(law: Any, name: str) -> Row:
    """A law as a normalised float64 row.

    Raises:
        ValueError: it is empty, has entries that are negative or not numbers, or does not sum to 1.
    """
    row = np.asarray(law, np.float64)
    if row.ndim != 1 or not len(row):
        raise ValueError(f"{name} must be a list of probabilities, got {law!r}")
    if not np.isfinite(row).all() or (row < 0).any():
        raise ValueError(f"{name} has entries that are no probabilities: {row[~(np.isfinite(row) & (row >= 0))][0]:g}")
    if abs(row.sum() - 1) > _SUM_TOLERANCE:
        raise ValueError(f"{name} sums to {row.sum():.6g}, but a law must sum to 1")
    return row / row.sum()


def iid_pair(p: Any, q: Any) -> Pair:
    """The same two laws at every position, whatever came before.

    Raises:
        ValueError: one is no law, or they are over different vocabularies.
    """
    p, q = checked_law(p, "p"), checked_law(q, "q")
    if len(p) != len(q):
        raise ValueError(f"p has {len(p)} tokens and q {len(q)}: they must be laws over the same vocabulary")
    check_room(len(p), 1)
    return Pair([p[None], np.tile(p, (len(p), 1))], [q[None], np.tile(q, (len(q), 1))])


def check_room(vocab_size: int, matrices: int) -> None:
    """Checks that two chains of so many matrices can be held.

    Raises:
        ValueError: they cannot.
    """
    numbers = 2 * matrices * vocab_size**2
    if numbers > _MOST_NUMBERS:
        raise ValueError(
            f"vocabulary too large to enumerate: two chains of {matrices} matrices over {vocab_size} tokens have {numbers:,} "
            f"numbers, at most {_MOST_NUMBERS:,} are computed. Take fewer tokens or a shorter horizon"
        )


def random_pair(vocab_size: int, horizon: int, seed: int, *, closeness: float | int = 0.0, stationary: bool = False) -> Pair:
    """Rows from a flat Dirichlet law, new ones at every position unless `stationary`.

    Args:
        closeness: 0 draws p and q independently; between 0 and 1, p is that share of q and the rest of its own.

    Raises:
        ValueError: sizes are below 1 or closeness is outside 0 to 1.
    """
    if vocab_size < 1 or horizon < 1:
        raise ValueError(f"vocabulary and horizon must be at least 1, got {vocab_size} and {horizon}")
    if not 0 <= closeness <= 1:
        raise ValueError(f"closeness must be between 0 and 1, got {closeness}")
    check_room(vocab_size, 1 if stationary else horizon)
    rng, flat = np.random.default_rng(seed), np.ones(vocab_size)
    sizes = [1, vocab_size] if stationary else [1] + [vocab_size] * (horizon - 1)
    target = [rng.dirichlet(flat, size) for size in sizes]
    own = [rng.dirichlet(flat, size) for size in sizes]
    return Pair([closeness * q + (1 - closeness) * p for p, q in zip(own, target, strict=True)], target)


def read_pair(path: Path) -> Pair:
    """A pair from a JSON file: ``{"draft": [...], "target": [...]}``, each a law, or a list of matrices as in `Pair`.

    Raises:
        ValueError: the file cannot be read, or does not hold two chains over the same vocabulary.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        draft, target = found["draft"], found["target"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'cannot read laws from {str(path)!r} ({error}): a JSON object with "draft" and "target"') from None
    for name, chain in (("draft", draft), ("target", target)):
        if not isinstance(chain, list) or not chain:
            raise ValueError(f"{name!r} of {str(path)!r} must be a list: a law, or matrices of laws; got {shown(chain)}")
    if np.ndim(np.asarray(draft[0], dtype=object)) == 0:
        return iid_pair(draft, target)
    chains = [
        [_matrix(one, f"{name}[{n}]") for n, one in enumerate(some)] for name, some in (("draft", draft), ("target", target))
    ]
    sizes = {matrix.shape[1] for chain in chains for matrix in chain}
    if len(sizes) > 1:
        raise ValueError(f"{str(path)!r} has laws over vocabularies of different sizes: {sorted(sizes)}")
    [size] = sizes
    for chain in chains:
        for n, matrix in enumerate(chain):
            if len(matrix) != (size if n else 1):
                raise ValueError(f"matrix {n} of {str(path)!r} has {len(matrix)} rows: the first needs 1, later ones {size}")
    return Pair(*chains)


def _matrix(rows: Any, name: str) -> Rows:
    return np.stack([checked_law(row, f"{name} row {i}") for i, row in enumerate(rows)])


def total_variation(p: Rows, q: Rows) -> Float[np.ndarray, " s"]:
    """TV(p, q) of every row."""
    return np.abs(p - q).sum(-1) / 2


def residual(p: Rows, q: Rows) -> Rows:
    """``norm([q - p]+)`` of every row, the law after a rejection; q itself where nothing is left."""
    left = np.maximum(q - p, 0.0)
    mass = left.sum(-1, keepdims=True)
    return np.where(mass > 0, left / np.where(mass > 0, mass, 1.0), q)
