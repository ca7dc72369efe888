"""Loads the tokenizer of a model and checks that the two fit."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from foredraft.core.errors import UserTypeError
from foredraft.models.checkpoint import ModelError, one_line, resolve
from foredraft.models.files import is_loaded_model, read_json
from foredraft.models.gguf import gguf_file, has_tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(source: Any, revision: str | None = None) -> Any:
    """Loads the tokenizer in the directory of a model. Returns None if there is none; the model then works on token ids.

    Raises:
        ModelError: the files of the tokenizer cannot be read.
    """
    if is_loaded_model(source):
        source = getattr(source.config, "_name_or_path", "")
        if not (source and Path(source).is_dir()):
            return None
    path = resolve(source, revision)
    if (file := gguf_file(path)) is not None:
        return _read(file.parent, gguf_file=file.name) if has_tokenizer(file) else None
    if not any((path / name).is_file() for name in _FILES):
        return None
    return quick_tokenizer(path) or _read(path)


def _read(path: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:
        raise ModelError(
            f"cannot read the tokenizer in {str(path)!r}: {one_line(error)}", "copy the tokenizer files again"
        ) from None
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict | None):
        raise ModelError(
            f"the chat_template in {str(path)!r} must be a string, got {template!r}", "copy tokenizer_config.json again"
        )
    length = getattr(tokenizer, "model_max_length", None)
    if not isinstance(length, int | float | None):
        raise ModelError(f"model_max_length in {str(path)!r} must be a number, got {length!r}", "correct tokenizer_config.json")
    return tokenizer


def refuse_misfit(tokenizer: Any, vocab_size: int, model: str = "model") -> None:
    """Refuses a tokenizer that is unusable or has tokens outside the vocabulary of a model. None fits every model.

    Args:
        tokenizer: a Transformers tokenizer, or None.
        vocab_size: number of rows of the model's embedding.
        model: name of the model in the message.

    Raises:
        TypeError: `tokenizer` is not a tokenizer.
        ModelError: a token id is too large. The message says both sizes and names tokens.
    """
    if tokenizer is None:
        return
    if not all(hasattr(tokenizer, name) for name in ("__call__", "decode", "get_vocab")):
        raise UserTypeError(f"tokenizer must be a Transformers tokenizer or a directory that holds one, got {tokenizer!r}")
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        raise ModelError(
            f"the tokenizer has ids up to {beyond[-1][0]}, but the {model}'s embedding has {vocab_size} rows, none for {named}",
            "give the tokenizer of this model, or enlarge the model with resize_token_embeddings and save it",
        )


class QuickTokenizer:
    """A tokenizer that reads tokenizer.json only. It encodes text and lists its vocabulary without Transformers.

    For everything else it loads Transformers' tokenizer of the same files.

    Attributes:
        backend_tokenizer: the `tokenizers.Tokenizer`.
        chat_template: the chat template, or None.
    """

    def __init__(self, path: Path, backend: Any, chat_template: str | None):
        self._path, self.backend_tokenizer, self.chat_template = path, backend, chat_template

    @cached_property
    def whole(self) -> Any:
        """Transformers' tokenizer of the same files. It is loaded on first use."""
        return _read(self._path)

    def encode(self, text: Any, **options: Any) -> list[int]:
        """Token ids of a text. Options beside ``add_special_tokens`` and ``verbose`` go to Transformers' tokenizer."""
        if not isinstance(text, str) or not options.keys() <= {"add_special_tokens", "verbose"}:
            return self.whole.encode(text, **options)
        return self.backend_tokenizer.encode(text, add_special_tokens=options.get("add_special_tokens", True)).ids

    def get_vocab(self) -> dict[str, int]:
        """Returns the vocabulary: token -> token id."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """Returns the added tokens of tokenizer.json, such as special tokens: token -> token id."""
        return {token.content: i for i, token in self.backend_tokenizer.get_added_tokens_decoder().items()}

    def decode(self, ids: Any, **options: Any) -> Any:
        """Decodes token ids to text, with Transformers' tokenizer."""
        return self.whole.decode(ids, **options)

    def __call__(self, text: Any, **options: Any) -> Any:
        """Returns the ``input_ids`` of a text. Transformers' tokenizer handles all other inputs and options."""
        if isinstance(text, str) and options.keys() <= {"add_special_tokens", "verbose"}:
            return {"input_ids": self.encode(text, **options)}
        return self.whole(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


_QUICK = {"TokenizersBackend", "PreTrainedTokenizerFast"}
"""Values of ``tokenizer_class`` that use tokenizer.json unchanged."""

_HARMLESS = ("backend", "is_local", "local_files_only", "model_max_length", "tokenizer_class", "clean_up_tokenization_spaces")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def quick_tokenizer(path: Path) -> QuickTokenizer | None:
    """Returns the tokenizer in a directory if tokenizer.json defines it fully, or None if Transformers has to read it."""
    if not (path / "tokenizer.json").is_file() or not (path / "tokenizer_config.json").is_file():
        return None
    if any((path / name).exists() for name in ("special_tokens_map.json", "added_tokens.json", "chat_templates")):
        return None
    try:
        config = read_json(path / "tokenizer_config.json")
        template = path / "chat_template.jinja"
        chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
        backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:
        return None  # Transformers' reader reports the fault
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    named = [config[key] for key in _SPECIAL if key in config]
    if config.get("tokenizer_class") not in _QUICK or not config.keys() <= {*_HARMLESS, *_SPECIAL}:
        return None
    if not all(isinstance(token, str) and added.get(token) for token in named):
        return None  # Transformers adds them to the vocabulary
    if not isinstance(config.get("model_max_length", 0), int | float):
        return None
    backend.no_truncation()
    backend.no_padding()
    return QuickTokenizer(path, backend, chat_template)
