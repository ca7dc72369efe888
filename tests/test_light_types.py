"""The type checks that all tests run under find what jaxtyping finds, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

import light_types
from foredraft.core.law import TargetLaw
from foredraft.core.tree import TreeBatch, ancestor_mask

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]

both = pytest.mark.parametrize("jaxtyped", [light_types.jaxtyped, light_types.by_jaxtyping], ids=["light", "jaxtyping"])
ONES = torch.ones(2, 3)


def plain(count: int, names: list[str] | None = None, *more: float, flag: bool = False) -> str:
    return "ok" if flag is False else flag  # type: ignore[return-value]


def shaped(rows: Float[Tensor, "n v"], ids: Int[Tensor, " n"] | None, size: int = 3) -> Float[Tensor, " v"]:
    return rows[0, :size]


def unknown(what: Unknown, count: int) -> int:
    return count


def lazy(count: int) -> Iterator[Float[Tensor, " n"]]:
    yield "nothing"  # type: ignore[misc]


def wrong(function: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(TypeCheckError):
        function(*arguments, **options)


@both
def test_functions(jaxtyped: Callable[..., Any]) -> None:
    checked = jaxtyped(plain, typechecker=beartype)
    assert (checked.__name__, checked.__doc__, checked.__wrapped__) == ("plain", None, plain)
    assert checked(1, ["a"], 0.5, 1.5) == checked(count=1) == "ok"
    wrong(checked, "1")
    wrong(checked, 1, [1])
    wrong(checked, 1, None, 0.5, "x")
    wrong(checked, 1, flag="yes")
    wrong(checked, 1, flag=True)  # what it returns
    with pytest.raises(TypeError):
        checked()
    some = jaxtyped(unknown, typechecker=beartype)
    assert some("anything", 2) == 2
    wrong(some, "anything", "2")
    made = jaxtyped(lazy, typechecker=beartype)
    assert list(made(1)) == ["nothing"]
    wrong(made, "1")


@both
def test_shapes_agree_with_each_other(jaxtyped: Callable[..., Any]) -> None:
    checked = jaxtyped(shaped, typechecker=beartype)
    for _ in range(2):  # no size of a call is remembered in the next
        assert checked(ONES, torch.tensor([1, 2])).shape == (3,)
        assert checked(torch.ones(4, 5), None, 5).shape == (5,)
    wrong(checked, ONES, torch.tensor([1, 2, 3]))
    wrong(checked, ONES, torch.ones(2))
    wrong(checked, ONES[0], None)
    wrong(checked, ONES, None, 2)  # the row that it returns is shorter than the rows that it was given


@both
def test_classes(jaxtyped: Callable[..., Any]) -> None:
    @dataclass(frozen=True)
    class Law:
        rows: Float[Tensor, "n v"]
        ids: Int[Tensor, " n"]
        name: str = ""

        @property
        def size(self) -> str:
            return 3  # type: ignore[return-value]

    class Other:
        def __init__(self, count: int):
            self.count = count

    law = jaxtyped(Law, typechecker=beartype)
    assert law(ONES, torch.tensor([1, 2])).name == ""
    wrong(law, ONES, torch.tensor([1]))
    wrong(law, ONES, torch.tensor([1, 2]), 3)
    assert jaxtyped(Other, typechecker=beartype)("any").count == "any"  # its methods are decorated one by one
    size = jaxtyped(Law.size, typechecker=beartype)
    wrong(size.fget, law(ONES, torch.tensor([1, 2])))
    for kind in (staticmethod, classmethod):
        found = jaxtyped(kind(plain), typechecker=beartype)
        assert isinstance(found, kind)
        wrong(found.__func__, "1")


@both
def test_checks_can_be_switched_off(jaxtyped: Callable[..., Any]) -> None:
    checked = [jaxtyped(one, typechecker=beartype) for one in (plain, shaped)]
    jaxtyping.config.update("jaxtyping_disable", True)
    assert checked[0]("1") == "ok"
    assert checked[1](torch.ones(2, 3, 4), None).shape == (3, 4)


def test_the_package_is_checked() -> None:
    """In plain functions, in those that name arrays, and in classes."""
    wrong(TreeBatch.chains, [["a"]])
    wrong(ancestor_mask, ONES)
    wrong(TargetLaw, ONES[0], None)
