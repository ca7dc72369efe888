"""Widens a draft head for an inflated target, for `inflate.py --drafter DIR`.

The wide head has the same distributions as the original head, and costs as much as a head of the larger width. Its layer is
widened by the factor of the target's hidden size. The added hidden dimensions, heads and neurons are zeros without effect.
Norms are rescaled like those of the target, see `inflate.py`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from foredraft.heads import HEADS
from foredraft.heads.folder import read_head, save_head
from foredraft.heads.layers import Shape
from foredraft.models.checkpoint import fingerprint, open_weights, read_json
from foredraft.plan.store import file_beside

_SIDE_BY_SIDE = re.compile(
    r"(fc|fc\.fc|ahead\.\d+|blocks\.\d+\.0\.(linear|res_connection)|midlayer\.self_attn\.[qkv]_proj)\.weight"
)
"""Names of weights whose input is a concatenation of several hidden states."""


def inflate_head(drafter: Path, target: Path, output: Path) -> None:
    """Writes the head in `drafter` as a head for the inflated `target`. Its calibration is copied, since it stays valid.

    Raises:
        ValueError: there is no head, or the target's hidden size is not a multiple of the head's.
    """
    loaded = read_head(drafter)
    old, hidden = loaded.config, read_json(target / "config.json")["hidden_size"]
    shape = Shape.of(old)
    factor = hidden // shape.features
    if hidden != factor * shape.features:
        raise ValueError(
            f"the target's width {hidden} is not a multiple of {shape.features}, the width of the head's target: "
            "give an inflated copy of the head's own target"
        )
    config = LlamaConfig(
        **{
            **old.to_diff_dict(),
            "hidden_size": old.hidden_size * factor,
            **({"target_hidden_size": hidden} if shape.target_hidden else {}),
            "intermediate_size": old.intermediate_size * factor,
            "num_attention_heads": old.num_attention_heads * factor,
            "num_key_value_heads": old.num_key_value_heads * factor,
            "head_dim": old.head_dim,
            "rms_norm_eps": old.rms_norm_eps / factor,
        }
    )
    options = loaded.about.get("options", {})
    head = HEADS[loaded.about["method"]].make(Shape.of(config), **options)
    small = loaded.head.state_dict()
    wide = {
        name: widened(name, small[name], like, shape.features if name == "fc.weight" else shape.hidden, factor)
        for name, like in head.state_dict().items()
    }
    head.load_state_dict(wide)
    about = {**loaded.about, "target": {"name": target.name, "fingerprint": fingerprint(open_weights(target))}}
    save_head(output, head, config, about)
    copied = file_beside(output)
    if copied is not None and (measured := drafter / copied.name).exists():
        copied.write_text(json.dumps({**read_json(measured), "weights": fingerprint(open_weights(output))}, indent=1) + "\n")


def widened(name: str, weight: Tensor, like: Tensor, hidden: int, factor: int) -> Tensor:
    """Puts a weight in the corner of a matrix of zeros. A weight made of blocks is widened block by block."""
    if weight.shape == like.shape:
        return weight
    if "norm" in name:
        weight = weight / factor**0.5
    wide = torch.zeros(like.shape, dtype=weight.dtype)
    doubled = name.endswith("mlp.down_proj.weight") and len(weight) == 2 * hidden
    rows = len(weight) // hidden if doubled else 1
    columns = weight.shape[-1] // hidden if _SIDE_BY_SIDE.fullmatch(name) else 1
    if weight.ndim == 1:
        wide[: len(weight)] = weight
        return wide
    for i, part in enumerate(weight.chunk(rows)):
        for j, block in enumerate(part.chunk(columns, dim=1)):
            at = i * len(wide) // rows, j * wide.shape[1] // columns
            wide[at[0] : at[0] + len(block), at[1] : at[1] + block.shape[1]] = block
    return wide
