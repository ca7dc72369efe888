"""The inflated model: larger, and the same function, for our decoder and for Transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from inflate import inflate, larger, parse_params, shape_of
from inflate_head import inflate_head

from foredraft import LLM, SamplingParams
from foredraft.core.tree import TreeBatch
from foredraft.drafters import DRAFTERS
from foredraft.heads import HEADS
from foredraft.models.loading import load_target
from narrow import narrow_head

DATA = Path(__file__).parent / "data"
STORIES = DATA / "babyllama-105"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied, biases": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("params", [80_000, 700_000])
def test_the_function_stays(name: str, params: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = AutoModelForCausalLM.from_config(CONFIGS[name]).double()
    for parameter in small.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, 0.3, 0.3)
    small.save_pretrained(tmp_path / "small")
    shape = inflate(tmp_path / "small", params, tmp_path / "large")
    assert 0.75 * params < shape.params < 1.25 * params  # neurons come in steps of 64, which are coarse here
    tokens = list(range(3, 40))
    logits = []
    for directory in ("small", "large"):
        target = load_target(tmp_path / directory, dtype="float64", device="cpu")
        cache = target.new_pool(4).allocate()
        logits.append(target.forward(TreeBatch.chains([tokens]), [cache]).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-9
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float64)
    with torch.inference_mode():
        found = theirs(torch.tensor([tokens])).logits[0]
    assert (logits[0] - found).abs().max() < 1e-5  # Transformers computes norms and rotations in float32


def test_sizes() -> None:
    base = shape_of(CONFIGS["llama"])
    assert larger(base, base.params).layers == base.layers
    assert larger(base, 16 * base.params).hidden == 4 * base.hidden
    assert (parse_params("350M"), parse_params("1.5b"), parse_params("1000")) == (350_000_000, 1_500_000_000, 1000)
    with pytest.raises(ValueError, match="at least the model's own"):
        larger(base, base.params - 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of the heads, inflated."""
    directory = tmp_path_factory.mktemp("inflated") / "large"
    inflate(STORIES, 15_000_000, directory)
    return directory


@pytest.mark.parametrize(("method", "narrow"), [*((name, False) for name in HEADS), ("eagle3", True)])
def test_a_head_keeps_its_laws(method: str, narrow: bool, tmp_path: Path, large: Path) -> None:
    """In float64, behind its own target and behind the larger one; greedy drafts are accepted alike."""
    small = narrow_head(STORIES, tmp_path / "narrow") if narrow else DATA / "heads" / method
    inflate_head(small, large, tmp_path / "head")
    tree = {"tree": "topk"} if not DRAFTERS[method].makes_own else {}
    found = []
    for target, head in ((STORIES, small), (large, tmp_path / "head")):
        llm = LLM(target, {"method": method, "model": head, "num_speculative_tokens": 6, **tree}, dtype="float64")
        drafter: Any = llm.engine.drafter
        tokens = [1, 14, 33, 7, 52, 19, 88, 3]
        scores = llm.target.forward(
            TreeBatch.chains([tokens]), [llm.target.new_pool(4).allocate()], feature_layers=drafter.feature_layers
        )
        state = drafter.start(tokens, scores.features[:-1])
        if tree:
            batch = TreeBatch.chains([[tokens[-1], 5, 9]], [[-1, 0, 0]])
            laws = [drafter.expand([state], batch, np.array(nodes)) for nodes in ([0], [1, 2])]
            law = torch.cat(laws)
        else:
            law = drafter.slots.fill([state])
        outputs = llm.generate("Tom and Lily", SamplingParams(temperature=0, max_tokens=40))
        found.append((law, outputs[0].outputs[0].token_ids, outputs[0].metrics.num_accepted_tokens))
    known = found[0][0] > -1e30
    assert ((found[0][0] - found[1][0])[known]).abs().max() < 1e-9
    assert found[0][1:] == found[1][1:]
