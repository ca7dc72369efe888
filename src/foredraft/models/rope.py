"""Rotary position embedding: frequencies, tables, and context length.

Two scalings have frequencies that depend on the length of the text. LongRoPE has one list of factors for the original context
and another for longer texts. Dynamic scaling changes with every token beyond the original context. A cached key keeps its
frequencies, so the output distribution would depend on how a text is split into forwards. This module therefore chooses the
frequencies once, when the model is loaded, for the longest text that it may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foredraft.core.errors import UserError

LONG, DYNAMIC = "longrope", "dynamic"
"""Values of ``rope_type`` whose frequencies depend on the length."""

MOST_POSITIONS = 6 << 20
"""Largest context, in tokens, that tables are made for. They take 6 GiB for heads of size 128."""


class Rotary(NamedTuple):
    """Angle per position for each pair of entries of a head, in radians, and the factor of cosines and sines."""

    frequencies: Float[Tensor, " e"]
    scaling: float


def context_of(config: Any, wanted: int | None = None) -> int:
    """Returns the length in tokens of the longest text that a model is loaded for.

    With LongRoPE this is the original context, as in vLLM, unless `wanted` exceeds it.

    Args:
        config: configuration of the language model.
        wanted: requested length in tokens, or None.

    Raises:
        ValueError: the configuration gives no length.
    """
    full = getattr(config, "max_position_embeddings", None)
    if not full:
        raise UserError(f"the configuration of model type {config.model_type!r} gives no max_position_embeddings")
    first = original_context(config)
    if first is not None and (wanted is None or wanted <= first):
        return min(first, full)
    return min(full, wanted) if wanted is not None and full > MOST_POSITIONS else full


def original_context(config: Any) -> int | None:
    """Returns the context, in tokens, of the short factors of LongRoPE. None without LongRoPE."""
    whole: Any = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", None)
    lengths = [rope.get("original_max_position_embeddings") or whole for rope in _ropes(config) if _kind(rope) == LONG]
    return min(lengths, default=None)


def why_not_longer(config: Any) -> str:
    """Returns why a context cannot be extended, as the end of a sentence. Empty if its length is the only reason."""
    if any(DYNAMIC in _kind(rope) for rope in _ropes(config)):
        return ", because its dynamic RoPE changes with every token beyond it, and cached keys would have to change too"
    return ""


def frequencies(config: Any, length: int) -> Rotary:
    """Returns the frequencies of a Llama-family model that is loaded for texts of `length` tokens."""
    ropes = _ropes(config)
    if len(ropes) == 1 and _kind(ropes[0]) == "default" and ropes[0].keys() <= {"rope_type", "rope_theta"}:
        return _unscaled(config, ropes[0]["rope_theta"])
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary: Any = LlamaRotaryEmbedding(config=config)
    if rotary.rope_type in (LONG, DYNAMIC):
        chosen, scaling = ROPE_INIT_FUNCTIONS[rotary.rope_type](config, torch.device("cpu"), seq_len=length)
        return Rotary(chosen.float(), float(scaling))
    return Rotary(rotary.inv_freq.float(), float(rotary.attention_scaling))


def _unscaled(config: Any, theta: float) -> Rotary:
    """Returns frequencies without scaling. The order of operations is that of Transformers.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2.2.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Rotary(1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)), 1.0)


def rotary_tables(
    config: Any, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "t e"], Float[Tensor, "t e"]]:
    """Returns the cosines and the signed sines of every position. They are computed in float32, as in the published models.

    The sines of the first half of a head are negated, so that a rotation needs one roll.

    Raises:
        ValueError: the tables would be too large.
    """
    if length > MOST_POSITIONS:
        raise UserError(
            f"max_position_embeddings is {length}, but tables of rotary positions hold at most {MOST_POSITIONS}",
            "give a smaller max_model_len (--max-model-len)",
        )
    chosen, scaling = frequencies(config, min(length, config.max_position_embeddings))
    angles = torch.arange(length).float()[:, None] * chosen
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], dim=-1).to(device, dtype), torch.cat([-sin, sin], dim=-1).to(device, dtype)


class Held(NamedTuple):
    """A rotary module of Transformers, and its state during a forward."""

    module: nn.Module
    rope_type: Any
    buffers: dict[str, Tensor]

    def put(self) -> None:
        """Sets the state."""
        self.module.rope_type = self.rope_type
        for name, buffer in self.buffers.items():
            setattr(self.module, name, buffer)


@contextmanager
def held(modules: Sequence[Held]) -> Iterator[None]:
    """Fixes the frequencies of rotary modules, and restores the modules afterwards."""
    before = [
        Held(state.module, state.module.rope_type, {name: getattr(state.module, name) for name in state.buffers})
        for state in modules
    ]
    try:
        for state in modules:
            state.put()
        yield
    finally:
        for state in before:
            state.put()


