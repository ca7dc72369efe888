"""Plots, which need the optional dependency matplotlib."""

from __future__ import annotations

from typing import Any

from foredraft.core.errors import UserError


def new_figure(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure. `width` and `height` are in inches.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'foredraft[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")
