"""Laws: from logits to probabilities, their largest entries, residuals, and a draw of one token. In torch, and compiled."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from foredraft.kernels.sets import Code

_SAFE_TEMPERATURE = 1e-3
"""From this temperature on, a logit divided by it fits into float32. Below, the largest logit is subtracted first."""


def warp(logits: Float[Tensor, "n v"], *, temperature: float, min_p: float, top_k: int, top_p: float) -> Float[Tensor, "n v"]:
    """Returns probabilities after temperature, min-p, top-k and top-p, on every device and in every dtype.

    Args:
        temperature: above 0.
        min_p, top_k, top_p: 0, 0 and 1 keep all tokens.
    """
    if temperature < _SAFE_TEMPERATURE or min_p > 0:
        logits = logits - logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits = logits / temperature
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(~likeliest_of_mass(probs, top_p), -math.inf)
    return logits.softmax(-1)


def warp_compiled(
    code: Code, logits: Float[Tensor, "n v"], *, temperature: float, min_p: float, top_k: int, top_p: float
) -> Float[Tensor, "n v"]:
    """Computes `warp` without sorting. In float32 on a CPU."""
    logits = logits.contiguous()
    probs, size = torch.empty_like(logits), logits.shape[-1]
    limits = as_arguments(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    code.laws(logits.data_ptr(), logits.numel() // size, size, *limits, probs.data_ptr())
    return probs


def as_arguments(*, temperature: float, min_p: float, top_k: int, top_p: float) -> tuple[float, float, int, float]:
    """Returns the arguments of `warp` in the form that compiled code takes."""
    return temperature, math.log(min_p) if min_p > 0 else -math.inf, max(top_k, 0), top_p


_NUM_TOP = 256
"""This many most likely tokens usually reach the threshold of top-p. Finding them takes a tenth of the time of a full sort."""


def likeliest_of_mass(probs: Float[Tensor, "n v"], mass: float | Float[Tensor, "n 1"]) -> Bool[Tensor, "n v"]:
    """Marks the most likely tokens of each row, up to the token with which their sum reaches `mass`.

    Among equally likely tokens, the first are marked.
    """
    top = probs.topk(min(_NUM_TOP, probs.shape[-1])).values
    suffices = top.sum(-1, keepdim=True) >= mass * (1 + 1e-6)  # the margin covers rounding in any order of summation
    descending = top if bool(suffices.all()) else _descending(probs)
    count = (descending.cumsum(-1) - descending < mass).sum(-1, keepdim=True).clamp(min=1)  # a tiny mass may round to 0
    least = descending.gather(-1, count - 1)
    kept, equal = probs > least, probs == least
    wanted = count - kept.sum(-1, keepdim=True)
    return kept | (equal & (equal.cumsum(-1) <= wanted))


def _descending(probs: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Sorts every row in descending order. On a CPU, numpy's vectorised sort is much faster than torch's."""
    if probs.device.type != "cpu":
        return probs.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(probs.numpy(), axis=-1)[:, ::-1].copy())


def warp_rows(logits: Float[Tensor, "n v"], limits: Float[np.ndarray, "n 4"]) -> Float[Tensor, "n v"]:
    """Computes `warp` with other limits for each row. The arithmetic is the same.

    Args:
        limits: for each row temperature, logarithm of min_p, top_k and top_p, see `as_arguments`.
    """
    size, device = logits.shape[1], logits.device
    temperature, least, top_k, top_p = limits.T
    temperatures, lowest, counts, masses = torch.from_numpy(limits).to(device, logits.dtype).T[..., None]
    shifted = (temperature < _SAFE_TEMPERATURE) | (least > -np.inf)
    if shifted.any():
        shift = torch.where(torch.from_numpy(shifted).to(device)[:, None], logits.amax(-1, keepdim=True), 0.0)
        logits = logits - shift
    if (temperature != 1).any():
        logits = logits / temperatures
    if (least > -np.inf).any():
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    is_cut = (top_k > 0) & (top_k < size)
    if is_cut.any():
        counts = torch.where(torch.from_numpy(is_cut).to(device)[:, None], counts, 0.0).long()
        top = logits.topk(int(top_k[is_cut].max()), dim=-1).values
        smallest = top.gather(1, (counts - 1).clamp(min=0))
        logits = logits.masked_fill((counts > 0) & (logits < smallest), -torch.inf)
    if (top_p < 1).any():
        kept = likeliest_of_mass(logits.softmax(-1), torch.where(masses < 1, masses, 0.0))
        logits = logits.masked_fill((masses < 1) & ~kept, -torch.inf)
    return logits.softmax(-1)


