"""Finds a checkpoint on disk, reads its configuration and opens its tensors. Every fault raises a `ModelError`."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foredraft.core.errors import ModelError as ModelError
from foredraft.models.files import HEAD_KEY as HEAD_KEY
from foredraft.models.files import Stored as Stored
from foredraft.models.files import one_line as one_line
from foredraft.models.files import read_json as read_json
from foredraft.models.files import some as some
from foredraft.models.sizes import refuse_nonsense

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MOST_CHARACTERS = 4096
"""Length of the longest path on Linux."""

_PICKLES = (".bin", ".pt", ".pth")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, which `read` loads. The file stays mapped into memory.

    Attributes:
        file: the open file.
        name: name of the tensor in the file.
    """

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension, from the header of the file."""
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype_name(self) -> str:
        """Name of the dtype in safetensors, such as F32 or BF16."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self) -> Tensor:
        """Loads the tensor."""
        return self.file.get_tensor(self.name)


def resolve(source: Any, revision: str | None) -> Path:
    """Returns the directory of a path or a Hub id. A Hub repository is downloaded unless the local cache holds it.

    Raises:
        ModelError: the directory or repository does not exist.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        shown = repr(source) if len(repr(source)) < 100 and "\n" not in repr(source) else f"a {type(source).__name__}"
        raise ModelError(f"model must be a directory, a Hub id or a loaded PreTrainedModel, got {shown}")
    if not isinstance(revision, str | None) or revision == "":
        raise ModelError(f"revision must be the name of a branch, tag or commit, got {revision!r}")
    path, is_directory = _look(source)
    if is_directory:
        if not any(path.iterdir()):
            raise ModelError(f"the directory {str(source)!r} is empty", f"it must hold config.json and {_SINGLE}")
        if revision is not None:
            raise ModelError(f"revision {revision!r} is for Hub ids only, but {str(source)!r} is a directory", "leave it out")
        return path
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        raise ModelError(f"{str(source)!r} is a file", f"give the directory that holds config.json and {_SINGLE}")
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ModelError(f"no directory {str(source)!r}", "check the path, or give a Hub id such as 'owner/name'")
    return _download(source, revision)


def _look(source: str | Path) -> tuple[Path, bool]:
    """Returns the path, and whether it is a directory.

    Raises:
        ModelError: the system rejects the path.
    """
    if len(str(source)) > _MOST_CHARACTERS:
        raise ModelError(
            f"the path {str(source)[:40]!r}... has {len(str(source))} characters, and a path has at most {_MOST_CHARACTERS}",
            "give the directory of a model",
        )
    try:
        path = Path(source).expanduser()
        return path, path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"cannot look into {str(source)[:200]!r} ({one_line(error)})", "give the directory of a model"
        ) from None


def refuse_adapter(path: Path) -> None:
    """Refuses a directory that holds an adapter, because the adapter would be ignored.

    Raises:
        ModelError: there is an adapter. The message names its file and says how to merge it.
    """
    found = next((name for name in _ADAPTERS if (path / name).is_file()), None)
    if found is None:
        return
    config = path / _ADAPTERS[0]
    base = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    has_model = (path / _SINGLE).is_file() or (path / INDEX).is_file()
    named = f"an adapter ({found})" + (f" of the model {base!r}" if base else "")
    what = f"also holds {named}" if has_model else f"holds {named} and no model"
    raise ModelError(
        f"{str(path)!r} {what}, but adapters are not supported",
        "merge it with PeftModel.from_pretrained(model, directory).merge_and_unload().save_pretrained(new_directory) and "
        "give the new directory, or remove the adapter's files to run the model without the adapter",
    )


def _download(repo_id: str, revision: str | None) -> Path:
    """Returns a snapshot of a Hub repository. Without a network it comes from the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise ModelError(f"access to {at} is restricted: accept its terms on the Hub and run `hf auth login`") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ModelError(f"no directory and no Hub model {at}", "check the spelling, or run `hf auth login`") from None
    except HFValidationError as error:
        raise ModelError(f"{at} is neither a directory nor a valid Hub id ({one_line(error)})", "check the spelling") from None
    except Exception as error:
        raise ModelError(
            f"{at} is neither a directory nor in the local Hub cache, and the Hub cannot be reached ({type(error).__name__})",
            "give a directory, or download it first with `hf download`",
        ) from None


