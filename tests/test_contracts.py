"""The contract: what every target and pool declares, and the work of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from foredraft.core.contracts import Budget, Cache, Pool, Target, Work
from foredraft.core.draws import Draws
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.params import SamplingParams
from foredraft.models.hf import HFTarget
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget
from foredraft.models.table import TableTarget, random_law

SMALL = Path(__file__).parent / "data" / "babyllama-105-b"

TARGETS: dict[str, Any] = {
    "table": lambda: TableTarget(random_law(3, 0), 3),
    "llama": lambda: load_target(SMALL, dtype="float64"),
    "hf": lambda: HFTarget(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=2))),
    "bundled": lambda: load_target(BUNDLED_TARGET, device="cpu"),  # compiled where the machine can
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_and_their_pools_keep_the_contract(name: str) -> None:
    target = TARGETS[name]()
    pool = target.new_pool(2)
    assert isinstance(target, Target)
    assert isinstance(pool, Pool)
    assert isinstance(pool.allocate(), Cache)
    assert (target.shared is not None) == isinstance(target, NativeTarget)
    assert pool.bytes_per_token > 0


@pytest.mark.parametrize("name", ["llama", "hf", "bundled"])
def test_embeddings_and_logits_have_the_declared_kind(name: str) -> None:
    target = TARGETS[name]()
    embeddings = target.embed(torch.tensor([1, 2, 2], device=target.device))
    logits = target.head(embeddings)
    assert (embeddings.dtype, embeddings.device) == (target.dtype, target.device)
    assert logits.shape == (3, target.vocab_size)
    assert torch.equal(embeddings[1], embeddings[2])


def test_a_table_has_nothing_for_heads() -> None:
    target = TableTarget(random_law(3, 0), 3)
    with pytest.raises(ValueError, match=r"has no embedding\. Choose a drafter without a head"):
        target.embed(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"has no output head\. Choose a drafter without a head"):
        target.head(torch.zeros(1, 2))


def work_of_three() -> Work:
    sampling = [SamplingParams(temperature=heat) for heat in (0.0, 0.5, 1.0)]
    return Work(["a", "b", "c"], [5, 6, 7], [Budget(9, 4), Budget(3, 3), Budget(0, 0)], sampling, [Draws(b) for b in range(3)])


@pytest.mark.parametrize("requests", [[], [1], [2, 0], [0, 1, 2]])
def test_a_part_of_the_work_keeps_everything_but_the_states(requests: list[int]) -> None:
    work, states = work_of_three(), [object() for _ in requests]
    part = work.part(requests, states)
    assert len(part) == len(requests)
    assert part.states is states
    for name in ("roots", "budgets", "sampling", "draws"):
        assert getattr(part, name) == [getattr(work, name)[b] for b in requests]


def test_capped_work_has_no_tree_where_there_is_no_room() -> None:
    work = work_of_three()
    assert work.capped([2, 9, 1]).budgets == [Budget(9, 2), Budget(3, 3), Budget(0, 0)]
    assert work.capped([0, 0, 0]).budgets == [Budget(0, 0)] * 3
    assert work.capped([4, 3, 0]) == work
