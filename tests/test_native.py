"""The compiled decoder: as exact as torch in bfloat16, and every row the same bits wherever it stands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foredraft import LLM, SamplingParams
from foredraft import kernels as compiled
from foredraft.cache.blocks import num_blocks
from foredraft.core.tree import TreeBatch
from foredraft.kernels.layouts import FULL, QUANTIZED, Memory, blocked, describe_weight
from foredraft.models.llama import LlamaTarget
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget, can_run, run_linear
from instruction_sets import DTYPES
from quantized import in_eight_bits, in_four_bits
from test_models import LLAMA3

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no compiled kernels run here")

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one layer": ("llama", {"num_hidden_layers": 1, "vocab_size": 64}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"hidden_size": 288, "head_dim": 128, "num_attention_heads": 9, "num_key_value_heads": 1}),
    "odd heads": ("llama", {"head_dim": 96, "num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 64}),
}
# Two trees; the first has every shape that matters: a long path, wide and deep siblings, a leaf below the root.
PARENTS = [[-1, 0, 0, 1, 2, 1, 3, 4, 6, 2, 6, 0, 8, 12, 13], [-1, 0, 1, 2, 2]]
PROMPTS = [list(range(3, 40)), list(range(50, 60))]

every_model = pytest.mark.parametrize("name", MODELS)


def make_weights(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    kind, options = MODELS[name]
    config = AutoConfig.for_model(kind, **(SIZES | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():  # fresh norms are all ones and fresh biases zero, and would hide a mistake
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.15)
    weights = model.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return config, weights


def trees() -> TreeBatch:
    rng = np.random.default_rng(1)
    return TreeBatch.chains([rng.integers(64, size=len(one)).tolist() for one in PARENTS], PARENTS)


def prefilled(target: Any, prompts: list[list[int]]) -> tuple[Any, list[Any]]:
    pool = target.new_pool(num_blocks(128, len(prompts)))
    caches = [pool.allocate() for _ in prompts]
    target.forward(TreeBatch.chains(prompts), caches, np.arange(0))
    pool.keep(caches, [range(1, len(prompt)) for prompt in prompts])
    return pool, caches


def run(target: Any, **options: Any) -> Any:
    return target.forward(trees(), prefilled(target, PROMPTS)[1], **options)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).pow(2).mean().sqrt())


@every_model
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_no_less_exact_than_torch(name: str, dtype: str) -> None:
    """Against the torch decoder in float64, with the same weights: features of every kind and all logits.

    In 16 bits the rounding of states dominates, and compiled code rounds less often. In float32 the sums dominate. Compiled
    code adds in the order of the inputs, torch in blocks, which err less: up to twice the error of torch is allowed.
    """
    config, weights = make_weights(name)
    allowed = 2 if dtype == "f32" else 1.1
    layers = (0, 1, config.num_hidden_layers, -1)
    exact = run(LlamaTarget(config, {k: w.double() for k, w in weights.items()}, torch.float64, CPU), feature_layers=layers)
    rough = run(LlamaTarget(config, weights, DTYPES[dtype], CPU, packed=False), feature_layers=layers)
    found = run(NativeTarget(config, weights, DTYPES[dtype]), feature_layers=layers)
    assert found.logits.dtype == torch.float32
    assert found.features.dtype == DTYPES[dtype]
    assert found.logits.shape == exact.logits.shape
    assert found.features.shape == exact.features.shape
    assert error(found.logits, exact.logits) < allowed * error(rough.logits, exact.logits) < 0.1 * float(exact.logits.std())
    for part in range(len(layers)):
        columns = slice(part * config.hidden_size, (part + 1) * config.hidden_size)
        mine, theirs = (error(one.features[:, columns], exact.features[:, columns]) for one in (found, rough))
        assert mine <= allowed * theirs


@every_model
def test_a_node_has_the_bits_of_its_path_decoded_alone(name: str) -> None:
    target = NativeTarget(*make_weights(name))
    batch, scores = trees(), run(target)
    for b, prompt in enumerate(PROMPTS):
        tree, first = batch[b], int(batch.offsets[b])
        for node in range(tree.num_nodes):
            pool, [cache] = prefilled(target, [prompt])
            for step in [0, *tree.path_to(node)]:
                alone = target.forward(TreeBatch.chains([[int(tree.tokens[step])]]), [cache])
                pool.keep([cache], [[]])
            assert torch.equal(alone.logits[0], scores.logits[first + node])


@every_model
def test_threads_rows_and_passes_change_no_bit(name: str) -> None:
    config, weights = make_weights(name)
    target = NativeTarget(config, weights, threads=1)
    scores = run(target, feature_layers=(1, -1))
    for threads in (2, 3):
        more = run(NativeTarget(config, weights, threads=threads), feature_layers=(1, -1))
        assert torch.equal(more.logits, scores.logits)
        assert torch.equal(more.features, scores.features)
    rows = np.array([3, 0, 17, 15])
    assert torch.equal(run(target, rows=rows).logits, scores.logits[rows])
    _, caches = prefilled(target, PROMPTS)
    target.forward(part_of(trees(), [6, 2]), caches)
    again = target.forward(trees(), caches, np.array([18, 7]), start=[6, 2])
    assert torch.equal(again.logits, scores.logits[[18, 7]])


def part_of(batch: TreeBatch, sizes: list[int]) -> TreeBatch:
    cut = [batch[b] for b in range(len(batch))]
    pairs = [(one.tokens[:size].tolist(), one.parents[:size].tolist()) for one, size in zip(cut, sizes, strict=True)]
    return TreeBatch.chains(*zip(*pairs, strict=True))


def test_many_rows_and_a_long_context() -> None:
    """More rows than fit in one group, a prompt of several hundred tokens, and the same tokens one at a time."""
    target = NativeTarget(*make_weights("qwen3"))
    tokens = np.random.default_rng(2).integers(64, size=300).tolist()
    pool = target.new_pool(32)
    at_once, one_by_one = pool.allocate(), target.new_pool(32).allocate()
    scores = target.forward(TreeBatch.chains([tokens]), [at_once])
    for token, wanted in zip(tokens, scores.logits, strict=True):
        alone = target.forward(TreeBatch.chains([[token]]), [one_by_one])
        one_by_one.pool.keep([one_by_one], [[]])
        assert torch.equal(alone.logits[0], wanted)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embed_and_head(name: str) -> None:
    config, weights = make_weights(name)
    target = NativeTarget(config, weights)
    ids = torch.tensor([0, 31, 32, 100, 5])
    assert torch.equal(target.embed(ids), weights["model.embed_tokens.weight"][ids])
    scores = run(target, feature_layers=(-1,))
    assert torch.equal(target.head(scores.features), scores.logits)
    assert target.head(scores.features[:0]).shape == (0, config.vocab_size)


def test_blocked_layout() -> None:
    weight = torch.arange(40.0 * 6).view(40, 6)
    laid_out, pairs = blocked(weight), blocked(weight.bfloat16())
    assert laid_out.shape == (2, 6, 32)
    assert pairs.shape == (2, 3, 32, 2)
    for o, i in itertools.product(range(40), range(6)):
        assert laid_out[o // 32, i, o % 32] == pairs[o // 32, i // 2, o % 32, i % 2] == weight[o, i]
    assert not laid_out[1, :, 8:].any()
    assert not pairs[1, :, 8:].any()


@pytest.mark.parametrize("bits", [QUANTIZED, FULL])
def test_linear_layers(bits: int) -> None:
    """As in float64 on the weights and inputs that the bits say, for up to 30 rows; a row does not hang on the others.

    At full bits, the sum of 96 exact products and a bias rounds 97 times at most. At four bits, three blocks of 32 are added.
    For each, the step of the inputs, the product of two scales, a sum of integers and the addition round; then the bias.
    """
    torch.manual_seed(0)
    weight, bias, x = torch.randn(75, 96).bfloat16(), torch.randn(75).bfloat16(), (torch.randn(30, 96) + 1).bfloat16()
    weight[7], x[3, 32:64] = 0, 0
    layer = describe_weight(memory := Memory(), weight, bias, bits)
    said, given = (in_four_bits(weight), in_eight_bits(x)) if bits == QUANTIZED else (weight.double(), x.double())
    all_rows = run_linear(layer, x, 1)
    sums = (given.abs() @ said.abs().T) + bias.double().abs()
    off = (all_rows.double() - given @ said.T - bias.double()).abs()
    assert (off <= 1.01 * (13 if bits == QUANTIZED else 97) * 2.0**-24 * sums).all()
    for rows in range(1, 14):
        assert torch.equal(run_linear(layer, x[:rows], 2), all_rows[:rows])
    assert memory.num_bytes > 0


def test_four_bits_are_near_what_they_stand_for() -> None:
    """Weights within half a step, inputs too; where all are equal, exactly; a block of zeros is one."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16()
    weight[5], weight[6] = 0, -3
    off = (in_four_bits(weight) - weight.double()).abs().unflatten(1, (-1, 32)).amax(2)
    assert (off <= 1.01 * weight.double().abs().unflatten(1, (-1, 32)).amax(2) / 8).all()
    assert off.mean() < 0.16
    assert not off[5:7].any()
    assert (in_eight_bits(weight) - weight.double()).abs().max() < 0.51 * weight.abs().max() / 127


