"""Interprets a ``speculative_config``: drafter, tree and rule are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foredraft.core.arguments import config_with_our_names
from foredraft.core.errors import UserError, UserTypeError, shown, unknown_name
from foredraft.core.folders import BUNDLED, BUNDLED_HEAD, BUNDLED_LM
from foredraft.core.names import METHODS_ELSEWHERE
from foredraft.core.shape import MAX_DEPTH, MAX_NODES, Budget
from foredraft.drafters import DRAFTERS, DrafterRow
from foredraft.drafters.options import check_options
from foredraft.heads.about import method_of
from foredraft.plan.speculation import AUTO, PLAIN, Speculation, check_types, construct, fitting_rules, names_of, trees_of
from foredraft.rules import RULES
from foredraft.trees import GROWERS, GrowerRow
from foredraft.trees.limits import check_sizes, plain_values
from foredraft.trees.options import Options

USUAL_TREE = "dyspec"
"""The tree of an audit if the user names none."""

_COMMON = ("method", "model", "tree", "num_speculative_tokens", "rule", "retime")


def parse(config: Any) -> Speculation | None:
    """Checks a speculative config. Returns None for the method that drafts nothing.

    Raises:
        ValueError: a method, tree, rule or key is unknown (the message suggests the most similar name), the budget is out of
            range, the drafter cannot grow the tree, or the rule is not exact for the tree.
        TypeError: the config is not a mapping, or a value has the wrong type.
    """
    if not isinstance(config, Mapping):
        raise UserTypeError(
            f"speculative_config must be a dict such as {{'method': 'lm', 'model': 'DIR'}}, got {shown(config)}"
        )
    config = config_with_our_names(plain_values(config))
    for key in ("method", "tree", "rule"):
        if not isinstance(config.get(key), str | None):
            raise UserTypeError(f"{key} must be a name, got {config[key]!r}", "`foredraft methods` lists them")
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
    allowed = [*_COMMON, *drafter.options, *(names_of(policy) if policy else []), *of_rule]
    what = f"method {method!r}" + (f" and tree {tree!r}" if grower else "")
    for key in config:
        if key not in allowed:
            raise unknown_name(f"key of speculative_config for {what}:", key, allowed)
    if drafter.weights is None and config.get("model") is not None:
        raise UserError(
            f"'model' (--draft-model) does not belong to method {method!r}, which has no weights",
            f"Leave it out, or use a method that has them: {', '.join(name for name, row in DRAFTERS.items() if row.weights)}",
        )
    check_sizes(config)
    drafter_options = {key: config[key] for key in drafter.options if key in config}
    check_types(drafter.option_types(), drafter_options)
    check_options(**drafter_options)
    grower_options = {key: value for key, value in config.items() if policy and key in names_of(policy)}
    if policy:
        construct(policy, grower_options)  # reports invalid options now
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
        raise UserError("retime repeats the timing for open choices, and this config leaves nothing open", "Remove retime")
    return found


def _no_method(name: str) -> UserError:
    for kind, table in (("tree", GROWERS), ("rule", RULES)):
        if name in table:
            return UserError(f"{name!r} is a {kind}, not a method", f"Use {kind!r}: {name!r} (--{kind} {name}) with a method")
    if name in METHODS_ELSEWHERE:
        return UserError(f"method {name!r} {METHODS_ELSEWHERE[name]}", "Use a method of `foredraft methods`")
    return unknown_name("method", name, [*DRAFTERS, AUTO, PLAIN], meant=name.lower() if name.lower() in DRAFTERS else None)


def _check_model(model: Any) -> None:
    """Checks that what JSON can hold names a draft model; a loaded one is checked when it is used."""
    if isinstance(model, bool | int | float | bytes | Mapping | Sequence) and not (isinstance(model, str) and model):
        raise UserTypeError(
            f"'model' (--draft-model) must be the directory or the Hub id of a draft model, got {shown(model)}",
            "Leave it out, or give one",
        )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserTypeError(f"{name} must be true or false, got {shown(value)}", "Leave it out for false")
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


def with_usual_method(config: Mapping[str, Any], *, bundled: bool) -> dict[str, Any]:
    """Adds a method to a config of the command line that names none.

    If the config is empty, it is the usual method of `LLM`. Else it is the drafter that uses the config's draft model. It is
    ``suffix`` if the target is not the bundled one, and neither a draft model nor a tree is named.

    Args:
        bundled: whether the target is the bundled one.
    """
    if not config:
        return {"method": AUTO if bundled else "suffix"}
    has_draft_model = bundled or "model" in config or "tree" in config
    return {"method": drafter_for(config.get("model")) if has_draft_model else "suffix", **config}


def with_usual_tree(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the usual tree of an audit to a config that names neither tree nor rule, if its drafter uses a tree policy."""
    if config.get("method") == PLAIN:  # it takes no budget; the audit reports that there is nothing to audit
        return {key: value for key, value in config.items() if key != "num_speculative_tokens"}
    row = DRAFTERS.get(config.get("method", ""))
    is_open = row is not None and not row.makes_own and not {"tree", "rule"} & set(config)
    return {**config, "tree": USUAL_TREE} if is_open else dict(config)


