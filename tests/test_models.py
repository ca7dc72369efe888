"""Targets against plain Transformers and each other: chains, trees, batches, windows, features; what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from foredraft import LLM, SamplingParams
from foredraft.cache.blocks import BLOCK, num_blocks
from foredraft.core.tree import TreeBatch
from foredraft.kernels.attention import any_length_kernels
from foredraft.kernels.prefixes import prefix_search, trie
from foredraft.models.check import refuse_unsupported, self_check
from foredraft.models.groups import groups_of
from foredraft.models.hf import HFTarget
from foredraft.models.llama import LlamaTarget

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

LLAMA_FAMILY = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-one-head": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": 5},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
}
OTHERS = {
    "gpt2": GPT_SIZES,
    "gpt_neox": {},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 7},
    "phi3": {"sliding_window": 5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {},
    "falcon": {"alibi": False},
    "gptj": GPT_SIZES | {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.5},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "mixtral": EXPERTS | {"sliding_window": 5},
}
# The paths from the root: 0-1-3-6-8, 0-1-3-6-10, 0-1-5, 0-2-4-7, 0-2-9.
PARENTS = [-1, 0, 0, 1, 2, 1, 3, 4, 6, 2, 6]


def make_config(name: str, **more):
    kind = name.split("-")[0]
    options = {**LLAMA_FAMILY, **OTHERS}.get(name, {}) | more
    return AutoConfig.for_model(kind, **(options if kind in ("gpt2", "gptj") else SIZES | options))


def make_model(name: str, dtype: torch.dtype = torch.float32, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name, **more), dtype=dtype).eval()
    for parameter in model.parameters():  # fresh norms are all ones and fresh biases zero, and would hide a mistake
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.15)
    return model


def make_targets(name: str, dtype: torch.dtype = torch.float32):
    model = make_model(name, dtype)
    targets = [HFTarget(model)]
    if name in LLAMA_FAMILY:
        own, graphed = (LlamaTarget(model.config, model.state_dict(), dtype, torch.device("cpu")) for _ in range(2))
        graphed.graphs = replace(graphed.make_graphs(replayed), seen_before=0)
        targets += [own, graphed]
    return model, targets


def replayed(run):
    """Stands in for the capture of a CUDA graph: runs again, into the tensors of the first time."""
    outputs = run()

    def again():
        for kept, new in zip(outputs, run(), strict=True):
            if kept is not None:
                kept.copy_(new)

    return outputs, again


def plain(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(VOCAB, size=count).tolist()


def paths_of(parents):
    tree = TreeBatch.chains([range(len(parents))], [parents])[0]
    return [[0, *tree.path_to(node)] for node in range(len(parents))]


def prefilled(target, pool, prompt):
    cache = pool.allocate()
    if prompt:
        scores = target.forward(TreeBatch.chains([prompt]), [cache], rows=np.arange(0))
        assert scores.logits.shape == (0, VOCAB)
        pool.keep([cache], [range(1, len(prompt))])
    return cache


def expected(model, prompt, tokens, parents):
    """Last logits of every root-to-node path, run alone by the plain model."""
    return torch.stack([plain(model, [*prompt, *(tokens[i] for i in path)])[-1] for path in paths_of(parents)])


def assert_close(got, wanted, tolerance=1e-4):
    torch.testing.assert_close(got.double(), wanted.double(), atol=tolerance, rtol=0)


every_model = pytest.mark.parametrize("name", [*LLAMA_FAMILY, *OTHERS])


@every_model
def test_chain_and_tree_agree_with_plain_transformers(name):
    model, targets = make_targets(name)
    prompt, tokens = tokens_of(1, 9), tokens_of(2, len(PARENTS))
    wanted = expected(model, prompt, tokens, PARENTS)
    for target in targets:
        pool = target.new_pool(8)
        assert_close(target.forward(TreeBatch.chains([prompt]), [pool.allocate()]).logits, plain(model, prompt))
        cache = prefilled(target, pool, prompt)
        assert cache.length == 9
        assert_close(target.forward(TreeBatch.chains([tokens], [PARENTS]), [cache]).logits, wanted)


@every_model
def test_logits_of_a_ctc_trie_are_those_of_each_path_run_alone(name):
    """Of random slots: paths that repeat a token at the start, in the middle and at the end among them."""
    model, targets = make_targets(name)
    prompt = tokens_of(1, 9)
    law = np.random.default_rng(0).dirichlet(np.full(4, 0.7), 6)
    slots = np.tile([5, 17, 42], (6, 1))
    tokens, parents = trie(prefix_search(slots, law[:, :3], law[:, 3], nodes=24, depth=6), root=5)
    drafted = [[tokens[node] for node in path] for path in paths_of(parents)]
    assert {place for path in drafted for place in range(1, len(path)) if path[place] == path[place - 1]} >= {1, 2, 3}
    wanted = expected(model, prompt, tokens, parents)
    for target in targets:
        pool = target.new_pool(8)
        cache = prefilled(target, pool, prompt)
        assert_close(target.forward(TreeBatch.chains([tokens], [parents]), [cache]).logits, wanted)


@every_model
def test_ragged_batch_keep_and_continue(name):
    """Trees of 11, 1 and 4 nodes over contexts of 9, 0 and 13 tokens; then paths are kept and chains follow."""
    model, targets = make_targets(name)
    prompts = [tokens_of(1, 9), [], tokens_of(3, 13)]
    shapes = [PARENTS, [-1], [-1, 0, 0, 2]]
    trees = [tokens_of(10 + b, len(shape)) for b, shape in enumerate(shapes)]
    paths = [[2, 4, 7], [], [2, 3]]
    after = [tokens_of(20 + b, 2 + b) for b in range(3)]
    whole = [p + [t[0]] + [t[i] for i in path] + a for p, t, path, a in zip(prompts, trees, paths, after, strict=True)]
    wanted = torch.cat([expected(model, *one) for one in zip(prompts, trees, shapes, strict=True)])
    wanted_after = torch.cat([plain(model, one)[-len(a) :] for one, a in zip(whole, after, strict=True)])
    for target in targets:
        pool = target.new_pool(16)
        pool.allocate().reserve(1)  # blocks that do not start at the first
        caches = [prefilled(target, pool, prompt) for prompt in prompts]
        batch = TreeBatch.chains(trees, shapes)
        assert_close(target.forward(batch, caches).logits, wanted)
        rows = np.array([1, 10, 13, 15])
        assert_close(target.forward(batch, caches, rows).logits, wanted[rows])
        pool.keep(caches, paths)
        assert [cache.length for cache in caches] == [13, 1, 16]
        order = [2, 0, 1]  # blocks that do not follow one another
        scores = target.forward(TreeBatch.chains([after[b] for b in order]), [caches[b] for b in order])
        parts = wanted_after.split([len(a) for a in after])
        assert_close(scores.logits, torch.cat([parts[b] for b in order]))


@every_model
def test_a_tree_in_several_parts(name):
    model, targets = make_targets(name)
    prompt, tokens, other = tokens_of(1, 7), tokens_of(2, len(PARENTS)), tokens_of(4, 5)
    wanted = expected(model, prompt, tokens, PARENTS)
    chain = [-1, 0, 1, 2, 3]
    wanted_other = expected(model, [], other, chain)
    for target in targets:
        pool = target.new_pool(8)
        caches = [pool.allocate(), prefilled(target, pool, prompt)]
        first = TreeBatch.chains([other[:4], tokens[:6]], [chain[:4], PARENTS[:6]])
        assert_close(target.forward(first, caches).logits, torch.cat([wanted_other[:4], wanted[:6]]))
        batch = TreeBatch.chains([other, tokens], [chain, PARENTS])
        scores = target.forward(batch, caches, start=[4, 6])
        assert_close(scores.logits, torch.cat([wanted_other[4:], wanted[6:]]))
        some = target.forward(batch, caches, np.array([4, 15]), start=[4, 6])
        assert_close(some.logits, torch.stack([wanted_other[4], wanted[10]]))


@every_model
def test_features_and_head(name):
    model, targets = make_targets(name)
    tokens = tokens_of(1, 6)
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    states = [one[0] for one in output.hidden_states]
    last = len(states) - 1
    wide = states[0].shape[-1]
    for target in targets:
        batch = TreeBatch.chains([tokens[:4], tokens], [[-1, 0, 1, 2], [-1, 0, 1, 2, 3, 4]])
        pool = target.new_pool(8)
        caches = [pool.allocate(), pool.allocate()]
        scores = target.forward(batch, caches, rows=np.array([9]), feature_layers=(0, 2, last, -1))
        assert scores.features is not None and scores.features.shape == (10, 4 * wide)
        first, middle, unnormed, final = scores.features[4:].split(wide, dim=-1)
        assert_close(first, states[0])
        assert_close(middle, states[2])
        assert_close(final, states[-1])
        assert_close(target.head(final), output.logits[0])
        assert (unnormed - final).abs().max() > 1e-3
        assert_close(target.embed(torch.tensor(tokens)), model.get_input_embeddings()(torch.tensor(tokens)).detach())


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    model, targets = make_targets(name, dtype)
    prompt, tokens = tokens_of(1, 7), tokens_of(2, len(PARENTS))
    wanted = expected(model, prompt, tokens, PARENTS).double()
    # The rounding of some hundred operations; the plain models compute norms in float32 even in float64.
    tolerance = max(32 * torch.finfo(dtype).eps, 1e-5) * float(wanted.abs().max())
    for target in targets:
        pool = target.new_pool(4)
        scores = target.forward(TreeBatch.chains([tokens], [PARENTS]), [prefilled(target, pool, prompt)])
        assert scores.logits.dtype == dtype
        assert_close(scores.logits, wanted, tolerance)


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "mistral"])
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_graphs_are_reused_and_change_nothing(name, num_seqs, monkeypatch):
    """Many steps of random trees, whole or in two parts, with lengths that pass the ends of buckets."""
    monkeypatch.setattr("foredraft.models.graphs.LENGTH_STEP", BLOCK)
    model, captured = make_model(name, torch.float64), []

    def capture(run):
        captured.append(run)
        return replayed(run)

    targets = [LlamaTarget(model.config, model.state_dict(), torch.float64, torch.device("cpu")) for _ in range(2)]
    targets[1].graphs = targets[1].make_graphs(capture)
    pools = [one.new_pool(num_blocks(64, num_seqs)) for one in targets]
    caches = [[pool.allocate() for _ in range(num_seqs)] for pool in pools]
    rng, num_steps, longest = np.random.default_rng(0), 60, 0
    for _ in range(num_steps):
        sizes = rng.integers(1, 9, num_seqs).tolist()
        parents = [[-1, *(int(rng.integers(i)) for i in range(1, size))] for size in sizes]
        tokens = [rng.integers(VOCAB, size=size).tolist() for size in sizes]
        begin = [int(rng.integers(1, size)) if size > 1 else 0 for size in sizes]
        batch = TreeBatch.chains(tokens, parents)
        part = TreeBatch.chains(*([one[:k] for one, k in zip(many, begin, strict=True)] for many in (tokens, parents)))
        found = []
        for target, pool, mine in zip(targets, pools, caches, strict=True):
            if all(begin):
                target.forward(part, mine)
            found.append(target.forward(batch, mine, start=begin if all(begin) else None, feature_layers=(1, -1)))
            pool.keep(mine, [batch[b].path_to(size - 1) for b, size in enumerate(sizes)])
            longest = max(longest, *(cache.length for cache in mine))
            for cache in mine:
                cache.truncate(min(cache.length, 40))
        for kept, wanted in zip(found[1], found[0], strict=True):
            assert_close(kept, wanted, 1e-10)
    assert longest > 40
    assert 0 < len(captured) < num_steps / 2


def test_attention_on_a_card_needs_no_plan():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with any_length_kernels(torch.device("cuda")):
        assert not enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert enabled()
    with any_length_kernels(torch.device("cpu")):
        assert enabled()


def test_sizes_and_context():
    _, (target,) = make_targets("gpt2")
    assert (target.vocab_size, target.max_len) == (VOCAB, 64)
    long = make_config("phi3", max_position_embeddings=256, original_max_position_embeddings=32)
    long.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    long.rope_parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert HFTarget(AutoModelForCausalLM.from_config(long)).max_len == 32


def test_keys_and_values_of_different_sizes():
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}
    model = make_model("minicpm3", num_key_value_heads=4, **latent)
    self_check(HFTarget(model))


@every_model
def test_self_check_passes(name):
    for target in make_targets(name)[1]:
        self_check(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_self_check_fails_without_the_mask(name, dtype):
    class Blind(HFTarget):
        def _masks(self, layout):
            masks = super()._masks(layout)
            zeros = torch.zeros(len(layout.lengths), 1, layout.width, layout.length, dtype=self.dtype)
            return dict.fromkeys(masks, zeros) if isinstance(masks, dict) else zeros

    with pytest.raises(ValueError, match=rf"cannot run model type '{name}' over token trees: its logits"):
        self_check(Blind(make_model(name, dtype)))


def test_self_check_fails_without_the_window():
    class Far(HFTarget):
        def __init__(self, model):
            super().__init__(model)
            self._windows = dict.fromkeys(self._windows)

    with pytest.raises(ValueError, match="its logits in a tree"):
        self_check(Far(make_model("gemma2")))


def test_self_check_fails_for_a_llama_with_wrong_positions():
    class Straight(LlamaTarget):
        def forward(self, batch, caches, rows=None, **options):
            self._cos = self._cos.roll(1, 0)
            return super().forward(batch, caches, rows, **options)

    model = make_model("llama")
    with pytest.raises(ValueError, match="its logits in a tree"):
        self_check(Straight(model.config, model.state_dict(), torch.float32, torch.device("cpu")))


def test_self_check_says_what_a_target_raised():
    class Broken(HFTarget):
        def forward(self, *args, **kwargs):
            raise KeyError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        self_check(Broken(make_model("gpt2")))


def test_bidirectional_attention_is_found_out():
    with pytest.raises(ValueError, match="cannot run model type 'bert' over token trees"):
        self_check(HFTarget(make_model("bert", is_decoder=False)))


def test_a_model_that_keeps_no_keys_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **GPT_SIZES))
    with pytest.raises(ValueError, match="keep no keys and values of their own"):
        HFTarget(model)


REFUSED = {
    "mamba": ({}, "state-space"),
    "falcon_mamba": ({}, "state-space"),
    "jamba": ({}, "hybrid attention and state-space"),
    "bamba": ({}, "hybrid attention and state-space"),
    "qwen3_next": ({}, "linear attention"),
    "minimax": ({}, "linear attention"),
    "lfm2": ({"layer_types": ["conv", "conv", "full_attention"]}, "conv"),
    "rwkv": ({}, "recurrent"),
    "recurrent_gemma": ({}, "recurrent"),
    "bloom": ({}, "ALiBi"),
    "mpt": ({}, "ALiBi"),
    "falcon": ({"alibi": True}, "ALiBi"),
    "t5": ({}, "encoder-decoder"),
    "bart": ({}, "encoder-decoder"),
    "llama4_text": ({}, "chunked attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_layer_type(name):
    options, named = REFUSED[name]
    with pytest.raises(ValueError, match=named) as error:
        refuse_unsupported(AutoConfig.for_model(name, **options, **({"num_hidden_layers": 3} if options else {})))
    assert "\n" not in str(error.value) and repr(name) in str(error.value)


@every_model
def test_not_refused(name):
    refuse_unsupported(make_config(name))


def test_no_warning_of_transformers_reaches_the_user(tmp_path: Path) -> None:
    """The argument for the cache has another name from Transformers 5.24 on."""
    make_model("gpt2").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(tmp_path, {"method": "suffix", "num_speculative_tokens": 4})
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids


def seen_widths(target, monkeypatch) -> list[tuple[int, int]]:
    """Number of trees and width of every padded batch that a target runs from now on, as if it were a small model on a CPU."""
    shapes, run = [], target._forward
    monkeypatch.setattr(target, "_extra_rows", 32)

    def counted(feature_layers, pool, layout, rows):
        shapes.append((len(layout.lengths), layout.width))
        return run(feature_layers, pool, layout, rows)

    monkeypatch.setattr(target, "_forward", counted)
    return shapes


WIDE = [PARENTS[:5], [-1], [*range(-1, 39)], [-1, 0, 1]]
"""Trees of a step: two that decode, and the parts of two prompts."""


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2", "gemma2"])
def test_trees_of_different_widths_run_in_groups(name, started, monkeypatch):
    """Logits and features are those of each tree run alone, for all rows, some, none, and rows in any order."""
    _, targets = make_targets(name, torch.float64)
    contexts = [tokens_of(50 + b, length) for b, length in enumerate((9, 4, 13, 0))]
    trees = [tokens_of(60 + b, len(parents)) for b, parents in enumerate(WIDE)]
    begin = [2, 0, 1, 0] if started else None
    for target in targets:
        pool = target.new_pool(8)
        caches = [prefilled(target, pool, context) for context in contexts]
        alone = []
        for b, (tokens, parents) in enumerate(zip(trees, WIDE, strict=True)):
            mine = {"start": None if begin is None else [begin[b]]}
            if started and begin[b]:
                target.forward(TreeBatch.chains([tokens[: begin[b]]], [parents[: begin[b]]]), [caches[b]])
            alone.append(target.forward(TreeBatch.chains([tokens], [parents]), [caches[b]], feature_layers=(1, -1), **mine))
        wanted, features = torch.cat([s.logits for s in alone]), torch.cat([s.features for s in alone])
        shapes = seen_widths(target, monkeypatch)
        batch, layers = TreeBatch.chains(trees, WIDE), {"feature_layers": (1, -1), "start": begin}
        new = np.concatenate([batch.offsets[b] + np.arange(begin[b] if begin else 0, len(WIDE[b])) for b in range(4)])
        shuffled = np.random.default_rng(0).permutation(new)
        for rows in (None, new, new[::7], new[:3], new[-1:], new[:0], shuffled, shuffled[:9]):
            scores = target.forward(batch, caches, rows, **layers)
            asked = slice(None) if rows is None else np.searchsorted(new, rows)
            assert scores.logits.shape == wanted[asked].shape
            assert_close(scores.logits, wanted[asked], 1e-12)
            assert_close(scores.features, features, 1e-12)
        assert target.forward(batch, caches, start=begin).features is None
        assert {*shapes} == {(2, 3 if started else 5), (1, 39 if started else 40), (1, 3)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_beside_many_trees_is_not_padding_for_them(name, monkeypatch):
    _, targets = make_targets(name)
    sizes = [1, 5, 1, 2, 1, 1, 4, 1, 48, 48, 7]
    batch = TreeBatch.chains([tokens_of(b, size) for b, size in enumerate(sizes)])
    for target in targets:
        shapes, pool = seen_widths(target, monkeypatch), target.new_pool(2 * len(sizes))
        target.forward(batch, [pool.allocate() for _ in sizes])
        assert shapes == [(8, 5), (2, 48), (1, 7)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_chunk_of_a_prompt_is_split_from_decoding(name, monkeypatch):
    """With the number of padding rows that a target accepts by itself."""
    for target in make_targets(name)[1]:
        ours, pool = target._extra_rows, target.new_pool(20)
        shapes = seen_widths(target, monkeypatch)
        target._extra_rows = ours
        target.forward(TreeBatch.chains([[3]] * 10 + [tokens_of(1, 60)]), [pool.allocate() for _ in range(11)])
        assert shapes == [(10, 1), (1, 60)]


@pytest.mark.parametrize("extra", [1, 8, 32])
def test_groups_have_the_least_cost(extra):
    """Against all ways to split up to seven trees. Equal widths, and little padding, are one group."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        widths = rng.choice([0, 1, 1, 2, 5, 30, 40], size=int(rng.integers(1, 8)))
        count, costs = len(widths), []
        for cuts in range(1 << (count - 1)):
            bounds = [0, *(i for i in range(1, count) if cuts >> (i - 1) & 1), count]
            costs.append(sum(extra + (end - first) * widths[first:end].max() for first, end in pairwise(bounds)))
        groups = groups_of(widths, extra)
        assert [i for group in groups for i in range(count)[group]] == [*range(count)]
        assert sum(extra + (group.stop - group.start) * widths[group].max() for group in groups) == min(costs)
        assert groups_of(np.full(count, 2048), extra) == [slice(0, count)]
