"""10,000 random layers and steps, on every instruction set as on the scalar set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foredraft.core.tree import TreeBatch
from foredraft.kernels.layouts import FULL, QUANTIZED, Memory, describe_weight
from foredraft.kernels.sets import using
from foredraft.models.native import NativeTarget, run_linear
from instruction_sets import DTYPES, NAMES, PAIRED, check_bits, code_of
from test_instruction_sets_forwards import made
from test_native import prefilled

pytestmark = [pytest.mark.slow, pytest.mark.unchecked]

LAYERS, STEPS = 1800, 200
"""For each of six sets."""


def rows_of(rng: np.random.Generator) -> int:
    """Mostly few rows, sometimes more than any group or block holds."""
    return int(rng.integers(1, 16) if rng.random() < 0.6 else rng.integers(16, 220))


@pytest.mark.parametrize("name", NAMES[1:])
def test_random_layers(name: str) -> None:
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(7)
    for _ in range(LAYERS):
        dtype, is_quantized = DTYPES[str(rng.choice(list(DTYPES)))], rng.random() < 0.3
        shape, rows, threads = (int(rng.integers(1, 200)), 32 * int(rng.integers(1, 12))), rows_of(rng), int(rng.integers(1, 4))
        weight = torch.randn(shape, generator=generator).to(dtype)
        bias = torch.randn(shape[0], generator=generator) if rng.random() < 0.5 else None
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        layer = describe_weight(_memory := Memory(), weight, bias, QUANTIZED if is_quantized else FULL)
        with using(code_of(name)):
            found = run_linear(layer, x, threads)
            if name in PAIRED and dtype == torch.bfloat16 and not is_quantized:
                begin = int(rng.integers(rows))
                check_bits(run_linear(layer, x[begin:], 1), found[begin:])
                continue
        with using(code_of("scalar")):
            check_bits(found, run_linear(layer, x, 1))


def random_trees(rng: np.random.Generator) -> tuple[TreeBatch, list[list[int]]]:
    """Trees and the prompts before them: chains, stars and anything between."""
    tokens, parents, prompts = [], [], []
    for _ in range(int(rng.integers(1, 5))):
        size, reach = int(rng.integers(1, 24)), int(rng.integers(1, 24))
        parents.append([-1, *(int(rng.integers(max(0, i - reach), i)) for i in range(1, size))])
        tokens.append(rng.integers(64, size=size).tolist())
        prompts.append(rng.integers(64, size=int(rng.integers(1, 50))).tolist())
    return TreeBatch.chains(tokens, parents), prompts


def logits_of(target: Any, batch: TreeBatch, prompts: list[list[int]]) -> torch.Tensor:
    return target.forward(batch, prefilled(target, prompts)[1]).logits


@pytest.mark.parametrize("name", NAMES[1:])
def test_random_steps(name: str) -> None:
    """Sets that add in another order are compared with each tree alone: a step changes no bit of it."""
    rng, targets = np.random.default_rng(8), {}
    for _ in range(STEPS):
        model, dtype = str(rng.choice(["one layer", "mistral", "qwen3"])), str(rng.choice(list(DTYPES)))
        batch, prompts = random_trees(rng)
        for one in (name, "scalar"):
            if (one, model, dtype) not in targets:
                with using(code_of(one)):
                    targets[one, model, dtype] = NativeTarget(*made(model), DTYPES[dtype], threads=int(rng.integers(1, 4)))
        with using(code_of(name)):
            found = logits_of(targets[name, model, dtype], batch, prompts)
            if name in PAIRED and dtype == "bf16":
                b = int(rng.integers(len(prompts)))
                alone = TreeBatch.chains([batch[b].tokens.tolist()], [batch[b].parents.tolist()])
                wanted = logits_of(targets[name, model, dtype], alone, [prompts[b]])
                check_bits(found[batch.offsets[b] : batch.offsets[b + 1]], wanted)
                continue
        with using(code_of("scalar")):
            check_bits(found, logits_of(targets["scalar", model, dtype], batch, prompts))
