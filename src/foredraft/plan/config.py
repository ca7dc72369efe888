"""Interprets a ``speculative_config``: drafter, tree and rule are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from foredraft.core.arguments import config_with_our_names
from foredraft.core.errors import shown, unknown_name
from foredraft.core.folders import BUNDLED_HEAD
from foredraft.core.names import METHODS_ELSEWHERE
from foredraft.core.shape import MAX_DEPTH, MAX_NODES, Budget, Drawn
from foredraft.drafters import DRAFTERS, DrafterRow
from foredraft.drafters.options import check_options
from foredraft.heads.about import method_of
from foredraft.rules import RULES, RuleRow
from foredraft.trees import GROWERS, GrowerRow
from foredraft.trees.limits import check_sizes, plain_values
from foredraft.trees.options import Options

PLAIN = "ar"
"""The method that drafts nothing."""
AUTO = "auto"
"""This value leaves the choice of method, tree or budget to measurements."""

KINDS = ("greedy", "sampled")
"""Kinds of requests: temperature 0 (greedy) and above 0 (sampled). Each kind has its own choice."""

_COMMON = ("method", "model", "tree", "num_speculative_tokens", "rule", "retime")


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
        names = (
            [self.drafter]
            if self.drafter != AUTO
            else [
                name
                for name, row in DRAFTERS.items()
                if row.weights is None or (has_model and self.weights_for in (name, row.asks))
            ]
        )
        ways = [Way(name, tree) for name in names for tree in self._trees(DRAFTERS[name])]
        if not ways:
            raise ValueError(
                f"tree {self.tree!r} needs the laws of a draft model or a head, and none is given. Give 'model' "
                "(--draft-model), or leave 'tree' (--tree) out"
            )
        return ways

    def _trees(self, drafter: DrafterRow) -> list[str | None]:
        able = trees_of(drafter)
        wanted = able if self.tree == AUTO else [self.tree]
        return [
            name
            for name in able
            if name in wanted and self.rule_name in (None, *fitting_rules(GROWERS[name] if name else drafter))
        ]

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
        known = {key: value for key, value in defaults.items() if key in _option_names(cls)}
        return _construct(cls, {**known, **self.grower_options})


def parse(config: Any) -> Speculation | None:
    """Checks a speculative config. Returns None for the method that drafts nothing.

    Raises:
        ValueError: a method, tree, rule or key is unknown (the message suggests the most similar name), the budget is out of
            range, the drafter cannot grow the tree, or the rule is not exact for the tree.
        TypeError: the config is not a mapping, or a value has the wrong type.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"speculative_config must be a dict such as {{'method': 'lm', 'model': 'DIR'}}, got {shown(config)}")
    config = config_with_our_names(plain_values(config))
    for key in ("method", "tree", "rule"):
        if not isinstance(config.get(key), str | None):
            raise TypeError(f"{key} must be a name, got {config[key]!r}; `foredraft methods` lists them")
    _check_model(config.get("model"))
    weights_for = drafter_for(config.get("model"))
    method = config.get("method") or weights_for
    if method == PLAIN:
        return _check_unused(config)
    if method not in (*DRAFTERS, AUTO):
        raise _no_method(method)
    drafter = DRAFTERS[weights_for if method == AUTO else method]  # the drafter with the most options
    nodes = config.get("num_speculative_tokens")
    tree, grower = _named_tree(method, drafter, config.get("tree"))
    policy = grower.grower if grower else Options if tree == AUTO else None
    of_rule = RULES[config["rule"]].options if config.get("rule") in RULES else ()
    allowed = [*_COMMON, *drafter.options, *(_option_names(policy) if policy else []), *of_rule]
    what = f"method {method!r}" + (f" and tree {tree!r}" if grower else "")
    for key in config:
        if key not in allowed:
            raise unknown_name(f"key of speculative_config for {what}:", key, allowed)
    if drafter.weights is None and config.get("model") is not None:
        raise ValueError(
            f"'model' (--draft-model) does not belong to method {method!r}, which has no weights. Leave it out, or use a "
            f"method that has them: {', '.join(name for name, row in DRAFTERS.items() if row.weights)}"
        )
    check_sizes(config)
    drafter_options = {key: config[key] for key in drafter.options if key in config}
    _check_types(drafter.option_types(), drafter_options)
    check_options(**drafter_options)
    grower_options = {key: value for key, value in config.items() if policy and key in _option_names(policy)}
    if policy:
        _construct(policy, grower_options)  # reports invalid options now
    found = Speculation(
        drafter=method,
        weights_for=weights_for,
        tree=tree,
        rule_name=_named_rule(method, drafter, tree, grower, config.get("rule")),
        budget=None if nodes in (None, AUTO) else _budget(nodes),
        model=config.get("model"),
        drafter_options=drafter_options,
        grower_options=grower_options,
        rule_options=_rule_options({key: config[key] for key in of_rule if key in config}),
        retime=_flag("retime", config.get("retime", False)),
    )
    if found.retime and not found.is_open:
        raise ValueError("retime repeats the timing for open choices, and this config leaves nothing open. Remove retime")
    return found


def _no_method(name: str) -> ValueError:
    for kind, table in (("tree", GROWERS), ("rule", RULES)):
        if name in table:
            return ValueError(f"{name!r} is a {kind}, not a method. Use {kind!r}: {name!r} (--{kind} {name}) with a method")
    if name in METHODS_ELSEWHERE:
        return ValueError(f"method {name!r} {METHODS_ELSEWHERE[name]}. Use a method of `foredraft methods`")
    if name.lower() in DRAFTERS:
        return unknown_name("method", name, [*DRAFTERS, AUTO, PLAIN], meant=name.lower())
    return unknown_name("method", name, [*DRAFTERS, AUTO, PLAIN])


