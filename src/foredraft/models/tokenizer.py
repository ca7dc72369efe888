"""The tokenizer beside a model, and whether the two fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from foredraft.models.checkpoint import ModelError, one_line, resolve

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(source: Any, revision: str | None = None) -> Any:
    """The tokenizer beside a model; None if there is none, for then the model works on token ids.

    Raises:
        ModelError: there is one, and it cannot be read.
    """
    if isinstance(source, PreTrainedModel):
        source = getattr(source.config, "_name_or_path", "")
        if not (source and Path(source).is_dir()):
            return None
    path = resolve(source, revision)
    if not any((path / name).is_file() for name in _FILES):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"cannot read the tokenizer in {str(path)!r}: {one_line(error)}; copy its files again") from None
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict | None):
        raise ModelError(
            f"the chat_template in {str(path)!r} must be a text, got {template!r}: copy tokenizer_config.json again"
        )
    length = getattr(tokenizer, "model_max_length", None)
    if not isinstance(length, int | float | None):
        raise ModelError(f"model_max_length in {str(path)!r} must be a number, got {length!r}: correct tokenizer_config.json")
    return tokenizer


def refuse_misfit(tokenizer: Any, vocab_size: int, model: str = "model") -> None:
    """Raises if a tokenizer cannot be used, or has tokens that a model does not know. None fits every model.

    Args:
        vocab_size: rows of the model's embedding.
        model: what the message calls it.

    Raises:
        TypeError: it is no tokenizer.
        ModelError: says both sizes, and which tokens.
    """
    if tokenizer is None:
        return
    if not all(hasattr(tokenizer, name) for name in ("__call__", "decode", "get_vocab")):
        raise TypeError(f"tokenizer must be a Transformers tokenizer or a directory that holds one, got {tokenizer!r}")
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:3]) + (", ..." if len(beyond) > 3 else "")
        raise ModelError(
            f"the tokenizer has ids up to {beyond[-1][0]}, the {model}'s embedding has {vocab_size} rows, none for {named}: "
            "give the tokenizer of this model, or enlarge the model with resize_token_embeddings and save it"
        )
