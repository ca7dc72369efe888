"""Accepts, ignores or refuses keyword arguments with names of vLLM, Transformers and the OpenAI API, according to NAMES."""

from __future__ import annotations

import difflib
import inspect
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar

from foredraft.core.errors import UserTypeError
from foredraft.core.names import METHODS, NAMES
from foredraft.core.treatment import CHAT, DRAFT, LOAD, RUN, SAMPLE, Name, code_of

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)

_log = logging.getLogger("foredraft")

OWN: dict[str, tuple[str, ...]] = {
    LOAD: (
        *("model", "speculative_config", "tokenizer", "dtype", "activations", "device", "max_model_len", "max_num_seqs"),
        *("seed", "revision", "generation_config", "max_num_batched_tokens", "kv_cache_memory_bytes"),
        *("enable_prefix_caching", "reproducible", "max_waiting", "max_wait_s"),
    ),
    RUN: ("prompts", "sampling_params", "progress"),
    CHAT: (
        *("messages", "chat_template", "chat_template_content_format", "add_generation_prompt", "continue_final_message"),
        *("tools", "chat_template_kwargs"),
    ),
    DRAFT: ("method", "model", "tree", "num_speculative_tokens", "rule"),
}
"""Our own names, by the place that takes them. SamplingParams adds its fields when it is imported."""

_WRITTEN = {
    LOAD: "LLM(model, {}=...)",
    SAMPLE: "generate(prompts, SamplingParams({}=...))",
    RUN: "LLM.generate({}=...)",
    CHAT: "LLM.chat(messages, {}=...)",
    DRAFT: "LLM(model, speculative_config={{'{}': ...}})",
}
"""How to write an argument, by place."""