def hold(model: nn.Module, length: int) -> list[Held]:
    """Returns the states with which `held` fixes the frequencies of a Transformers model. Does not change the model.

    Args:
        model: a model of Transformers.
        length: length in tokens of the longest text that the model is loaded for.

    Raises:
        ValueError: the model computes its frequencies in an unknown way, and `length` exceeds its original context.
    """
    states = [_hold(module, length) for module in model.modules()]
    return [state for state in states if state is not None]


def _hold(module: Any, length: int) -> Held | None:
    kinds: Any = getattr(module, "rope_type", None)
    named = kinds if isinstance(kinds, dict) else {None: kinds}
    chosen = [layer for layer, kind in named.items() if kind == LONG or DYNAMIC in str(kind)]
    if not chosen:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    buffers = {}
    for layer in chosen:
        name, of_layer = ("inv_freq", {}) if layer is None else (f"{layer}_inv_freq", {"layer_type": layer})
        there = getattr(module, name)
        made, _ = ROPE_INIT_FUNCTIONS[named[layer]](module.config, there.device, seq_len=length, **of_layer)
        buffers[name] = made.to(there.dtype)
    fixed = {layer: "default" if layer in chosen else kind for layer, kind in named.items()}
    state = Held(module, fixed if isinstance(kinds, dict) else "default", buffers)
    if all(_obeys(state, length, layer) for layer in chosen):
        return state
    first = original_context(module.config)
    if first is not None and length > first:
        raise UserError(
            f"model type {module.config.model_type!r} chooses its LongRoPE factors in an unknown way",
            f"give a max_model_len of at most {first} (--max-model-len)",
        )
    return None  # up to its original context its frequencies are the same as ours


@torch.inference_mode()
def _obeys(state: Held, length: int, layer: Any) -> bool:
    """Returns whether a module uses the given frequencies, independently of the longest position of a forward."""
    device = next(iter(state.buffers.values())).device
    like, of_layer = torch.zeros(1, device=device), {} if layer is None else {"layer_type": layer}

    def first_of(*positions: int) -> Tensor:
        out = state.module(like, torch.tensor([positions], device=device), **of_layer)
        return torch.stack([part[0, 0] for part in out])

    with held([state]):
        alone, beside = first_of(1), first_of(1, length - 1)
    with held([state._replace(buffers={name: buffer / 2 for name, buffer in state.buffers.items()})]):
        slower = first_of(1)
    return torch.equal(alone, beside) and not torch.equal(alone, slower)


def refuse_bad_rope(config: Any) -> None:
    """Refuses a configuration whose rotary positions cannot be computed.

    Raises:
        ValueError: an entry is wrong. The message names it.
    """
    for rope in _ropes(config):
        if _kind(rope) != "default":
            _refuse_kind(_kind(rope))
        for name, value in rope.items():
            if name in _LISTS:
                _refuse_bad_factors(name, value, _num_pairs(config, rope))
            elif name in _NUMBERS and value is not None and not is_positive(value):
                raise ValueError(f"{name} of the rotary positions must be a number above 0, got {value!r}")
        if _kind(rope) in _SCALED and rope.get("factor") is None and _kind(rope) != LONG:
            raise ValueError(f"rotary positions of type {_kind(rope)!r} need a factor")


def _refuse_kind(kind: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_type is {kind!r}: it must be one of {', '.join(('default', *ROPE_INIT_FUNCTIONS))}")


_LISTS = ("long_factor", "short_factor")
_NUMBERS = (
    *("rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
)
_SCALED = ("linear", DYNAMIC, "llama3")


def is_positive(value: Any) -> bool:
    """Returns whether a value is a number above 0 within the range of float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 3e38


def _refuse_bad_factors(name: str, value: Any, count: int | None) -> None:
    if not isinstance(value, list | tuple) or not value or not all(map(is_positive, value)):
        raise ValueError(f"{name} of the rotary positions must be a list of numbers above 0, got {value!r}")
    if count is not None and len(value) != count:
        raise ValueError(
            f"{name} of the rotary positions must hold {count} numbers, one for each pair of entries of a head, "
            f"got {len(value)}"
        )


def _num_pairs(config: Any, rope: dict[str, Any]) -> int | None:
    """Returns the number of pairs of entries of a head that are rotated; None if the configuration does not tell."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (
        hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None
    )
    if not isinstance(size, int):
        return None
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return (int(size * share) + 1) // 2


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Returns the rotary parameters of a configuration: one entry, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    nested = [entry for entry in rope.values() if isinstance(entry, dict)]
    return nested or ([rope] if rope else [])


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
