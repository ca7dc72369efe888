"""Keyword arguments under names of vLLM, Transformers and the OpenAI API: accepted, ignored or refused as NAMES says."""

from __future__ import annotations

import difflib
import inspect
import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from typing import Any, TypeVar

from foredraft.names import CHAT, DRAFT, LOAD, METHODS, NAMES, RUN, SAMPLE, Name, code_of

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)

_log = logging.getLogger("foredraft")

OWN: dict[str, tuple[str, ...]] = {
    LOAD: (
        "model",
        "speculative_config",
        "tokenizer",
        "dtype",
        "device",
        "max_model_len",
        "max_num_seqs",
        "seed",
        "revision",
        "generation_config",
    ),
    RUN: ("prompts", "sampling_params", "progress"),
    CHAT: (
        "messages",
        "chat_template",
        "chat_template_content_format",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "chat_template_kwargs",
    ),
    DRAFT: ("method", "model", "tree", "num_speculative_tokens", "rule"),
}
"""Our own names by the place that takes them; those of SamplingParams are its fields."""

_WRITTEN = {
    LOAD: "LLM(model, {}=...)",
    SAMPLE: "generate(prompts, SamplingParams({}=...))",
    RUN: "LLM.generate({}=...)",
    CHAT: "LLM.chat(messages, {}=...)",
    DRAFT: "LLM(model, speculative_config={{'{}': ...}})",
}
"""How an argument is given, by place."""


def takes_other_names(place: str, more: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """A decorator: the function takes the names that `place` has in NAMES, too.

    Args:
        place: where the function's arguments are in NAMES.
        more: what the function takes as ``**more``.
    """

    def decorate(function: _Function) -> _Function:
        signature, said = inspect.signature(function), function.__qualname__.removesuffix(".__init__")
        kinds = {one.name: one.kind for one in signature.parameters.values()}
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
    """The same for a class whose ``__init__`` is generated."""

    def decorate(cls: _Class) -> _Class:
        cls.__init__ = takes_other_names(place)(cls.__init__)  # type: ignore[misc]
        return cls

    return decorate


def config_with_our_names(config: Mapping[Any, Any], *, command: bool = False) -> dict[Any, Any]:
    """A speculative config under our own names; keys that no library has are left as they are.

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
    place: str,
    others: Mapping[str, Any],
    given: Mapping[Any, Any],
    *,
    own: Iterable[str],
    said: str,
    command: bool = False,
) -> dict[str, Any]:
    """Checks arguments that a function does not have; returns those that it has under another name, by that name.

    Args:
        place: where the function's arguments are in NAMES.
        others: the arguments.
        given: the function's own arguments, as far as they are given.
        own: names of all of them.
        said: how the function is called in messages.
        command: whether the arguments come from the command line.

    Raises:
        TypeError: one of `others` cannot be accepted; the message says what it is elsewhere and what to use here.
    """
    ours, ignored = {}, []
    for name, value in others.items():
        row = NAMES.get(name)
        if row is None or place not in row.places or (row.means and row.means not in own):
            raise _misplaced(name, value, row, given, own=own, said=said, command=command)
        if not row.accepts(value, given):
            raise _refused(name, value, row, given, command=command)
        if row.means in given or row.means in ours:
            raise TypeError(f"{name} and {row.means} are one argument of {said}, and both are given. Give one of them")
        if row.means:
            ours[row.means] = value
        elif row.ignored and value is not None:
            ignored.append(name)
    if ignored:
        _say_ignored(said, tuple(ignored))
    return ours


@cache
def _say_ignored(said: str, names: tuple[str, ...]) -> None:
    """Cached, so that it is said once."""
    _log.warning("%s ignores %s: elsewhere this changes speed or memory, and never the output", said, ", ".join(names))


def _refused(name: str, value: Any, row: Name, given: Mapping[Any, Any], *, command: bool) -> TypeError:
    does = row.does.format(code=code_of(given.get("model")))
    use = (row.command if command else "") or row.use
    return TypeError(f"{name}={reprlib.repr(value)} is not supported: in {row.library} it {does}. {use}")


def _misplaced(
    name: str,
    value: Any,
    row: Name | None,
    given: Mapping[Any, Any],
    *,
    own: Iterable[str],
    said: str,
    command: bool,
) -> TypeError:
    """The error for a name that this place does not have: it has another home, or none."""
    ours = row.means if row and row.means else name
    for place, names in {**OWN, SAMPLE: _sampling_names()}.items():
        if ours in names:
            use = f"--{ours.replace('_', '-')}" if command else _WRITTEN[place].format(ours)
            means = "" if ours == name else f"is {ours} here, and "
            return TypeError(f"{said} does not take {name}: it {means}belongs to {place}. Use {use}")
    if row is not None:
        return _refused(name, value, row, given, command=command)
    near = difflib.get_close_matches(name, [*own], n=1, cutoff=0.5)
    meant = f"Did you mean {near[0]!r}? " if near else ""
    return TypeError(f"{said} takes no argument {name!r}. {meant}It takes {', '.join(sorted(own))}")


def _sampling_names() -> list[str]:
    from foredraft.params import SamplingParams  # which is made with this module

    return SamplingParams.names()


def option_advice(option: str, command: str) -> tuple[str, str] | None:
    """What is wrong with an option that no command has, and what to use instead; None where the name is not known.

    Args:
        option: as it was given, such as ``--tensor-parallel-size``.
        command: the command, such as ``foredraft generate``.
    """
    row = NAMES.get(option.lstrip("-").replace("-", "_"))
    if row is None:
        return None
    does = row.does.format(code=code_of(None))
    return f"`{command}` has no option {option}: in {row.library} it {does}", row.command or row.use
