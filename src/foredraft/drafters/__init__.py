"""Proposers of tokens: DRAFTERS names every one, where it lives and what it can give to a grower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from foredraft.drafters.options import OPTIONS, check_options

if TYPE_CHECKING:
    from foredraft.protocols import Grower, Target


class Setting(NamedTuple):
    """What a drafter is built from.

    Attributes:
        method: its name in DRAFTERS.
        model: the value of the config key ``model``, a directory, Hub id or loaded model; None if there was none.
        load: loads such a model as a `Target` in the dtype and on the device of the run.
        vocabulary: token -> id of such a model or of the target (given as None), as far as there is a tokenizer; else None.
        grower: how its trees grow; None for a drafter that makes its own.
        num_slots: requests in flight at most.
        fingerprint: of the target's weights, see `foredraft.models.checkpoint.fingerprint`.
    """

    method: str
    target: Target
    model: Any
    load: Callable[[Any], Target]
    vocabulary: Callable[[Any], dict[str, int] | None]
    grower: Grower | None
    num_slots: int
    fingerprint: Callable[[], str]


class DrafterRow(NamedTuple):
    """One drafter.

    Attributes:
        module, cls: where it lives; imported when it is used.
        gives: ``expand``, the law after any path, which is what growers need; or nothing but an ``own tree``.
        options: config keys of its own.
        chains_only: of its own tree: whether it never branches.
        weights: what config key ``model`` is to it: a language ``model``, a ``head`` trained for the target; None: nothing.
        asks: the drafter that it asks where it finds nothing itself, whose options it takes too.
        own_tree: whether it makes a tree of its own where none is named, though it gives laws.
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
        """Whether it makes a tree of its own where none is named."""
        return self.own_tree or self.gives == "own tree"

    def load(self) -> Any:
        """Its class."""
        return getattr(import_module(self.module), self.cls)

    def option_types(self) -> dict[str, Any]:
        """The type of each option."""
        return {name: OPTIONS[name].kind for name in self.options}

    def build(self, setting: Setting, **options: Any) -> Any:
        """The drafter itself; one that asks another is built around that.

        Raises:
            ValueError: it cannot be built from `setting` and `options`.
        """
        check_options(**options)
        if self.asks is None:
            return self.load().build(setting, **options)
        asked = DRAFTERS[self.asks]
        theirs = {key: options.pop(key) for key in asked.options if key in options}
        return self.load().build(asked.build(setting._replace(method=self.asks), **theirs), **options)


def _head(module: str, cls: str, source: str, *, options: Sequence[str] = (), own_tree: bool = False) -> DrafterRow:
    """A drafter over the target's features, whose weights are a head trained for that target."""
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
        source=f"{name}, and lookup where the text repeats itself, as in SAM decoding (arXiv 2411.10666)",
        asks=name,
    )
    for name, row in DRAFTERS.items()
    if row.weights is not None
}
