"""A checked speculative config: what is drafted, and what is left open. Says which drafters, trees and rules fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from foredraft.core.errors import UserError, UserTypeError
from foredraft.core.params import SamplingParams
from foredraft.core.shape import Budget, Drawn
from foredraft.drafters import DRAFTERS, DrafterRow
from foredraft.rules import RULES, RuleRow
from foredraft.trees import GROWERS, GrowerRow
from foredraft.trees.options import Options

PLAIN = "ar"
"""The method that drafts nothing."""
AUTO = "auto"
"""This value leaves the choice of method, tree or budget to measurements."""

KINDS = {"greedy": 0.0, "sampled": 1.0}
"""Kinds of requests, each with the temperature at which it is measured. Requests above temperature 0 are sampled. Each kind has
its own choice."""


def kind_of(sampling: SamplingParams) -> str:
    """Returns the kind of a request, one of `KINDS`."""
    return "sampled" if sampling.temperature > 0 else "greedy"


class Way(NamedTuple):
    """A drafter and its tree policy. `tree` is None if the drafter makes its own tree."""

    drafter: str
    tree: str | None


@dataclass(frozen=True)
class Speculation:
    """A checked speculative config.

    Attributes:
        drafter: name in DRAFTERS; `AUTO` leaves the choice open.
        weights_for: the drafter for which the model was made. With drafter `AUTO`, only this drafter, its ``-lookup`` variant
            and drafters without weights can be chosen.
        tree: name in GROWERS; `AUTO` leaves the choice open; None if the drafter makes its own tree.
        rule_name: name in RULES; None selects the best exact rule for the chosen tree.
        budget: the largest tree; None leaves the choice open.
        model: the value of the config key ``model``.
        drafter_options, grower_options, rule_options: the other keys of the config.
        retime: whether the open choices are timed again although a stored choice exists.
    """

    drafter: str
    weights_for: str
    tree: str | None
    rule_name: str | None
    budget: Budget | None
    model: Any
    drafter_options: Mapping[str, Any]
    grower_options: Mapping[str, Any]
    rule_options: Mapping[str, Any]
    retime: bool = False

    def ways(self, *, has_model: bool) -> list[Way]:
        """The ways to choose from. Without a draft model, only drafters without weights."""
        made_for = self.weights_for if has_model else ""
        usable = [name for name, row in DRAFTERS.items() if row.weights is None or made_for in (name, row.asks)]
        names = usable if self.drafter == AUTO else [self.drafter]
        ways = [Way(name, tree) for name in names for tree in self._trees(DRAFTERS[name])]
        if not ways:
            raise UserError(
                f"tree {self.tree!r} needs the laws of a draft model or a head, and none is given",
                "Give 'model' (--draft-model), or leave 'tree' (--tree) out",
            )
        return ways

    def _trees(self, drafter: DrafterRow) -> list[str | None]:
        able = [name for name in trees_of(drafter) if self.tree in (AUTO, name)]
        return [name for name in able if self.rule_name in (None, *fitting_rules(GROWERS[name] if name else drafter))]

    @property
    def calibrated(self) -> str:
        """Name of the drafter whose calibration applies."""
        name = self.weights_for if self.drafter == AUTO else self.drafter
        return DRAFTERS[name].asks or name

    @property
    def needs_model(self) -> bool:
        """Whether the config can use a draft model or a head."""
        return self.drafter == AUTO or DRAFTERS[self.drafter].weights is not None

    @property
    def is_open(self) -> bool:
        """Whether drafter, tree or budget must still be chosen."""
        return AUTO in (self.drafter, self.tree) or self.budget is None

    def rule_name_for(self, tree: str | None) -> str:
        """Name of the rule that verifies `tree`."""
        return self.rule_name or (GROWERS[tree].rule if tree else "deterministic")

    def rule_for(self, tree: str | None) -> Callable[..., Any]:
        """The rule that verifies `tree`, with its options."""
        return RULES[self.rule_name_for(tree)].with_options(**self.rule_options)

    def grower(self, tree: str | None, defaults: Mapping[str, Any]) -> Any:
        """The policy of a tree; None for the drafter's own tree.

        Args:
            defaults: options measured for the drafter; they apply to options that the user did not set.
        """
        if tree is None:
            return None
        cls = GROWERS[tree].grower
        known = {key: value for key, value in defaults.items() if key in names_of(cls)}
        return construct(cls, {**known, **self.grower_options})


def trees_of(drafter: DrafterRow) -> list[str | None]:
    """Names of the trees that a drafter can grow; None stands for its own tree."""
    grown = [name for name, row in GROWERS.items() if row.needs == drafter.gives]
    return [*grown, None] if drafter.makes_own else [*grown]


def fitting_rules(row: GrowerRow | DrafterRow) -> list[str]:
    """Names of the rules that may verify the trees of a grower, or the own tree of a drafter."""
    drawn = row.drawn if isinstance(row, GrowerRow) else Drawn.DETERMINISTIC
    return [name for name, rule in RULES.items() if fits(rule, drawn, row.chains_only)]


def fits(rule: RuleRow, drawn: Drawn, chains_only: bool) -> bool:
    """Whether `rule` may verify trees drawn this way. A single child counts as drawn both with and without replacement."""
    single = chains_only and drawn is not Drawn.DETERMINISTIC and Drawn.IID in rule.drawn
    return (drawn in rule.drawn or single) and (chains_only or not rule.chains_only)


def names_of(cls: type[Options]) -> list[str]:
    """Returns the names of a tree's options."""
    return [option.name for option in fields(cls)]


def construct(cls: type[Options], options: Mapping[str, Any]) -> Options:
    """Builds the options of a tree.

    Raises:
        ValueError: a value is not allowed.
        TypeError: a value has a wrong type.
    """
    check_types(get_type_hints(cls), options)
    return cls(**options)


def check_types(hints: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Checks the types of options.

    Raises:
        TypeError: a value has a wrong type.
    """
    for name, value in options.items():
        if not _is_of(hints[name], value):
            raise UserTypeError(
                f"{name} must be {_spell(hints[name])}, got {value!r}", "`foredraft methods` lists every option"
            )


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value from JSON matches an annotated type. A whole number also matches float; a bool matches only bool."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(member, value) for member in inner)
    if hint is Any or isinstance(value, bool):
        return hint in (Any, bool)
    if kind is None:
        return isinstance(value, (int, float) if hint is float else hint)
    if isinstance(value, str) or not isinstance(value, kind):
        return False
    return all(_is_of(inner[-1], item) for item in (value.values() if isinstance(value, Mapping) else value))


def _spell(hint: Any) -> str:
    """Describes a type in words for a message."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(_spell(member) for member in inner if member is not int or float not in inner))
    if kind is not None:
        return f"a list (each {_spell(inner[0])})" if issubclass(kind, Sequence) else "an object"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}[hint]
