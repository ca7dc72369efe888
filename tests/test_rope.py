"""Rotary positions whose frequencies depend on the length: one choice for all requests, checked against Transformers."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.cache.blocks import num_blocks
from foredraft.core.tree import TreeBatch
from foredraft.models.hf import HFTarget
from foredraft.models.llama import LlamaTarget
from foredraft.models.loading import load_target
from foredraft.models.rope import context_of, frequencies, hold, rotary_tables
from test_loading import SIZES, edit_config, fails

ORIGINAL, FULL = 24, 96
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}

KINDS = {
    "llama": {"rope_parameters": LONG},
    "qwen2": {"rope_parameters": LONG},
    "llama with a factor": {"rope_parameters": {**LONG, "factor": 8.0}},
    "llama with an attention factor": {"rope_parameters": {**LONG, "attention_factor": 1.7}},
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": ORIGINAL},
    "phi3 with half a head": {
        "rope_parameters": {**LONG, "short_factor": [1.0, 1.2], "long_factor": [2.0, 4.0], "partial_rotary_factor": 0.5},
        "original_max_position_embeddings": ORIGINAL,
    },
}
OURS = [name for name in KINDS if name.split()[0] in ("llama", "qwen2")]
TOKENS = [int(one) for one in np.random.default_rng(3).integers(3, 37, size=40)]


def make(name, **more):
    torch.manual_seed(0)
    options = {**SIZES, "max_position_embeddings": FULL, **deepcopy(KINDS.get(name, {})), **more}
    config = AutoConfig.for_model(name.split()[0], **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.3)
    return model


def forced(model, length):
    """Logits of one plain forward of Transformers, without a cache, its factors those of a text of `length` tokens."""
    rope = model.config.rope_parameters
    factors = torch.tensor(rope["long_factor" if length > ORIGINAL else "short_factor"])
    size = model.config.hidden_size // model.config.num_attention_heads
    dim = int(size * (rope.get("partial_rotary_factor") or 1.0))
    turned = 1.0 / (factors * rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
    [rotary] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    kept = rotary.rope_type, rotary.inv_freq
    rotary.rope_type, rotary.inv_freq = "default", turned
    with torch.inference_mode():
        logits = model(torch.tensor([TOKENS[: min(len(TOKENS), length)]]), use_cache=False).logits[0]
    rotary.rope_type, rotary.inv_freq = kept
    return logits


def in_pieces(target, tokens, sizes):
    """Logits of a text that is run in forwards of so many tokens."""
    cache = target.new_pool(num_blocks(target.max_len)).allocate()
    found, at = [], 0
    for size in sizes:
        part = tokens[at : at + size]
        found.append(target.forward(TreeBatch.chains([part]), [cache]).logits)
        cache.pool.keep([cache], [range(1, len(part))])
        at += len(part)
    assert at == len(tokens)
    return torch.cat(found)


# --- LongRoPE


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("asked", [None, ORIGINAL, ORIGINAL + 1, FULL])
def test_one_forward_of_transformers_with_the_same_factors(name, asked):
    model = make(name)
    target = load_target(model, max_len=asked)
    assert type(target) is (LlamaTarget if name in OURS else HFTarget)
    is_long = asked is not None and asked > ORIGINAL
    assert target.max_len == (FULL if is_long else ORIGINAL)
    expected = forced(model, FULL if is_long else ORIGINAL)
    tokens = TOKENS[: len(expected)]
    exact = {"atol": 2e-5, "rtol": 0}  # the published tables of cosines are float32
    for sizes in ([len(tokens)], [5, 10, len(tokens) - 15], [1] * len(tokens)):
        torch.testing.assert_close(in_pieces(target, tokens, sizes), expected, **exact)
    short = forced(model, ORIGINAL)
    assert torch.allclose(expected[: len(short)], short, atol=1e-4) == (not is_long)


@pytest.mark.parametrize("name", ["llama", "phi3", "phi3 with half a head"])
def test_short_factors_are_what_transformers_runs_for_short_texts(name):
    model = make(name)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS[:ORIGINAL]]), use_cache=False).logits[0]
    torch.testing.assert_close(in_pieces(load_target(model), TOKENS[:ORIGINAL], [ORIGINAL]), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["phi3", "phi3 with half a head"])
def test_a_loaded_model_is_left_as_it_was(name):
    model = make(name)
    [rotary] = [module for module in model.modules() if hasattr(module, "inv_freq")]
    before = rotary.rope_type, rotary.inv_freq.clone()
    target: Any = load_target(model, max_len=FULL)
    in_pieces(target, TOKENS, [len(TOKENS)])
    assert rotary.rope_type == before[0]
    assert torch.equal(rotary.inv_freq, before[1])
    target.model.lm_head = None
    with pytest.raises(TypeError):  # a forward that fails
        in_pieces(target, TOKENS, [len(TOKENS)])
    assert torch.equal(rotary.inv_freq, before[1])


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_request_of_a_batch_has_the_same_factors(name, tmp_path):
    make(name).save_pretrained(tmp_path)
    short, long = TOKENS[:8], TOKENS[:30]
    sampling = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    llm = LLM(tmp_path, {"method": "ngram", "num_speculative_tokens": 3}, dtype="float64", max_model_len=FULL)
    together = [one.outputs[0].token_ids for one in llm.generate([short, long], sampling)]
    alone = [llm.generate(prompt, sampling)[0].outputs[0].token_ids for prompt in (short, long)]
    plain = LLM(tmp_path, {"method": "ar"}, dtype="float64", max_model_len=FULL)
    assert together == alone == [one.outputs[0].token_ids for one in plain.generate([short, long], sampling)]


def test_the_context_by_default_is_the_original_one(tmp_path, capsys):
    make("llama").save_pretrained(tmp_path)
    llm = LLM(tmp_path, {"method": "ar"})
    assert llm.max_model_len == ORIGINAL
    with pytest.raises(ValueError, match=f"context of {ORIGINAL} .*raise max_model_len"):
        llm.generate(TOKENS[:40])
    assert LLM(tmp_path, {"method": "ar"}, max_model_len=FULL).generate(TOKENS[:40])[0].finished
    with pytest.raises(ValueError, match=f"max_model_len {FULL + 1} exceeds the model's context of {FULL}"):
        LLM(tmp_path, {"method": "ar"}, max_model_len=FULL + 1)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "x", "--model", str(tmp_path), "--max-model-len", str(FULL + 1)])
    assert ended.value.code == 1
    assert f"error: max_model_len {FULL + 1} exceeds the model's context of {FULL}" in capsys.readouterr().err


def test_a_draft_model_has_the_factors_for_the_same_texts(tmp_path):
    make("llama").save_pretrained(tmp_path)
    config = {"method": "lm", "model": str(tmp_path), "tree": "chain", "num_speculative_tokens": 3}
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for asked in (ORIGINAL, FULL):
        llm = LLM(tmp_path, config, dtype="float64", max_model_len=asked)
        [found] = llm.generate(TOKENS[:10], sampling)
        assert found.metrics.acceptance_rate == 1.0  # the very model


# --- Dynamic


@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere"])
def test_dynamic_frequencies_are_those_of_the_original_context(name, tmp_path, capsys):
    model = make(name, rope_parameters=dict(DYNAMIC))
    with torch.inference_mode():
        model(torch.tensor([(TOKENS * 4)[: FULL + 30]]), use_cache=False)  # its frequencies have grown
    target = load_target(model)
    with torch.inference_mode():
        expected = make(name, rope_parameters=dict(DYNAMIC))(torch.tensor([TOKENS]), use_cache=False).logits[0]
    torch.testing.assert_close(in_pieces(target, TOKENS, [20, 20]), expected, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path)
    assert LLM(tmp_path, {"method": "ar"}).max_model_len == FULL
    with pytest.raises(ValueError, match=f"exceeds the model's context of {FULL}, because its dynamic RoPE changes"):
        LLM(tmp_path, {"method": "ar"}, max_model_len=FULL + 1)
    with pytest.raises(SystemExit):
        main(["generate", "x", "--model", str(tmp_path), "--max-model-len", str(FULL + 1)])
    assert "because its dynamic RoPE changes" in capsys.readouterr().err


# --- Parts


@pytest.mark.parametrize("scaling", [None, 8.0])
def test_frequencies_and_their_factor(scaling):
    config = make("llama", rope_parameters={**LONG, **({"factor": scaling} if scaling else {})}).config
    short, long = frequencies(config, ORIGINAL), frequencies(config, ORIGINAL + 1)
    unscaled = 100.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(short.frequencies, unscaled / torch.tensor(LONG["short_factor"]))
    torch.testing.assert_close(long.frequencies, unscaled / torch.tensor(LONG["long_factor"]))
    expected = math.sqrt(1 + math.log(scaling or FULL / ORIGINAL) / math.log(ORIGINAL))
    assert short.scaling == long.scaling == pytest.approx(expected)


def test_contexts():
    plain, long = make("llama", rope_parameters=None).config, make("llama").config
    assert [context_of(plain, one) for one in (None, 5, FULL, 500)] == [FULL] * 4
    assert [context_of(long, one) for one in (None, 5, ORIGINAL, ORIGINAL + 1, 500)] == [ORIGINAL] * 3 + [FULL] * 2
    plain.max_position_embeddings = 1 << 30
    assert [context_of(plain, one) for one in (None, 500)] == [1 << 30, 500]
    with pytest.raises(ValueError, match="Give a smaller max_model_len"):
        rotary_tables(plain, 1 << 30, torch.float32, torch.device("cpu"))
    assert not hold(make("llama", rope_parameters=None), FULL)


def test_an_enormous_context_needs_a_limit(tmp_path):
    make("llama", rope_parameters=None).save_pretrained(tmp_path)
    edit_config(tmp_path, max_position_embeddings=10**9)
    fails(tmp_path, "max_position_embeddings is 1000000000, .* Give a smaller max_model_len")
    llm = LLM(tmp_path, {"method": "ar"}, max_model_len=64)
    assert llm.max_model_len == 64
    assert llm.generate(TOKENS[:4], SamplingParams(max_tokens=3))[0].finished


def test_factors_that_a_model_chooses_in_a_way_of_its_own():
    """Phi-3.5-MoE runs the short factors always, and scales by the longest position of a forward."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "original_max_position_embeddings": ORIGINAL}
    rope = {**LONG, "short_mscale": 1.0, "long_mscale": 1.5}
    model = make("phimoe", rope_parameters=rope, **sizes)
    assert load_target(model).max_len == ORIGINAL
    fails(model, rf"chooses its LongRoPE factors in an unknown way\. Give a max_model_len of at most {ORIGINAL}", max_len=FULL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"long_factor": [1.0, "x", 1.0, 1.0]}, "long_factor of the rotary positions must be a list of numbers above 0"),
        ({"short_factor": []}, "short_factor of the rotary positions must be a list"),
        ({"long_factor": [1.0, 0.0, 1.0, 1.0]}, "long_factor of the rotary positions must be a list of numbers above 0"),
        ({"short_factor": [1.0]}, "short_factor of the rotary positions must hold 4 numbers, .* got 1"),
        ({"long_factor": [1.0] * 8}, "long_factor of the rotary positions must hold 4 numbers, .* got 8"),
        ({"rope_theta": float("nan")}, "rope_theta of the rotary positions must be a number above 0, got nan"),
        ({"original_max_position_embeddings": -4}, "original_max_position_embeddings of the rotary positions must be"),
        ({"rope_type": "long"}, "rope_type is 'long': it must be one of default, .*longrope"),
    ],
)
def test_bad_rotary_positions(changes, said, tmp_path):
    make("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters={**LONG, **changes})
    fails(tmp_path, said)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
