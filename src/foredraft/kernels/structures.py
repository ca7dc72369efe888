"""The structures that compiled code takes, with the same fields in the same order as in `c/passed.h`, and its functions.

`check_sizes` compares the sizes of the structures with those of the library when it is loaded.
"""

from __future__ import annotations

import ctypes
from typing import Any

_at, _whole, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CLinear(ctypes.Structure):
    """A linear layer. `foredraft.kernels.layouts` lays out its weight; `type` is one of `TYPES`."""

    _fields_ = (
        *(("weight", _at), ("type", _whole), ("bias", _at), ("outputs", _whole), ("inputs", _whole)),
        *((name, _whole) for name in ("bits", "is_rounded", "form", "group", "scale_type")),
        *((name, _at) for name in ("scales", "more")),
    )


class CResidual(ctypes.Structure):
    """A residual block. If `skip` has no weight, its inputs are added unchanged."""

    _fields_ = (("linear", CLinear), ("skip", CLinear))


class CLayer(ctypes.Structure):
    """A decoder layer. A norm that is None is skipped."""

    _fields_ = (
        *((name, _at) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        ("qkv", CLinear * 3),
        *((name, CLinear) for name in ("output", "gate", "up", "down")),
        ("window", _whole),
    )


class CEntry(ctypes.Structure):
    """The part of a draft head that combines an embedding and a feature."""

    _fields_ = (
        ("fc", CLinear),
        ("norm", _at),
        *((name, CLinear) for name in ("gate", "up", "down")),
        ("feature_norm", _at),
        ("ahead", CLinear),
    )


class CModel(ctypes.Structure):
    """A model: sizes, weights and layers."""

    _fields_ = (
        *((name, _whole) for name in ("type", "hidden", "heads", "kv_heads", "head_dim", "mlp", "num_layers")),
        *((name, _real) for name in ("eps", "rotary_scale")),
        *((name, _at) for name in ("frequencies", "embedding")),
        ("tied", CLinear),
        *((name, _at) for name in ("layers", "norm")),
        ("head", CLinear),
        ("vocabulary", _whole),
        ("token_ids", _at),
        ("blank", CLinear),
        ("entry", CEntry),
    )


class CStep(ctypes.Structure):
    """The arguments of one forward."""

    _fields_ = (
        ("num_trees", _whole),
        *((name, _at) for name in ("tokens", "parents", "offsets", "lengths", "first", "blocks", "block_starts")),
        ("num_rows", _whole),
        *((name, _at) for name in ("rows", "logits")),
        ("num_features", _whole),
        *((name, _at) for name in ("feature_layers", "features", "keys", "values")),
        *((name, _whole) for name in ("layer_stride", "head_stride", "threads")),
        *((name, _at) for name in ("given", "num_given", "carried")),
        ("num_slots", _whole),
    )


_double = ctypes.c_double


class CChains(ctypes.Structure):
    """What to draw after the trees of a step."""

    _fields_ = (
        *((name, _whole) for name in ("depth", "kept")),
        ("uniforms", _at),
        *((name, _double) for name in ("temperature", "least")),
        ("top_k", _whole),
        ("top_p", _double),
        *((name, _at) for name in ("tokens", "laws", "token_ids")),
    )


class CTrees(ctypes.Structure):
    """Trees that are verified together."""

    _fields_ = (
        ("num_trees", _whole),
        *((name, _at) for name in ("offsets", "rows", "tokens", "parents", "drawn", "draft_row", "logits")),
        ("size", _whole),
        *((name, _at) for name in ("draft_probs", "draft_ids")),
        *((name, _whole) for name in ("num_laws", "kept")),
        *((name, _at) for name in ("limits", "accept_uniforms", "next_uniforms", "last", "next", "lawless")),
    )


STRUCTURES = (CLinear, CResidual, CLayer, CEntry, CModel, CStep, CChains, CTrees)

FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "forward": (ctypes.c_int, (_at, _at)),
    "chains": (ctypes.c_int, (_at, _at, _at)),
    "linear": (ctypes.c_int, (_at, _whole, _at, _whole, _at, _whole)),
    "residuals": (ctypes.c_int, (_at, _whole, _whole, _at, _whole, _at, _whole)),
    "peak": (_double, (_whole, _whole, _whole)),
    "laws": (None, (_at, _whole, _whole, _double, _double, _whole, _double, _at)),
    "largest": (None, (_at, _whole, _whole, _whole, _at, _at)),
    "categorical": (_whole, (_at, _whole, _double)),
    "subtract": (_double, (_at, _at, _whole, _at)),
    "without": (_double, (_at, _whole, _whole, _at)),
    "accept": (ctypes.c_int, (_at,)),
    "uniforms": (ctypes.c_int, (_at, _whole, _at, _at, _at, _whole, _at)),
    "race": (None, (ctypes.c_uint64, _at, _at, _whole, _whole, _at, _at)),
}
"""Result and arguments of the functions that every instruction set has."""

SHARED_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "prefixes": (_whole, (_at, _at, _at, _whole, _whole, _whole, _whole, _at, _at)),
}
"""Result and arguments of the functions without vectors, which all instruction sets share."""


def check_sizes(code: ctypes.CDLL) -> None:
    """Compares the sizes of `STRUCTURES` with those of the library.

    Raises:
        OSError: a size differs, because the library was built from other sources.
    """
    found = (_whole * 16)()
    count = code.foredraft_sizes(found)
    if found[:count] != [ctypes.sizeof(structure) for structure in STRUCTURES]:
        raise OSError("the compiled kernels were built from other sources")
