"""Options that every tree policy has, checked when they are made. Imports neither torch nor numpy.

The algorithm of a policy is in the module that `Options.code` names. It is imported when a tree is grown.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from foredraft.core.errors import UserError
from foredraft.core.shape import MAX_DEPTH

LARGE_VOCABULARY, LARGE_CUT = 8192, 256
"""Above the first vocabulary size, a draft law keeps the second number of most likely tokens by default. Whole laws would cost
more than the draft model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every tree policy.

    Attributes:
        draft_temperature: temperature of the draft law, above 0. None is the temperature of the request, or 0.6 for a greedy
            request.
        draft_sampling: how children are chosen at temperature 0. ``auto`` takes the most likely tokens, ``sampled`` draws them.
            At temperatures above 0 they are always drawn, unless the policy never draws.
        draft_top_k: number of most likely tokens that the draft law keeps. 0 keeps all. None keeps 256 if the vocabulary is
            larger than 8192, else all.

    Raises:
        ValueError: a value is out of range.
    """

    draft_temperature: float | int | None = None
    draft_sampling: str = "auto"
    draft_top_k: int | None = None

    can_sample: ClassVar[bool] = True
    """Whether the policy draws children. False means that it always takes the most likely tokens."""
    code: ClassVar[str] = ""
    """Module and function of the policy, as ``module:function``."""

    def __post_init__(self) -> None:
        if self.draft_temperature is not None and not self.draft_temperature > 0:
            raise UserError(f"draft_temperature must be above 0 (or None), got {self.draft_temperature}")
        if self.draft_sampling not in ("auto", "sampled"):
            raise UserError(f"draft_sampling must be 'auto' or 'sampled', got {self.draft_sampling!r}")
        if self.draft_top_k is not None and self.draft_top_k < 0:
            raise UserError(f"draft_top_k must be at least 0 (or None), got {self.draft_top_k}")
        for name, depth in self.depths().items():
            if depth is not None and depth > MAX_DEPTH:
                raise UserError(f"{name} must be at most {MAX_DEPTH} deep, got {depth}")

    def depths(self) -> dict[str, int | None]:
        """Returns option -> the depth that it asks for. Each depth is at most `MAX_DEPTH`."""
        return {}

    def cut(self, vocab_size: int) -> int:
        """Returns the number of tokens that a draft law keeps."""
        usual = LARGE_CUT if vocab_size > LARGE_VOCABULARY else 0
        return min(vocab_size, (usual if self.draft_top_k is None else self.draft_top_k) or vocab_size)

    def samples(self, sampling: Any) -> bool:
        """Returns whether a request with these `SamplingParams` draws children. If not, it takes the most likely tokens."""
        return self.can_sample and (self.draft_sampling == "sampled" or sampling.temperature > 0)

    def policy(self, tree: Any) -> Any:
        """Returns the generator that grows one `foredraft.trees.base.Sapling`, see `foredraft.trees.base.Policy`."""
        module, name = self.code.split(":")
        return getattr(import_module(module), name)(self, tree)

    def grow(self, drafter: Any, work: Any) -> Any:
        """Grows one tree per request by this policy; see `foredraft.core.contracts.Grower`."""
        from foredraft.trees.base import grow_batch

        return grow_batch([self] * len(work), drafter, work)
