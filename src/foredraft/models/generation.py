"""Sampling defaults of a model, read from its generation_config.json and named as in `SamplingParams`.

`load_generation_config` reads the file. Each field of the format belongs to one table of this module. A field becomes a
sampling parameter, limits the length of prompt and output, must be neutral, or has no effect. `default_params` makes the
parameters of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foredraft.core.errors import UserError
from foredraft.core.params import SamplingParams
from foredraft.models.checkpoint import ModelError, one_line, read_json, resolve
from foredraft.models.files import GENERATION_CONFIG as FILE
from foredraft.models.files import IGNORE, check_generation_config, is_loaded_model
from foredraft.models.gguf import gguf_config, gguf_file

TAKEN_OVER = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
"""Field -> the parameter of `SamplingParams` that it sets."""

BIASES = ("suppress_tokens", "bad_words_ids", "sequence_bias")
"""Fields that become `logit_bias`. They may name single tokens only."""

LENGTHS = ("max_length", "min_length")
"""Fields that limit the length of prompt plus output. `max_new_tokens` and `min_new_tokens` take precedence."""

REFUSED: dict[str, Callable[[Any], bool]] = {
    "num_beams": lambda given: given == 1 and given is not True,
    "num_beam_groups": lambda given: given == 1 and given is not True,
    "penalty_alpha": lambda given: given == 0,
    "dola_layers": lambda given: False,
    "typical_p": lambda given: given >= 1,
    "epsilon_cutoff": lambda given: not 0 < given < 1,
    "eta_cutoff": lambda given: not 0 < given < 1,
    "top_h": lambda given: False,
    "encoder_repetition_penalty": lambda given: given == 1,
    "no_repeat_ngram_size": lambda given: given <= 0,
    "encoder_no_repeat_ngram_size": lambda given: given <= 0,
    "guidance_scale": lambda given: given == 1,
    "forced_bos_token_id": lambda given: False,
    "forced_eos_token_id": lambda given: False,
    "begin_suppress_tokens": lambda given: not given,
    "exponential_decay_length_penalty": lambda given: False,
    "watermarking_config": lambda given: False,
    "token_healing": lambda given: not given,
    "constraints": lambda given: not given,
    "force_words_ids": lambda given: not given,
    "max_time": lambda given: False,
}
"""Unsupported field -> a test for the values that do not change the distribution. A null never changes it."""

WITHOUT_EFFECT = (
    *(
        "do_sample",
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
    ),  # vLLM ignores them, and `num_beams` above 1 is refused
    *("renormalize_logits", "remove_invalid_values"),  # our distributions are normalised, and our weights are finite
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "continuous_batching_config"),
    *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
)
"""Ignored fields: they do not change the distribution. Unknown fields are ignored too, as in Transformers."""


def load_generation_config(
    source: Any, revision: str | None = None, *, choice: str | Path = "auto", vocab_size: int | None = None
) -> dict[str, Any]:
    """Reads the sampling defaults of a model, under the names of `SamplingParams`.

    Args:
        source: a directory, a Hub id or a loaded `PreTrainedModel`.
        revision: branch, tag or commit of a Hub id.
        choice: ``auto`` reads the model's ``generation_config.json``. ``none`` ignores it. A directory is read instead.
        vocab_size: size of the vocabulary. A bias on a token id beyond it is dropped.

    Returns:
        ``eos_token_id`` is a list of all ids that end an output; it may be empty. The other keys are the parameters of
        `SamplingParams` that the file sets, and ``max_length`` and ``min_length`` for prompt plus output.

    Raises:
        ModelError: a file is missing or malformed, or sets an unsupported field.
    """
    given = _given(source, revision, choice)
    config = source.config.to_dict() if is_loaded_model(source) else _config(resolve(source, revision))
    text = config.get("text_config")
    nested = text.get("eos_token_id") if isinstance(text, Mapping) else None
    ends = [given.get("eos_token_id"), config.get("eos_token_id"), nested]
    ids = list(dict.fromkeys(i for end in ends for i in _ids(end, "eos_token_id")))
    _refuse_unsupported(given)
    defaults: dict[str, Any] = {name: given[key] for key, name in TAKEN_OVER.items() if given.get(key) is not None}
    defaults |= {key: given[key] for key in LENGTHS if _is_length(key, given.get(key))}
    biases = {i: bias for i, bias in _biases(given, ids).items() if vocab_size is None or i < vocab_size}
    return defaults | ({"logit_bias": biases} if biases else {}) | {"eos_token_id": ids}


def _config(path: Path) -> dict[str, Any]:
    file = gguf_file(path)
    return read_json(path / "config.json") if file is None else gguf_config(file).to_dict()


def default_params(
    defaults: Mapping[str, Any],
    num_prompt: int | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    max_tokens: int | None = None,
) -> SamplingParams:
    """Makes the sampling parameters of one prompt from the defaults of a model.

    Args:
        defaults: the result of `load_generation_config`.
        num_prompt: number of prompt tokens. None ignores ``max_length`` and ``min_length``.
        given: values that take precedence over the defaults.
        max_tokens: limit of the output if neither `given` nor ``max_new_tokens`` sets one.

    Raises:
        ValueError: a value is not allowed, or the prompt is as long as ``max_length``.
    """
    given = given or {}
    values = {name: defaults[name] for name in SamplingParams.names() if name in defaults} | dict(given)
    if "max_tokens" not in values:
        remaining = _remaining_length(defaults.get("max_length"), num_prompt)
        limits = [limit for limit in (max_tokens, remaining) if limit is not None]
        values |= {"max_tokens": min(limits)} if limits else {}
    if "min_tokens" not in values and num_prompt is not None:
        values["min_tokens"] = max(0, defaults.get("min_length", 0) - num_prompt)
    overruled = "min_tokens" not in given and ("max_tokens" in given or "max_tokens" not in defaults)
    if overruled and values.get("max_tokens") and isinstance(values.get("min_tokens"), int):
        values["min_tokens"] = min(values["min_tokens"], values["max_tokens"])
    return SamplingParams(**values)


def _given(source: Any, revision: str | None, choice: str | Path) -> dict[str, Any]:
    """Returns the fields of the chosen file, or none if it is ignored or missing."""
    if isinstance(choice, str) and choice in IGNORE:
        return {}
    check_generation_config(choice)
    if choice == "auto" and is_loaded_model(source):
        return source.generation_config.to_diff_dict() if source.generation_config else {}
    if choice == "auto":
        path = resolve(source, revision) / FILE
        return read_json(path) if path.is_file() else {}
    return read_json(Path(choice) / FILE)


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, is_neutral in REFUSED.items():
        value = given.get(name)
        try:
            neutral = value is None or is_neutral(value)
        except TypeError:
            neutral = False
        if not neutral:
            raise _cannot_be_used(f"{name} is {value!r}, which is not supported")


def _cannot_be_used(why: str) -> ModelError:
    return ModelError(
        f"the model's {FILE} cannot be used: {why}",
        "correct the file, or ignore the file with generation_config='none' (--generation-config none)",
    )


def checked(defaults: Mapping[str, Any]) -> None:
    """Checks that the defaults are valid `SamplingParams`.

    Raises:
        ModelError: a value is not allowed.
    """
    try:
        default_params(defaults)
    except (ValueError, TypeError) as error:
        ours, _, rest = one_line(error).partition(" ")
        fields = {name: field for field, name in TAKEN_OVER.items()}
        rest = rest.replace("max_tokens", "max_new_tokens")
        raise _cannot_be_used(f"{fields.get(ours, ours)} {rest}") from None


def _is_length(name: str, value: Any) -> bool:
    least = 1 if name == "max_length" else 0
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise _cannot_be_used(f"{name} must be a whole number, at least {least}, got {value!r}")
    return bool(value)


def _remaining_length(max_length: int | None, num_prompt: int | None) -> int | None:
    if max_length is None or num_prompt is None:
        return None
    if num_prompt >= max_length:
        raise UserError(
            f"the prompt has {num_prompt} tokens, and the model's {FILE} sets max_length {max_length} for prompt and output",
            "give max_tokens (--max-tokens), or generation_config='none' (--generation-config none)",
        )
    return max_length - num_prompt


def _biases(given: Mapping[str, Any], eos_ids: Sequence[int]) -> dict[int, float]:
    """Returns token id -> bias on its logit. As in Transformers, `bad_words_ids` does not ban an end-of-sequence token."""
    words = [_ids(word, "bad_words_ids") for word in _list(given, "bad_words_ids")]
    entries = [([i], -math.inf) for i in _ids(given.get("suppress_tokens"), "suppress_tokens")]
    entries += [(word, -math.inf) for word in words if word not in [[i] for i in eos_ids]]
    for pair in _list(given, "sequence_bias"):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[1], int | float):
            raise _cannot_be_used(f"sequence_bias must be a list of pairs of token ids and a number, got {pair!r}")
        entries.append((_ids(pair[0], "sequence_bias"), float(pair[1])))
    biases: dict[int, float] = {}
    for ids, bias in entries:
        if len(ids) != 1:
            raise _cannot_be_used(f"it bans or biases the token sequence {ids}, but only single tokens are supported")
        biases[ids[0]] = biases.get(ids[0], 0.0) + bias
    return biases


def _list(given: Mapping[str, Any], name: str) -> list[Any]:
    value = given.get(name)
    if isinstance(value, Mapping):  # a loaded model may hold a dictionary with tuples as keys
        value = list(value.items())
    if not isinstance(value, list | tuple | None):
        raise _cannot_be_used(f"{name} must be a list, got {value!r}")
    return list(value or [])


def _ids(given: Any, name: str) -> list[int]:
    """Returns the token ids of a field that holds one id, a list of ids or null."""
    ids = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    wrong = [token_id for token_id in ids if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0]
    if wrong:
        raise ModelError(f"{name} must be a token id or a list of token ids, got {given!r}", f"correct config.json or {FILE}")
    return ids
