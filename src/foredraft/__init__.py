"""foredraft: language models generate faster without changing what they generate.

Public names are imported when they are first used, so that `foredraft --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foredraft.decode import Logprob as Logprob
    from foredraft.drafters import DRAFTERS as DRAFTERS
    from foredraft.draws import Draws as Draws
    from foredraft.engine import CompletionOutput as CompletionOutput
    from foredraft.engine import RequestOutput as RequestOutput
    from foredraft.grow import GROWERS as GROWERS
    from foredraft.llm import LLM as LLM
    from foredraft.metrics import Metrics as Metrics
    from foredraft.params import SamplingParams as SamplingParams
    from foredraft.protocols import Verdict as Verdict
    from foredraft.sampling import TargetLaw as TargetLaw
    from foredraft.tree import DraftTree as DraftTree
    from foredraft.tree import TreeBatch as TreeBatch
    from foredraft.verify import RULES as RULES

_HOMES = {
    "DRAFTERS": "drafters",
    "GROWERS": "grow",
    "RULES": "verify",
    "LLM": "llm",
    "SamplingParams": "params",
    "RequestOutput": "engine",
    "CompletionOutput": "engine",
    "Logprob": "decode",
    "Metrics": "metrics",
    "DraftTree": "tree",
    "TreeBatch": "tree",
    "TargetLaw": "sampling",
    "Verdict": "protocols",
    "Draws": "draws",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'foredraft' has no attribute {name!r}")
    return getattr(import_module(f"foredraft.{_HOMES[name]}"), name)