class Largest(NamedTuple):
    """The largest numbers of each row, in descending order, and their indices."""

    values: Float[Tensor, "n k"]
    places: Int[Tensor, "n k"]


_MAX_SCANNED = 64
"""Up to this many largest numbers, scanning is faster than sorting."""


def largest(x: Float[Tensor, "n v"], count: int) -> Largest:
    """Returns the `count` largest numbers of each row. The order of equal numbers is undefined."""
    return Largest(*x.topk(count))


def largest_compiled(code: Code, x: Float[Tensor, "n v"], count: int) -> Largest:
    """Computes `largest`. Of equal numbers, the first comes first."""
    if not 0 < count <= _MAX_SCANNED:
        return largest(x, count)
    x = x.contiguous()
    rows, size = x.shape
    found = Largest(x.new_empty(rows, count), torch.empty(rows, count, dtype=torch.int64))
    code.largest(x.data_ptr(), rows, size, count, found.values.data_ptr(), found.places.data_ptr())
    return found


def categorical(probs: Float[Tensor, " v"], uniform: float) -> int:
    """Returns the first token at which the cumulative sum exceeds the share `uniform` of the total; -1 if the total is zero.

    Works on every device and in every dtype.
    """
    cumulative = probs.double().cumsum(0)
    total = float(cumulative[-1])
    if not total > 0:
        return -1
    token = int(torch.searchsorted(cumulative, uniform * total, right=True))
    if token == len(probs) or not probs[token] > 0:  # u * total rounded up to total, or the blockwise sum is not monotone
        token = int(torch.nonzero(probs[: token + 1])[-1])
    return token


def categorical_rows(probs: Float[Tensor, "b v"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Computes `categorical` for several rows."""
    size = probs.shape[1]
    cumulative = probs.double().cumsum(-1)
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    places = torch.arange(size, device=probs.device)
    last = torch.where((probs > 0) & (places <= token), places, -1).amax(-1)
    is_drawn = (token < size) & (probs.gather(1, token.clamp(max=size - 1)) > 0)
    return torch.where(total[:, 0] > 0, torch.where(is_drawn[:, 0], token[:, 0], last), -1)


def categorical_compiled(code: Code, probs: Float[Tensor, " v"], uniform: float) -> int:
    """Computes `categorical`."""
    probs = probs.contiguous()
    return code.categorical(probs.data_ptr(), len(probs), uniform)


Left = tuple[Float[Tensor, " v"], float]
"""A residual, normalised if it has mass, and its mass before normalisation."""


def _normalized(law: Float[Tensor, " v"]) -> Left:
    mass = float(law.sum())
    return law / mass if mass > 0 else law, mass


def subtract(target: Float[Tensor, " v"], draft: Float[Tensor, " v"]) -> Left:
    """Returns ``norm([target - draft]+)``."""
    return _normalized((target - draft).clamp_(min=0.0))


def subtract_compiled(code: Code, target: Float[Tensor, " v"], draft: Float[Tensor, " v"]) -> Left:
    """Computes `subtract`."""
    target, draft, left = target.contiguous(), draft.contiguous(), torch.empty(len(target))
    return left, code.subtract(target.data_ptr(), draft.data_ptr(), len(target), left.data_ptr())


def without(law: Float[Tensor, " v"], token: int) -> Left:
    """Returns a law without one token."""
    left = law.clone()
    left[token] = 0.0
    return _normalized(left)


def without_compiled(code: Code, law: Float[Tensor, " v"], token: int) -> Left:
    """Computes `without`."""
    law, left = law.contiguous(), torch.empty(len(law))
    return left, code.without(law.data_ptr(), token, len(law), left.data_ptr())
