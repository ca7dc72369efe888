"""``foredraft methods``: lists the tables of drafters, trees and rules."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Any

from foredraft.cli.options import AsJson


def methods(*, as_json: AsJson = False) -> None:
    """List all drafters, trees and rules, each with its guarantee and source."""
    from foredraft.core.errors import speaks_unicode
    from foredraft.plan.tables import tables

    if as_json:
        print(json.dumps(tables(), ensure_ascii=not speaks_unicode(sys.stdout)))
    else:
        _print(tables())


def _print(tables: dict[str, list[dict[str, Any]]]) -> None:
    """Prints for each row its name, its source, and the facts to choose by."""
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
