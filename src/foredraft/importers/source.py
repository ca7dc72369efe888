"""Opens a directory of released weights without running code from it.

Only this module reads pickles, and it reads only tensors from them.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foredraft.models.checkpoint import INDEX, ModelError, StoredTensor, one_line, open_files, read_json, shards_of

_PICKLES = (".bin", ".pt", ".pth")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state")
"""Beginnings of the names of pickles that trainers write beside the weights."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class PickledTensor(NamedTuple):
    """A tensor of a pickle, with the interface of a `StoredTensor`."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""
        return tuple(self.tensor.shape)

    @property
    def dtype_name(self) -> str:
        """Name of the dtype in safetensors."""
        return _NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def read(self) -> Tensor:
        """Returns the tensor."""
        return self.tensor


@dataclass(frozen=True)
class Source:
    """A directory of weights.

    Attributes:
        folder: the directory.
        config: content of config.json; empty if there is none.
        tensors: the tensors, by name.
        files: the files that hold the tensors.
        pickled: whether these files are pickles.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor | PickledTensor]
    files: Sequence[Path]
    pickled: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def hashes(self) -> dict[str, str]:
        """Computes the SHA-256 hash of each file, by file name."""
        hashes = {}
        for file in self.files:
            with file.open("rb") as opened:
                hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return hashes


def open_source(folder: Path) -> Source:
    """Opens the weights in a directory: safetensors files if there are any, else pickles. Only tensors are read from pickles.

    Raises:
        ModelError: there is no such directory, it holds no weights, or a file cannot be read without running code.
    """
    if not folder.is_dir():
        raise ModelError(f"no directory {str(folder)!r}", "check the path, or download the checkpoint first with `hf download`")
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = shards_of(folder, INDEX) or _one_of(folder, (".safetensors",), "model.safetensors")
    if files:
        return Source(folder, config, open_files(files), files, pickled=False)
    files = shards_of(folder, "pytorch_model.bin.index.json") or _one_of(folder, _PICKLES, "pytorch_model.bin")
    if not files:
        raise ModelError(f"{str(folder)!r} holds no weights", "give the directory of a draft head (.safetensors, .bin or .pt)")
    tensors: dict[str, StoredTensor | PickledTensor] = {}
    for file in files:
        tensors |= {name: PickledTensor(tensor) for name, tensor in _unpickle(file).items()}
    return Source(folder, config, tensors, files, pickled=True)


def _one_of(folder: Path, endings: Sequence[str], usual: str) -> list[Path]:
    """Finds the file of weights: the one with the usual name, or else the only one.

    Raises:
        ModelError: there are several files, and none has the usual name.
    """
    if (folder / usual).is_file():
        return [folder / usual]
    files = sorted(file for file in folder.iterdir() if file.suffix in endings and not file.name.startswith(_NO_WEIGHTS))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{str(folder)!r} holds several files of weights ({names})", "Leave only one of them in the directory")
    return files


def _unpickle(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a pickle. A pickle that would run code is refused, by torch's ``weights_only``."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError:
        raise ModelError(
            f"{file.name} holds more than tensors, and reading it would run code, which is never done",
            "get the checkpoint as safetensors from a source that you trust",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{file.name} is corrupt or cut off ({one_line(error)})", "copy it again") from None
    if not isinstance(content, dict) or not all(
        isinstance(value, Tensor) and value.layout is torch.strided for value in content.values()
    ):
        raise ModelError(f"{file.name} is not a dict of dense tensors", "give the file that `torch.save(state_dict)` wrote")
    return {str(name): tensor for name, tensor in content.items()}
