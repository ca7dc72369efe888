"""Reads GGUF files: their tensors as weights of few bits, under the names of Transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from foredraft.kernels.quantized import Form, Quantized
from foredraft.models.checkpoint import ModelError, one_line, quiet
from foredraft.models.gguf_header import check_header

SUFFIX = ".gguf"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
"""Names of GGUF -> names of Transformers, without the number of the layer."""

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Architectures that can be read. Mistral's files name llama."""

_PERMUTED = ("llama",)
"""Architectures whose rows of q and k are stored for interleaved rotary positions."""

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")

_FLOATS = ("F32", "F16", "BF16")

Blocks = UInt8[Tensor, "o b n"]


def _half(blocks: Blocks, begin: int, count: int = 1) -> Tensor:
    """Numbers of 16 bits in each block."""
    found = blocks[..., begin : begin + 2 * count].contiguous().view(torch.float16)
    return found[..., 0] if count == 1 else found


def _nibbles(halves: Tensor) -> Tensor:
    """The lower halves of bytes, then the upper ones."""
    return torch.cat([halves & 15, halves >> 4], -1)


def _bits(words: Tensor) -> Tensor:
    """The bits of the last dimension, the lowest of the first byte first."""
    return (words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _q4_0(blocks: Blocks) -> Quantized:
    return Quantized(_nibbles(blocks[..., 2:]).flatten(1), 4, _half(blocks, 0))


def _q4_1(blocks: Blocks) -> Quantized:
    return Quantized(_nibbles(blocks[..., 4:]).flatten(1), 4, _half(blocks, 0), Form.SHIFTS, _half(blocks, 2))


def _q5_0(blocks: Blocks) -> Quantized:
    numbers = _nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4
    return Quantized(numbers.flatten(1), 5, _half(blocks, 0))


def _q5_1(blocks: Blocks) -> Quantized:
    numbers = _nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
    return Quantized(numbers.flatten(1), 5, _half(blocks, 0), Form.SHIFTS, _half(blocks, 2))


def _q8_0(blocks: Blocks) -> Quantized:
    return Quantized((blocks[..., 2:] ^ 128).flatten(1), 8, _half(blocks, 0))


def _small_scales(packed: UInt8[Tensor, "o b 12"]) -> Tensor:
    """Scales and minima of six bits of the eight parts of a super-block, [o, 8 b, 2]."""
    first, second, rest = packed.split(4, -1)
    scales = torch.cat([first & 63, (rest & 15) | (first >> 2 & 48)], -1)
    minima = torch.cat([second & 63, rest >> 4 | (second >> 2 & 48)], -1)
    return torch.stack([scales, minima], -1).flatten(1, 2).to(torch.int8)


def _q4_k(blocks: Blocks) -> Quantized:
    numbers = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Quantized(numbers.flatten(1), 4, _half(blocks, 0, 2), Form.SUPER, _small_scales(blocks[..., 4:16]))


def _q5_k(blocks: Blocks) -> Quantized:
    parts = torch.arange(8, dtype=torch.uint8)[:, None]
    upper = (blocks[..., 16:48][..., None, :] >> parts & 1).flatten(-2)
    numbers = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2) | upper << 4
    return Quantized(numbers.flatten(1), 5, _half(blocks, 0, 2), Form.SUPER, _small_scales(blocks[..., 4:16]))


def _q6_k(blocks: Blocks) -> Quantized:
    lower = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # of each half of a super-block
    places = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    upper = (blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> places & 3).flatten(-2)
    small = blocks[..., 192:208].view(torch.int8).flatten(1)
    return Quantized((lower | upper << 4).flatten(1), 6, _half(blocks, 208), Form.SMALL, small)


class Layout(NamedTuple):
    """A type of GGUF: inputs and bytes of a block, and what reads blocks."""

    inputs: int
    num_bytes: int
    read: Callable[[Blocks], Quantized]


TYPES = {
    "Q4_0": Layout(32, 18, _q4_0),
    "Q4_1": Layout(32, 20, _q4_1),
    "Q5_0": Layout(32, 22, _q5_0),
    "Q5_1": Layout(32, 24, _q5_1),
    "Q8_0": Layout(32, 34, _q8_0),
    "Q4_K": Layout(256, 144, _q4_k),
    "Q5_K": Layout(256, 176, _q5_k),
    "Q6_K": Layout(256, 210, _q6_k),
}
"""Types of weights of few bits that can be read."""


