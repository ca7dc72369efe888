"""Run-time type checks at a third of their price: what jaxtyping checks, without what it does besides.

Under pytest, jaxtyping wraps every function of the package. In each call it binds the arguments, opens a scope for the sizes of
arrays even where the annotations name no array, and checks every argument twice, before and after the function runs. `jaxtyped`
takes the place of `jaxtyping.jaxtyped`: beartype checks each value once, in a scope where there are arrays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

by_jaxtyping = jaxtyping.jaxtyped
check = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """What the import hook of jaxtyping decorates every function and class with."""
    if function is None:
        return partial(jaxtyped, typechecker=typechecker)
    if isinstance(function, classmethod | staticmethod):
        return type(function)(jaxtyped(function.__func__, typechecker=typechecker))
    if isinstance(function, property):
        parts = (function.fget, function.fset, function.fdel)
        return property(*(part and jaxtyped(part, typechecker=typechecker) for part in parts))
    if isinstance(function, type) and "__dataclass_fields__" in vars(function) and is_usual(vars(function).get("__init__")):
        function.__init__ = checked_once(function.__init__)  # type: ignore[misc]
        return function
    return checked_once(function) if is_usual(function) else by_jaxtyping(function, typechecker=typechecker)


def is_usual(function: Any) -> bool:
    """Whether it is a function that returns its value at once and that nothing has wrapped."""
    lazy = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    return not function.__code__.co_flags & lazy


def checked_once(function: Any) -> Callable[..., Any]:
    """The function with its types checked, unless `jaxtyping_disable` is set when it is called."""
    checked, config = None, jaxtyping.config

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        nonlocal checked
        if config.jaxtyping_disable:
            return function(*arguments, **options)
        if checked is None:  # at the first call: many are never called, and inner functions are made again and again
            checked = with_checks(function)
        return checked(*arguments, **options)

    return called


def with_checks(function: FunctionType) -> Callable[..., Any]:
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    for name in ("__kwdefaults__", "__qualname__", "__module__"):
        setattr(copy, name, getattr(function, name))
    copy.__annotations__ = annotations_of(function)
    checked = check(copy)

    def scoped(*arguments: Any, **options: Any) -> Any:
        with by_jaxtyping("context"):
            return checked(*arguments, **options)

    return scoped if any(map(names_an_array, copy.__annotations__.values())) else checked


def annotations_of(function: FunctionType) -> dict[str, Any]:
    """As jaxtyping reads them: one that the names of the module do not explain is not checked."""
    if not all(isinstance(one, str) for one in function.__annotations__.values()):
        return understood(function.__annotations__, function.__globals__)
    if function.__code__ not in KNOWN:
        KNOWN[function.__code__] = understood(function.__annotations__, function.__globals__)
    return dict(KNOWN[function.__code__])


KNOWN: dict[CodeType, dict[str, Any]] = {}


def understood(annotations: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, annotation in annotations.items():
        one: Any = lambda: None  # noqa: E731
        one.__annotations__ = {"value": annotation}
        try:
            found[name] = get_type_hints(one, names, include_extras=True)["value"]
        except Exception:
            continue
    return found


def names_an_array(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(names_an_array, get_args(annotation)))