def drafter_alone(model: Any, method: str | None = None) -> dict[str, Any]:
    """Returns the config of a drafter with its draft model, and without a lookup before it.

    Args:
        model: the draft model or head; None for the bundled one.
        method: name of the drafter. None is the drafter that uses `model`. A ``-lookup`` method is its fallback drafter.
    """
    name = method or drafter_for(model)
    fallback = DRAFTERS[name].asks if name in DRAFTERS else None
    return {"method": fallback or name} | ({"model": model} if model else {})


def can_use(method: str, model: Any) -> bool:
    """Whether a method can use a draft model or a head."""
    return method == AUTO or (method in DRAFTERS and drafter_for(model) in (method, DRAFTERS[method].asks))


def drafter_for(model: Any) -> str:
    """Name of the drafter that uses a model: the method of the head if it is a directory of one, else ``lm``."""
    folder = Path(model) if isinstance(model, str | Path) else None
    if folder is None or not (folder / "config.json").is_file():
        return "lm"
    method = method_of(folder)
    return method if method in DRAFTERS else "lm"


def bundled_drafter(name: str) -> Path | None:
    """Returns the directory of a bundled drafter for the bundled target; None if that drafter is not bundled."""
    row = DRAFTERS[name]
    folder = BUNDLED / (row.asks or name) if row.weights == "head" else BUNDLED_LM
    return folder if folder.is_dir() else None


def _rule_options(options: Mapping[str, Any]) -> Mapping[str, Any]:
    check_types({"epsilon": float}, options)
    if options.get("epsilon", 0) < 0:
        raise UserError(f"epsilon must be 0 (lossless) or more, got {options['epsilon']}")
    return options


def option_names() -> list[str]:
    """Returns all keys that a speculative config may hold for some method, tree or rule."""
    known = [*_COMMON, *(name for row in DRAFTERS.values() for name in row.options)]
    known += [name for row in GROWERS.values() for name in names_of(row.grower)]
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
            raise UserError(
                f"{key!r} does not belong to method {PLAIN!r}, which drafts nothing",
                "Leave it out, or use a method that drafts",
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
        raise UserError(f"method {method!r} cannot grow tree {tree!r}", can)
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
        raise UserError(f"rule {rule!r} is not exact for {what}", f"rules that can be used with it: {', '.join(named)}")
    return rule


def _budget(nodes: Any) -> Budget:
    if isinstance(nodes, bool) or not isinstance(nodes, int):
        raise UserTypeError(
            f"num_speculative_tokens must be a whole number or {AUTO!r}, got {shown(nodes)}", "Leave it out to have it chosen"
        )
    if not 1 <= nodes <= MAX_NODES:
        raise UserError(
            f"num_speculative_tokens (--budget) must be between 1 and {MAX_NODES}, got {shown(nodes)}",
            f"To draft nothing use method {PLAIN!r}",
        )
    return Budget(nodes, min(nodes, MAX_DEPTH))