class GGUFTensor(NamedTuple):
    """A tensor in a GGUF file, which `read` loads. The file stays mapped into memory.

    Attributes:
        data: bytes [outputs, bytes of a row], or numbers.
        shape: shape of the weight, outputs first.
        dtype_name: name of the type, such as Q4_K, or F32.
        heads: number of heads whose rows are permuted; 0 for none.
    """

    data: Any
    shape: tuple[int, ...]
    dtype_name: str
    heads: int
    has_scales: bool = True

    def read(self) -> Tensor | Quantized:
        """Loads the tensor."""
        if self.dtype_name in _FLOATS:
            array = torch.from_numpy(np.array(self.data))
            found = array.view(torch.bfloat16) if self.dtype_name == "BF16" else array
            found = found.reshape(self.shape)
            return found[self._rows()] if self.heads else found
        layout = TYPES[self.dtype_name]
        blocks = torch.from_numpy(np.array(self.data)).unflatten(1, (-1, layout.num_bytes))
        return layout.read(blocks[self._rows()] if self.heads else blocks)

    def _rows(self) -> Tensor:
        """Order in which rows of interleaved rotary positions become those of the two halves of a head."""
        return torch.arange(self.shape[0]).view(self.heads, -1, 2).transpose(1, 2).flatten()


def open_gguf(path: Path) -> dict[str, GGUFTensor]:
    """Opens a GGUF file and returns its tensors by their names in Transformers. Reads the headers only.

    Raises:
        ModelError: the file is corrupt, or holds a type of weights that cannot be read.
    """
    reader = read_header(path)
    architecture = _field(reader, "general.architecture")
    heads = {"q": _field(reader, f"{architecture}.attention.head_count")}
    heads["k"] = _field(reader, f"{architecture}.attention.head_count_kv") or heads["q"]
    tensors = {}
    for tensor in reader.tensors:
        name = _named(tensor.name)
        kind = tensor.tensor_type.name
        if name is None:
            continue
        if kind not in (*TYPES, *_FLOATS):
            raise ModelError(
                f"the tensor {tensor.name!r} has the type {kind}, which cannot be read",
                f"give a file with {', '.join(TYPES)}, or with weights of 16 or 32 bits",
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))
        permuted = re.search(r"self_attn\.([qk])_proj", name) if architecture in _PERMUTED else None
        tensors[name] = GGUFTensor(tensor.data, shape, kind, heads[permuted[1]] if permuted else 0)
    return tensors


def gguf_file(path: Path) -> Path | None:
    """Returns the GGUF file that a path names or that its directory holds beside no other weights; None if there is none.

    Raises:
        ModelError: the directory holds several.
    """
    if path.suffix == SUFFIX:
        return path
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3])
        raise ModelError(f"{str(path)!r} holds {len(files)} GGUF files ({names})", "give one of them")
    return files[0] if files else None


def has_tokenizer(path: Path) -> bool:
    """Returns whether a GGUF file holds a tokenizer."""
    return _field(read_header(path), "tokenizer.ggml.model") is not None


def gguf_config(path: Path) -> Any:
    """Returns the Transformers configuration that a GGUF file describes.

    Raises:
        ModelError: the file is corrupt, or Transformers does not know its architecture.
    """
    from transformers import AutoConfig

    architecture = _field(read_header(path), "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{path.name} holds a model of the architecture {architecture!r}, which does not run from a GGUF file",
            f"give one of {', '.join(ARCHITECTURES)}, or the checkpoint of Transformers",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{path.name} describes no model that Transformers knows ({one_line(error)})", "copy it again"
        ) from None
    config.dtype = None
    config._attn_implementation = None
    return config


def read_header(path: Path) -> Any:
    """Opens a GGUF file with the package ``gguf``.

    Raises:
        ModelError: the package is missing, or the file is corrupt.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("reading GGUF files needs the package gguf", "pip install gguf") from None
    check_header(path)
    try:
        return GGUFReader(path)
    except Exception as error:
        raise ModelError(f"{path.name} is corrupt or cut off ({one_line(error)})", "copy it again") from None


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _named(name: str) -> str | None:
    """Returns the name in Transformers; None for a tensor that is computed, such as rotary frequencies."""
    layer = _LAYER.fullmatch(name)
    stem, _, kind = (layer[2] if layer else name).rpartition(".")
    if stem not in _NAMES:
        return None
    return f"model.layers.{layer[1]}.{_NAMES[stem]}.{kind}" if layer else f"{_NAMES[stem]}.{kind}"