def test_who_runs_what() -> None:
    config, _ = make_weights("llama")
    assert all(can_run(config, dtype, CPU) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    assert not can_run(config, torch.float64, CPU)
    assert not can_run(config, torch.bfloat16, torch.device("meta"))
    config.intermediate_size = 48
    assert not can_run(config, torch.bfloat16, CPU)
    bundled = Path(compiled.__file__).parents[1] / "bundled"
    assert isinstance(load_target(bundled / "draft-lm"), NativeTarget)
    assert isinstance(load_target(bundled / "draft-lm", dtype="float64"), LlamaTarget)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("method", "tree"), [("lm", "dyspec"), ("lm", "chain"), ("fspad", "topk"), ("suffix", None)])
def test_bfloat16_output_is_that_of_plain_decoding(method: str, tree: str | None, temperature: float) -> None:
    """At temperature 0 token for token, as in float64; sampled text is the same for every batch."""
    prompts = ["Write a poem about the sea.", "What is 17 times 3?", "Name three animals and say what they eat."]
    plain = LLM(speculative_config={"method": "ar"}, max_num_seqs=1)
    sampling = [SamplingParams(temperature=temperature, max_tokens=64, seed=i, ignore_eos=True) for i in range(3)]
    config = {"method": method, "num_speculative_tokens": 12} | ({"tree": tree} if tree else {})
    alone = [
        plain.with_speculation(config).generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, sampling, strict=True)
    ]
    wide = LLM(speculative_config=config, max_num_seqs=3).generate(prompts, sampling)
    assert [one.outputs[0].token_ids for one in wide] == alone
    if temperature == 0:
        assert [one.outputs[0].token_ids for one in plain.generate(prompts, sampling)] == alone
