"""Every drafter, tree and rule as plain data: what ``foredraft methods`` lists."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from foredraft.drafters import DRAFTERS
from foredraft.engine import CompletionOutput
from foredraft.grow import GROWERS
from foredraft.speculation import fits, fitting_rules, trees_of
from foredraft.tree import Drawn
from foredraft.verify import RULES

_ANY_PROPOSAL = "lossless with every exact rule: what is proposed changes the speed, never the law of the output"


def tables() -> dict[str, list[dict[str, Any]]]:
    """The three tables, JSON-able: ``drafters``, ``trees`` and ``rules``, each row with name, guarantee and source.

    A tree's `drawn` is at temperatures above 0. At 0 its children are the likeliest tokens and nothing is sampled
    (unless ``draft_sampling`` says so), which every exact rule takes as well.
    """
    return {
        "drafters": [_drafter(name) for name in DRAFTERS],
        "trees": [_tree(name) for name in GROWERS],
        "rules": [_rule(name) for name in RULES],
    }


def tree_as_dict(completion: CompletionOutput | None) -> dict[str, Any] | None:
    """The tree of the latest step as plain data; None where nothing was drafted."""
    tree = completion.last_tree if completion is not None else None
    if completion is None or tree is None:
        return None
    return {"token_ids": tree.tokens.tolist(), "parents": tree.parents.tolist(), "accepted_path": completion.last_path}


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
        "options": {one.name: one.default for one in fields(row.grower)},
        "source": row.source,
    }


def _rule(name: str) -> dict[str, Any]:
    row = RULES[name]
    return {
        "name": name,
        "guarantee": row.guarantee,
        "drawn": [one.name.lower() for one in Drawn if one in row.drawn],
        "chains_only": row.chains_only,
        "trees": [tree for tree, grower in GROWERS.items() if fits(row, grower.drawn, grower.chains_only)],
        "options": list(row.options),
        "source": row.source,
    }