def takes_other_names(place: str, more: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """Returns a decorator that makes a function take the names that NAMES lists for `place` too.

    Args:
        place: the place of the function's arguments in NAMES.
        more: names that the function takes through a ``**`` parameter.
    """

    def decorate(function: _Function) -> _Function:
        signature, said = inspect.signature(function), function.__qualname__.removesuffix(".__init__")
        kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
        own = {name for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD} | {*more}

        @wraps(function)
        def call(*args: Any, **given: Any) -> Any:
            if given.keys() <= own:
                return function(*args, **given)
            ours = {name: value for name, value in given.items() if name in own}
            bound = dict(zip(kinds, args, strict=False)) | ours
            others = {name: value for name, value in given.items() if name not in own}
            return function(*args, **ours, **translated(place, others, bound, own=own - {"self"}, said=said))

        return call  # type: ignore[return-value]

    return decorate


def class_takes_other_names(place: str) -> Callable[[_Class], _Class]:
    """Does the same for a class with a generated ``__init__``, and adds its names to `OWN`."""

    def decorate(cls: _Class) -> _Class:
        OWN[place] = tuple(inspect.signature(cls).parameters)
        cls.__init__ = takes_other_names(place)(cls.__init__)  # type: ignore[misc]
        return cls

    return decorate


def config_with_our_names(config: Mapping[Any, Any], *, command: bool = False) -> dict[Any, Any]:
    """Converts a speculative config to our own names. Keys that no library has stay unchanged.

    Args:
        command: whether the config comes from the command line, so that messages name its options.

    Raises:
        TypeError: a key of another library has a value that cannot be accepted.
    """
    ours = {key: value for key, value in config.items() if key not in NAMES}
    others = {key: value for key, value in config.items() if key in NAMES}
    ours |= translated(DRAFT, others, config, own=OWN[DRAFT], said=DRAFT, command=command)
    method = ours.get("method")
    return ours | ({"method": METHODS[method]} if isinstance(method, str) and method in METHODS else {})


def translated(
    place: str, others: Mapping[str, Any], given: Mapping[Any, Any], *, own: Iterable[str], said: str, command: bool = False
) -> dict[str, Any]:
    """Checks arguments that a function does not have. Returns the accepted arguments under our own names.

    Args:
        place: the place of the function's arguments in NAMES.
        others: the arguments that the function does not have.
        given: the function's own arguments that were given.
        own: names of all own arguments of the function.
        said: name of the function in messages.
        command: whether the arguments come from the command line.

    Raises:
        TypeError: an argument cannot be accepted. The message tells what it does elsewhere and what to use here.
    """
    ours, ignored = {}, []
    for name, value in others.items():
        row = NAMES.get(name)
        if row is None or place not in row.places or (row.means and row.means not in own):
            raise _misplaced(name, value, row, given, own=own, said=said, command=command)
        if not row.accepts(value, given):
            raise _refused(name, value, row, given, command=command)
        if row.means in given or row.means in ours:
            raise UserTypeError(
                f"{name} and {row.means} are the same argument of {said}, and both are given", "Give one of them"
            )
        if row.means:
            ours[row.means] = value
        elif row.ignored and value is not None:
            ignored.append(name)
    if ignored:
        _say_ignored(said, tuple(ignored))
    return ours


@cache
def _say_ignored(said: str, names: tuple[str, ...]) -> None:
    """Logs a warning. The cache prevents a repetition."""
    _log.warning("%s ignores %s: in other libraries it only affects speed or memory", said, ", ".join(names))


def _refused(name: str, value: Any, row: Name, given: Mapping[Any, Any], *, command: bool) -> UserTypeError:
    does = row.does.format(code=code_of(given.get("model")))
    use = (row.command if command else "") or row.use
    return UserTypeError(f"{name}={reprlib.repr(value)} is not supported: in {row.library} it {does}", use)


def _misplaced(
    name: str, value: Any, row: Name | None, given: Mapping[Any, Any], *, own: Iterable[str], said: str, command: bool
) -> UserTypeError:
    """Returns the error for a name that this place does not have. The name may belong to another place or to none."""
    ours = row.means if row and row.means else name
    for place, names in OWN.items():
        if ours in names:
            use = f"--{ours.replace('_', '-')}" if command else _WRITTEN[place].format(ours)
            means = "" if ours == name else f"is {ours} here, and "
            return UserTypeError(f"{said} does not take {name}", f"it {means}belongs to {place}. Use {use}")
    if row is not None:
        return _refused(name, value, row, given, command=command)
    near = difflib.get_close_matches(name, [*own], n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return UserTypeError(f"{said} takes no argument {name!r}", f"{meant}It takes {', '.join(sorted(own))}")


def option_advice(option: str, command: str, keys: Iterable[str] = ()) -> tuple[str, str] | None:
    """Returns the error and the hint for an option of another library; None if no library has the name.

    Args:
        option: the option as the user typed it, such as ``--tensor-parallel-size``.
        command: the command, such as ``foredraft generate``.
        keys: the keys that a speculative config may have.
    """
    name = option.lstrip("-").replace("-", "_")
    row = NAMES.get(name)
    if row is None:
        return _own_option(name, option, command, keys)
    does = row.does.format(code=code_of(None))
    return f"`{command}` has no option {option}: in {row.library} it {does}", row.command or row.use


def _own_option(name: str, option: str, command: str, keys: Iterable[str]) -> tuple[str, str] | None:
    """Returns the error and the hint for an option that is only an argument in Python; None if it is none."""
    if command.rsplit(" ", 1)[-1] not in ("generate", "chat", "audit"):
        return None
    if name == "num_speculative_tokens":
        return f"`{command}` has no option {option}", "Use --budget"
    if name in keys:
        return f"`{command}` has no option {option}", f"Use --speculative-config '{{\"{name}\": VALUE}}'"
    for place in (SAMPLE, LOAD, CHAT, RUN):
        if name in OWN[place]:
            return f"`{command}` has no option {option}", f"Leave it out. In Python, use {_WRITTEN[place].format(name)}"
    return None
