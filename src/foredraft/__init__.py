"""foredraft: language models generate faster without changing what they generate.

Public names are imported when they are first used, so that `foredraft --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foredraft.async_llm import AsyncLLM as AsyncLLM
    from foredraft.core.contracts import Verdict as Verdict
    from foredraft.core.draws import Draws as Draws
    from foredraft.core.law import TargetLaw as TargetLaw
    from foredraft.core.metrics import Metrics as Metrics
    from foredraft.core.output_kind import RequestOutputKind as RequestOutputKind
    from foredraft.core.outputs import CompletionOutput as CompletionOutput
    from foredraft.core.outputs import Logprob as Logprob
    from foredraft.core.outputs import RequestOutput as RequestOutput
    from foredraft.core.params import SamplingParams as SamplingParams
    from foredraft.core.tree import DraftTree as DraftTree
    from foredraft.core.tree import TreeBatch as TreeBatch
    from foredraft.drafters import DRAFTERS as DRAFTERS
    from foredraft.engine.engine import QueueFullError as QueueFullError
    from foredraft.llm import LLM as LLM
    from foredraft.rules import RULES as RULES
    from foredraft.trees import GROWERS as GROWERS

_HOMES = {
    "DRAFTERS": "drafters",
    "GROWERS": "trees",
    "RULES": "rules",
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "core.params",
    "RequestOutputKind": "core.output_kind",
    "RequestOutput": "core.outputs",
    "CompletionOutput": "core.outputs",
    "Logprob": "core.outputs",
    "QueueFullError": "engine.engine",
    "Metrics": "core.metrics",
    "DraftTree": "core.tree",
    "TreeBatch": "core.tree",
    "TargetLaw": "core.law",
    "Verdict": "core.contracts",
    "Draws": "core.draws",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foredraft' has no attribute {name!r}")
    return getattr(import_module(f"foredraft.{_HOMES[name]}"), name)