def _check_model(model: Any) -> None:
    """Checks that what JSON can hold names a draft model; a loaded one is checked when it is used."""
    if isinstance(model, bool | int | float | bytes | Mapping | Sequence) and not (isinstance(model, str) and model):
        raise TypeError(
            f"'model' (--draft-model) must be the directory or the Hub id of a draft model, got {shown(model)}. "
            "Leave it out, or give one"
        )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {shown(value)}. Leave it out for false")
    return value


def usual_config(config: Any, *, bundled: bool) -> Any:
    """Adds the defaults of `LLM` to a config.

    For the bundled target, these are method ``auto`` and the bundled head. For any other target, it is method ``suffix``.
    """
    if config is None:
        config = {"method": AUTO if bundled else "suffix"}
    if bundled and isinstance(config, Mapping) and config.get("method") in (None, AUTO) and config.get("model") is None:
        return {**config, "model": str(BUNDLED_HEAD)}
    return config


def drafter_for(model: Any) -> str:
    """Name of the drafter that uses a model: the method of the head if it is a directory of one, else ``lm``."""
    folder = Path(model) if isinstance(model, str | Path) else None
    if folder is None or not (folder / "config.json").is_file():
        return "lm"
    method = method_of(folder)
    return method if method in DRAFTERS else "lm"


def _rule_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    _check_types({"epsilon": float}, options)
    if options.get("epsilon", 0) < 0:
        raise ValueError(f"epsilon must be 0 (lossless) or more, got {options['epsilon']}")
    return options


def option_names() -> list[str]:
    """Returns all keys that a speculative config may hold for some method, tree or rule."""
    known = [*_COMMON, *(name for row in DRAFTERS.values() for name in row.options)]
    known += [name for row in GROWERS.values() for name in _option_names(row.grower)]
    return [*dict.fromkeys(known + [name for row in RULES.values() for name in row.options])]


def _check_unused(config: Mapping[str, Any]) -> None:
    """Refuses all keys for plain decoding, which has none. For a misspelt key, the error suggests the right name."""
    known = option_names()
    tables = {"tree": GROWERS, "rule": RULES}
    for key, value in config.items():
        if key not in known:
            raise unknown_name("key of speculative_config:", key, known)
        if value not in (None, AUTO) and value not in tables.get(key, [value]):
            raise unknown_name(key, value, tables[key])
        if key != "method" and value not in (None, AUTO, False):
            raise ValueError(
                f"{key!r} does not belong to method {PLAIN!r}, which drafts nothing. Leave it out, or use a method that drafts"
            )


def _named_tree(method: str, drafter: DrafterRow, tree: str | None) -> tuple[str | None, GrowerRow | None]:
    fitting = [name for name in trees_of(drafter) if name]
    if tree is None and drafter.makes_own and method != AUTO:
        return None, None
    if tree in (None, AUTO):
        return (AUTO, None) if fitting else (None, None)
    if tree not in GROWERS:
        raise unknown_name("tree", tree, [*(fitting or GROWERS), AUTO])
    if tree not in fitting:
        can = f"it can grow {', '.join(fitting)}" if fitting else "it makes its own tree: leave 'tree' out"
        raise ValueError(f"method {method!r} cannot grow tree {tree!r}; {can}")
    return tree, GROWERS[tree]


def _named_rule(method: str, drafter: DrafterRow, tree: str | None, grower: GrowerRow | None, rule: str | None) -> str | None:
    """Name of the given rule, else of the best exact rule for the tree; None if the tree is not known yet."""
    fitting = fitting_rules(grower or drafter) if tree != AUTO else list(RULES)
    if rule is not None and rule not in RULES:
        raise unknown_name("rule", rule, fitting)
    if tree == AUTO:
        return rule
    if rule is None:
        return grower.rule if grower else "deterministic"
    if rule not in fitting:
        what = f"tree {tree!r}" if tree else f"the tree of method {method!r}"
        named = [f"{name} (lossy)" if RULES[name].guarantee.startswith("lossy") else name for name in fitting]
        raise ValueError(f"rule {rule!r} is not exact for {what}; rules that can be used with it: {', '.join(named)}")
    return rule


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


def _budget(nodes: Any) -> Budget:
    if isinstance(nodes, bool) or not isinstance(nodes, int):
        raise TypeError(
            f"num_speculative_tokens must be a whole number or {AUTO!r}, got {shown(nodes)}. Leave it out to have it chosen"
        )
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(
            f"num_speculative_tokens (--budget) must be between 1 and {MAX_NODES}, got {shown(nodes)}. "
            f"To draft nothing use method {PLAIN!r}"
        )
    return Budget(nodes, min(nodes, MAX_DEPTH))


def _option_names(cls: type[Options]) -> list[str]:
    return [option.name for option in fields(cls)]


def _construct(cls: type[Options], options: Mapping[str, Any]) -> Options:
    _check_types(get_type_hints(cls), options)
    return cls(**options)


def _check_types(hints: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if not _is_of(hints[name], value):
            raise TypeError(f"{name} must be {_spell(hints[name])}, got {value!r}; `foredraft methods` lists every option")


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
