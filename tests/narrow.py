"""An EAGLE-3 head that is narrower than its target, for the story model of the tests; its weights are random."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig

from foredraft.heads import HEADS
from foredraft.heads.folder import layer_config, save_head
from foredraft.heads.layers import Shape


def narrow_head(target: Path, folder: Path, *, hidden: int = 64) -> Path:
    """Writes the head into `folder`."""
    text = AutoConfig.from_pretrained(target)
    config = layer_config(text, text.vocab_size, {"hidden": hidden, "intermediate": 96})
    options = {"feature_layers": [2, 3, 4], "draft_vocab_size": 80}
    torch.manual_seed(5)
    head = HEADS["eagle3"].make(Shape.of(config), **options)
    head.d2t += torch.arange(80) // 4
    torch.nn.init.normal_(head.lm_head.weight, std=0.5)
    save_head(folder, head, config, {"method": "eagle3", "options": options})
    return folder
