"""Checks that need the data of a checkpoint: NaN and infinite entries, tables of tokens, and its embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foredraft.importers.layouts import Plan
from foredraft.importers.reading import Finding, Findings
from foredraft.importers.source import Source
from foredraft.models.checkpoint import ModelError, open_weights, resolve

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
"""Endings of the name of a target's embedding."""

_FLOATS, _TABLES = ("F32", "F16", "BF16"), ("I64", "I32")
_AGAIN = "copy the weights again from their source"


def shares_embedding(source: Source, target: Any) -> bool | None:
    """Compares the checkpoint's `embed_tokens` with the target's embedding.

    Returns:
        Whether they are equal, except for the rounding between two 16-bit formats. None if the checkpoint has no embedding or
        the target's is not found.

    Raises:
        ModelError: there is no such target.
    """
    mine = source.tensors.get("embed_tokens.weight")
    if mine is None:
        return None
    weights = open_weights(resolve(target, None))
    name = next((key for key in weights if key.endswith(_EMBEDDINGS)), "lm_head.weight")
    if name not in weights:
        return None
    its = weights[name]
    if tuple(mine.shape) != tuple(its.shape):
        return False
    return torch.allclose(mine.read().float(), its.read().float(), rtol=2**-7, atol=2**-24)


def inspect(source: Source, plan: Plan) -> list[Finding]:
    """Finds faults in the data of the tensors that a head uses. Tensors of a wrong shape are skipped."""
    findings, wanted, shapes = Findings(), plan.head.state_dict(), source.shapes
    sources = {
        name: theirs for name, theirs in plan.sources.items() if theirs and shapes.get(theirs) == tuple(wanted[name].shape)
    }
    for name, theirs in sources.items():
        stored = source.tensors[theirs]
        allowed = _FLOATS if wanted[name].is_floating_point() else _TABLES
        if stored.dtype_name not in allowed:
            findings.add(
                f"{theirs} is stored as {stored.dtype_name}, but must be one of {', '.join(allowed)}", "save it as one of these"
            )
        elif stored.dtype_name in _FLOATS and not bool(torch.isfinite(stored.read()).all()):
            findings.add(f"{theirs} has entries that are infinite or NaN", _AGAIN)
    return findings + _tables(source, sources, plan.reading.config.vocab_size)


def _tables(source: Source, sources: Mapping[str, str], vocab: int) -> list[Finding]:
    """Finds faults in EAGLE-3's d2t and in Medusa's token_map."""
    for name, is_offset in (("d2t", True), ("token_map", False)):
        theirs = sources.get(name)
        if theirs is None or source.tensors[theirs].dtype_name not in _TABLES:
            continue
        table = source.tensors[theirs].read().long()
        wrong = _wrong_tokens(table + torch.arange(len(table)) if is_offset else table, vocab)
        if wrong and is_offset and not _wrong_tokens(table, vocab):
            return [
                Finding(
                    f"{theirs} seems to hold token ids (as offsets, {wrong}); it must hold token id - draft id",
                    f"subtract 0, 1, 2, ... from {theirs}",
                )
            ]
        if wrong:
            return [Finding(f"{theirs} is not a table of tokens: {wrong}", _AGAIN)]
        return _mask(source.tensors, table + torch.arange(len(table)), vocab) if is_offset else []
    return []


def _wrong_tokens(token_ids: Tensor, vocab: int) -> str:
    """Says why these are not distinct token ids of the vocabulary; empty if they are."""
    outside = int(((token_ids < 0) | (token_ids >= vocab)).sum())
    if outside:
        return f"{outside} of {len(token_ids)} are outside the vocabulary of {vocab}"
    repeated = len(token_ids) - len(token_ids.unique())
    return f"{repeated} of {len(token_ids)} repeat another token" if repeated else ""


def _mask(tensors: Mapping[str, Any], token_ids: Tensor, vocab: int) -> list[Finding]:
    """Compares t2d, the mask of the tokens that can be drafted, with d2t. Only d2t is used."""
    if "t2d" not in tensors:
        return []
    wanted = torch.zeros(vocab, dtype=torch.bool)
    wanted[token_ids] = True
    given = tensors["t2d"].read().bool()
    if given.shape == wanted.shape and torch.equal(given, wanted):
        return []
    return [Finding("t2d and d2t name different tokens; only d2t is used", "recompute t2d from d2t", fatal=False)]


def assembled(source: Source, plan: Plan) -> dict[str, Tensor]:
    """Reads the tensors of the head from the checkpoint. No two of them share memory.

    Raises:
        ModelError: a tensor is missing.
    """
    tensors, wanted = {}, plan.head.state_dict()
    for name, theirs in plan.sources.items():
        if theirs is None:
            tensors[name] = torch.zeros(wanted[name].shape, dtype=wanted[name].dtype)
        elif theirs not in source.tensors:
            raise ModelError(f"the checkpoint lacks {theirs!r}", "copy it again")
        else:
            tensors[name] = source.tensors[theirs].read().clone(memory_format=torch.contiguous_format)
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}
