"""All drafters, trees and rules as plain data, which ``foredraft methods`` prints. Does not import torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from foredraft.core.shape import Drawn
from foredraft.drafters import DRAFTERS
from foredraft.plan.speculation import fits, fitting_rules, trees_of
from foredraft.rules import RULES
from foredraft.trees import GROWERS

_ANY_PROPOSAL = "lossless with every exact rule: proposals change the speed, never the distribution of the output"


def tables() -> dict[str, list[dict[str, Any]]]:
    """Returns the tables ``drafters``, ``trees`` and ``rules`` as JSON-compatible data.

    Each row has a name, a guarantee and a source. ``drawn`` of a tree applies to temperatures above 0. At temperature 0, its
    children are the most likely tokens, and nothing is sampled unless ``draft_sampling`` requests it. Every exact rule
    accepts such trees too.
    """
    return {
        "drafters": [_drafter(name) for name in DRAFTERS],
        "trees": [_tree(name) for name in GROWERS],
        "rules": [_rule(name) for name in RULES],
    }


def _drafter(name: str) -> dict[str, Any]:
    row = DRAFTERS[name]
    fitting = [tree for tree in trees_of(row) if tree]
    found: dict[str, Any] = {"name": name, "guarantee": _ANY_PROPOSAL, "gives": row.gives, "trees": fitting}
    found |= {"own_tree": row.makes_own}
    if row.makes_own:
        found |= {"rules": fitting_rules(row), "default_rule": "deterministic"}
    return found | {"options": list(row.options), "source": row.source}


def _tree(name: str) -> dict[str, Any]:
    row = GROWERS[name]
    return {
        "name": name,
        "guarantee": _ANY_PROPOSAL,
        "drawn": row.drawn.name.lower(),
        "chains_only": row.chains_only,
        "needs": row.needs,
        "rules": fitting_rules(row),
        "default_rule": row.rule,
        "options": {option.name: option.default for option in fields(row.grower)},
        "source": row.source,
    }


def _rule(name: str) -> dict[str, Any]:
    row = RULES[name]
    return {
        "name": name,
        "guarantee": row.guarantee,
        "drawn": [drawn.name.lower() for drawn in Drawn if drawn in row.drawn],
        "chains_only": row.chains_only,
        "trees": [tree for tree, grower in GROWERS.items() if fits(row, grower.drawn, grower.chains_only)],
        "options": list(row.options),
        "source": row.source,
    }