def read_config(path: Path) -> Any:
    """Reads the Transformers configuration in a directory.

    Raises:
        ModelError: config.json is missing or invalid, belongs to a draft head, names an unknown type, or needs code of the
            checkpoint.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    refuse_adapter(path)
    given = read_json(path / "config.json")
    if HEAD_KEY in given:
        raise ModelError(
            f"{str(path)!r} holds a draft head, not a model",
            "give the head as --draft-model (config key 'model') with its own method or without --method, and give the model "
            "that it was trained for as --model",
        )
    model_type = given.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"config.json in {str(path)!r} names no model_type", "give a Transformers checkpoint")
    if model_type not in CONFIG_MAPPING:
        if given.get("auto_map"):
            raise ModelError(
                f"model type {model_type!r} needs code from its checkpoint, which is never run",
                "choose a model that Transformers supports by itself",
            )
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ModelError(f"unknown model_type {model_type!r} in config.json{meant}: a newer Transformers may know it")
    try:
        refuse_nonsense(given)
        with quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if not isinstance(config.get_text_config(decoder=True), PretrainedConfig):
            raise ValueError(f"a model of type {model_type!r} has no text_config")
    except Exception as error:
        raise ModelError(f"config.json in {str(path)!r} is not valid: {one_line(error)}", "copy it again") from None
    config._attn_implementation = None  # chosen here, not by the checkpoint
    return config


def open_weights(path: Path) -> dict[str, StoredTensor]:
    """Opens the checkpoint in a directory and returns its tensors by name. Reads the headers only.

    Raises:
        ModelError: a file is missing, corrupt or truncated, or the directory holds no safetensors.
    """
    return open_files(_weight_files(path))


def open_files(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Opens safetensors files of one directory and returns their tensors by name. Reads the headers only.

    Raises:
        ModelError: a file is corrupt or truncated, or no file holds a tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
            tensors.update({name: StoredTensor(handle, name) for name in handle.keys()})  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            where = f"{file.name} in {str(file.parent)!r}"
            raise ModelError(f"{where} is corrupt or cut off ({one_line(error)})", "copy it again") from None
    if not tensors:
        raise ModelError(f"the weights in {str(files[0].parent)!r} hold no tensor", "copy them again")
    return tensors


def shards_of(path: Path, index: str) -> list[Path]:
    """Returns the weight files that an index in a directory names. Without the index the list is empty.

    Raises:
        ModelError: the index names no file, or a file that is missing.
    """
    if not (path / index).is_file():
        return []
    names = read_json(path / index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} in {str(path)!r} has no weight_map", "copy it again")
    files = [path / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{str(path)!r} lacks {', '.join(missing)}, which {index} names", "copy the missing files")
    return files


def _weight_files(path: Path) -> list[Path]:
    shards = shards_of(path, INDEX)
    if shards:
        return shards
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"{str(path)!r} holds only pickled weights ({pickles[0]}), which can run code",
            "convert them to safetensors with "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory), if you trust them",
        )
    raise ModelError(f"{str(path)!r} holds no weights", f"it needs {_SINGLE} or {INDEX} with its shards")


_SAMPLE = 256
"""Number of entries that a fingerprint reads at the beginning, in the middle and at the end of each tensor."""


def fingerprint(weights: Mapping[str, Tensor | Stored]) -> str:
    """Returns a hash that identifies the weights of a model.

    The hash does not depend on how the weights are split into files, named or tied, nor on their dtype if it is bfloat16 or
    finer. It changes with further training. It reads a few entries of each tensor, so its cost does not grow with their size.
    """
    digests = set()
    for weight in weights.values():
        flat = _floats(weight).detach().flatten()
        middle = max(0, len(flat) // 2 - _SAMPLE // 2)
        parts = torch.cat([flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]]).to("cpu", torch.bfloat16)
        shape = ",".join(map(str, weight.shape))
        digests.add(hashlib.sha256(shape.encode() + parts.view(torch.int16).numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _floats(weight: Any) -> Tensor:
    """Reads a weight; one of few bits as the numbers that they stand for."""
    found = weight if isinstance(weight, Tensor) else weight.read()
    return found if isinstance(found, Tensor) else found.weight()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings and the progress bar of Transformers."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
