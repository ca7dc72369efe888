"""Writes the drafter's directory: weights in bfloat16, in the format of Transformers, and their provenance."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM

from .batches import Row
from .corpus import SOURCES
from .train import Training


def save(student: LlamaForCausalLM, out: Path) -> LlamaForCausalLM:
    """Saves a bfloat16 copy of the student, and loads it as a user would."""
    copy, config = deepcopy(student).bfloat16(), student.config
    copy.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # by default only the owner can read it
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)


def provenance(target: Path, student: LlamaForCausalLM, rows: Sequence[Row], num_steps: int, training: Training) -> dict:
    """Collects the origin of the weights: command, commit, target, data, settings and versions."""
    return {
        "what": "draft language model, distilled from the target's full next-token laws",
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "target": target.name,
        "target_sha256": hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": student.num_parameters(),
        "data_files": {name: source.licence for name, source in SOURCES.items()},
        "answer_tokens": count_answers(rows),
        "steps": num_steps,
        "tokens_seen": training.num_tokens,
        "train_minutes": training.minutes,
        "final_train": {"kl": training.kl, "acceptance": training.acceptance},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"CPU, {torch.get_num_threads()} thread(s), bf16",
        "weights_licence": "Apache-2.0",
    }


def commit() -> str | None:
    """Returns the commit of the recipe, marked ``-dirty`` if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or None


def count_answers(rows: Sequence[Row]) -> dict[str, int]:
    """Counts the answer tokens by kind of text, with held-out texts counted separately."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[f"held_out_{row.kind}" if row.held_out else row.kind] += len(row.ids) - row.prompt_len
    return dict(sorted(counts.items()))


def write_json(path: Path, content: dict) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
