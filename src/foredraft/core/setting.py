"""The inputs from which a drafter is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from foredraft.core.contracts import Grower, Target


class Setting(NamedTuple):
    """The inputs from which a drafter is built.

    Attributes:
        method: name of the drafter in `foredraft.drafters.DRAFTERS`.
        target: the target.
        model: the value of the config key ``model``: a directory, a Hub id or a loaded model. None if it was not given.
        load: loads such a model as a `Target`, in the dtype and on the device of the run.
        vocabulary: returns the map from token to id of such a model, or of the target for None; None without a tokenizer.
        grower: the tree policy; None for a drafter that makes its own trees.
        fingerprint: returns the fingerprint of the target's weights, see `foredraft.models.checkpoint.fingerprint`.
    """

    method: str
    target: Target
    model: Any
    load: Callable[[Any], Target]
    vocabulary: Callable[[Any], dict[str, int] | None]
    grower: Grower | None
    fingerprint: Callable[[], str]
