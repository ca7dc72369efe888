"""All drafters, trees and rules as plain data, which ``foredraft methods`` prints. Does not import torch."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from dataclasses import fields
from typing import Any

from foredraft.core.errors import speaks_unicode
from foredraft.core.shape import Drawn
from foredraft.drafters import DRAFTERS
from foredraft.plan.config import fits, fitting_rules, trees_of
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


def command(*, as_json: bool) -> None:
    """Runs ``foredraft methods``."""
    if as_json:
        print(json.dumps(tables(), ensure_ascii=not speaks_unicode(sys.stdout)))
    else:
        print_tables(tables())


def print_tables(tables: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the result of `tables`: for each row its name, its source, and the facts to choose by."""
    shown = {
        "drafters": ("trees", "options"),
        "trees": ("drawn", "rules", "options"),
        "rules": ("guarantee", "trees", "options"),
    }
    trees = [row["name"] for row in tables["trees"]]
    width, indent = min(shutil.get_terminal_size().columns, 130), " " * 21
    for title, rows in tables.items():
        print(title)
        for row in rows:
            facts = {column: _fact(row, column, trees) for column in shown[title]}
            lines = [row["source"], *(f"{column}: {fact}" for column, fact in facts.items() if fact)]
            wrapped = [part for line in lines for part in textwrap.wrap(line, max(20, width - len(indent)))]
            print(f"  {row['name']:<{len(indent) - 3}}", f"\n{indent}".join(wrapped))
        print()
    for title in ("drafters", "trees"):
        print(f"guarantee of {title}: {tables[title][0]['guarantee']}")
    print("Method ar drafts nothing (plain decoding). The default rule of a tree need not be the first: see --json.")


def _fact(row: dict[str, Any], column: str, trees: list[str]) -> str:
    value = row[column]
    if column == "trees" and "gives" in row:
        named = "every tree" if value == trees else ", ".join(value)
        return " or ".join(filter(None, ("its own" if row["own_tree"] else "", named)))
    if isinstance(value, dict):
        return ", ".join(f"{name}={default}" for name, default in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
