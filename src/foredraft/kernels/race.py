"""The exponential race, which draws without replacement. In torch, and compiled. Both give the same draws.

The hash is splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014), used as a counter-based generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foredraft.kernels.sets import Code

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shifts int64 words to the right logically. The built-in shift is arithmetic."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(words: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """Applies splitmix64's finaliser to int64 tensors. Their products wrap around like those of 64-bit words."""
    words = (words ^ _shift(words, 30)) * _signed(MIX1)
    words = (words ^ _shift(words, 27)) * _signed(MIX2)
    return words ^ _shift(words, 31)


class Arrivals(NamedTuple):
    """The first arrivals of each row in order, with their entries. Times are infinite after the last arrival."""

    times: Float[Tensor, "n c"]
    entries: Int[Tensor, "n c"]


def race(probs: Float[Tensor, "n k"], *, starts: Sequence[int], count: int, token_ids: Int[Tensor, "n k"] | None) -> Arrivals:
    """Returns the first `count` arrivals of each row, on every device and in every dtype.

    Token t arrives at time -log(u_t) / probs[t]; u_t is hashed from the start of the row and t.

    Args:
        starts: for each row, the word from which its numbers are hashed.
        token_ids: the token of each entry; None if entry j is token j.
    """
    ids = torch.arange(probs.shape[1], device=probs.device) if token_ids is None else token_ids
    begin = torch.tensor([_signed(start) for start in starts], device=probs.device)
    words = _mix_tensor(begin[:, None] + (ids + 1) * _signed(GOLDEN))
    uniform = (_shift(words, 11).double() + 0.5) * 2.0**-53
    return Arrivals(*uniform.log_().neg_().div_(probs).topk(count, largest=False))


def race_compiled(
    code: Code, probs: Float[Tensor, "n k"], *, starts: Sequence[int], count: int, token_ids: Int[Tensor, "n k"] | None
) -> Arrivals:
    """Computes `race`, without most of the logarithms."""
    probs, token_ids = probs.contiguous(), None if token_ids is None else token_ids.contiguous()
    times = torch.empty(len(starts), count, dtype=torch.float64)
    entries = torch.empty(len(starts), count, dtype=torch.int64)
    for row, start in enumerate(starts):
        given = probs[row].data_ptr(), None if token_ids is None else token_ids[row].data_ptr()
        found = times[row].data_ptr(), entries[row].data_ptr()
        code.race(start, *given, probs.shape[1], count, *found)
    return Arrivals(times, entries)
