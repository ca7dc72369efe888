"""All drafters. DRAFTERS maps each name to the module of the drafter and its properties."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from foredraft.drafters.options import OPTIONS, check_options

if TYPE_CHECKING:
    from foredraft.core.setting import Setting


class DrafterRow(NamedTuple):
    """One drafter.

    Attributes:
        module, cls: module and class of the drafter; imported on first use.
        gives: ``expand`` if the drafter computes the law after any path, which tree policies need. ``own tree`` if it only
            makes its own trees.
        options: config keys of the drafter.
        chains_only: whether its own tree never branches.
        source: the paper or project that describes the drafter.
        weights: the meaning of the config key ``model``: a language ``model``, or a ``head`` trained for the target. None if
            the drafter has no weights.
        asks: name of the fallback drafter, which drafts if lookup finds nothing. Its options are accepted too.
        own_tree: whether a drafter with ``expand`` makes its own tree if no tree is named.
    """

    module: str
    cls: str
    gives: str
    options: Sequence[str]
    chains_only: bool
    source: str
    weights: str | None = None
    asks: str | None = None
    own_tree: bool = False

    @property
    def makes_own(self) -> bool:
        """Whether the drafter makes its own tree if no tree is named."""
        return self.own_tree or self.gives == "own tree"

    def load(self) -> Any:
        """Imports and returns the class of the drafter."""
        return getattr(import_module(self.module), self.cls)

    def option_types(self) -> dict[str, Any]:
        """Returns the type of each option."""
        return {name: OPTIONS[name].kind for name in self.options}

    def build(self, setting: Setting, **options: Any) -> Any:
        """Builds the drafter, including its fallback drafter if it has one.

        Raises:
            ValueError: the drafter cannot be built from `setting` and `options`.
        """
        check_options(**options)
        if self.asks is None:
            return self.load().build(setting, **options)
        fallback = DRAFTERS[self.asks]
        fallback_options = {key: options.pop(key) for key in fallback.options if key in options}
        return self.load().build(fallback.build(setting._replace(method=self.asks), **fallback_options), **options)


def _head(module: str, cls: str, source: str, *, options: Sequence[str] = (), own_tree: bool = False) -> DrafterRow:
    """Row of a drafter that reads the target's features and whose weights are a head trained for that target."""
    options = ("force", "weight_bits", *options)
    return DrafterRow(f"foredraft.drafters.{module}", cls, "expand", options, False, source, "head", own_tree=own_tree)


DRAFTERS: dict[str, DrafterRow] = {
    "lm": DrafterRow(
        "foredraft.drafters.lm",
        "LMDrafter",
        "expand",
        (),
        False,
        "Leviathan et al. 2023 (arXiv 2211.17192): a small model",
        "model",
    ),
    "ngram": DrafterRow(
        "foredraft.drafters.ngram",
        "NgramDrafter",
        "own tree",
        ("prompt_lookup_max", "prompt_lookup_min"),
        True,
        "prompt lookup decoding (A. Saxena, 2023)",
    ),
    "suffix": DrafterRow(
        "foredraft.drafters.suffix",
        "SuffixDrafter",
        "own tree",
        ("suffix_decoding_max_tree_depth", "suffix_decoding_max_spec_factor", "suffix_decoding_min_token_prob"),
        False,
        "SAM decoding (arXiv 2411.10666); SuffixDecoding (arXiv 2411.04975)",
    ),
    "eagle": _head("recurrent", "RecurrentDrafter", "EAGLE (arXiv 2401.15077): a head over the target's features"),
    "fspad": _head(
        "recurrent", "RecurrentDrafter", "FSPAD (arXiv 2408.15562): EAGLE with feature sampling and partial alignment"
    ),
    "eagle3": _head("recurrent", "RecurrentDrafter", "EAGLE-3 (arXiv 2503.01840): features of three depths"),
    "medusa": _head("slots", "SlotDrafter", "Medusa (arXiv 2401.10774): a head for each position"),
    "hydra": _head("hydra", "HydraDrafter", "Hydra (arXiv 2402.05109): heads that see the drafted path"),
    "parallel": _head("slots", "LayerSlotDrafter", "the layer of the CTC-based drafter (arXiv 2412.00061) without blanks"),
    "ctc": _head(
        "ctc",
        "CtcDrafter",
        "CTC-based drafter (arXiv 2412.00061): parallel slots, collapsed",
        options=("ctc_tokens",),
        own_tree=True,
    ),
}

DRAFTERS |= {
    f"{name}-lookup": row._replace(
        module="foredraft.drafters.lookup_first",
        cls="LookupFirst",
        options=(*row.options, "lookup_min_match"),
        source=f"{name}, with lookup in repeated text as in SAM decoding (arXiv 2411.10666)",
        asks=name,
    )
    for name, row in DRAFTERS.items()
    if row.weights is not None
}
