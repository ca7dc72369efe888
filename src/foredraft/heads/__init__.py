"""Modules of trained heads, their layers and their directories. HEADS lists all heads; it does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple


class HeadRow(NamedTuple):
    """One kind of head.

    Attributes:
        code: its module in this package and its class, as ``module:class``.
        options: options of the class that define the method.
        sizes: sizes of the layer that may differ from the target's.
        converted: options that occur in released checkpoints but are not offered for training.
    """

    code: str
    options: Mapping[str, Any]
    sizes: Sequence[str] = ()
    converted: Sequence[str] = ()

    @property
    def cls(self) -> Any:
        """The class of the head."""
        module, name = self.code.split(":")
        return getattr(import_module(f"foredraft.heads.{module}"), name)

    def make(self, shape: Any, **options: Any) -> Any:
        """Builds a head with initial weights.

        Args:
            shape: a `foredraft.heads.layers.Shape`.

        Raises:
            TypeError: the head does not have an option.
        """
        return self.cls(shape, **{**self.options, **options})


_INNER = ("intermediate", "heads", "kv_heads", "head_dim")

HEADS: dict[str, HeadRow] = {
    "eagle": HeadRow("eagle:FeatureHead", {}, _INNER, ("qkv_bias",)),
    "fspad": HeadRow("eagle:FeatureHead", {"feature_sampling": True, "partial_alignment": True}, _INNER, ("qkv_bias",)),
    "eagle3": HeadRow(
        "eagle:Eagle3Head",
        {},
        ("hidden", *_INNER),
        ("own_embedding", "norm_before_fc", "fc_norm", "norm_before_residual", "norm_output", "qkv_bias", "qk_norm"),
    ),
    "medusa": HeadRow("medusa:MedusaHeads", {}, converted=("draft_vocab_size",)),
    "hydra": HeadRow("hydra:HydraHeads", {}, _INNER, ("prefix_norms", "head_bias")),
    "parallel": HeadRow("ctc:CtcHead", {"blank": False}, _INNER),
    "ctc": HeadRow("ctc:CtcHead", {}, _INNER),
}
