"""Draft heads: their sizes, how gradients run through them, and that they draft behind a cache what they say without one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foredraft import LLM
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.params import SamplingParams
from foredraft.core.setting import Setting
from foredraft.core.tree import DraftTree, TreeBatch
from foredraft.drafters import DRAFTERS, pairs
from foredraft.drafters.along import Roots
from foredraft.drafters.compiled import compile_linears
from foredraft.drafters.growing import paths_of
from foredraft.drafters.hydra import HydraDrafter
from foredraft.drafters.recurrent import RecurrentDrafter
from foredraft.drafters.slots import LayerSlots
from foredraft.heads import HEADS
from foredraft.heads.eagle import FeatureHead
from foredraft.heads.folder import layer_config, read_head
from foredraft.heads.layers import Shape
from foredraft.importers.convert import examine
from foredraft.kernels import library
from foredraft.kernels.layouts import FULL, QUANTIZED
from foredraft.kernels.prefixes import prefix_search, trie
from foredraft.models.checkpoint import ModelError, read_json
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget
from foredraft.train.attention import tables, unrolled, with_slots
from foredraft.trees import GROWERS
from narrow import narrow_head
from quantized import QuantizedTarget, in_four_bits, round_inputs
from test_models import replayed

DATA = Path(__file__).parent / "data"
STORIES = DATA / "babyllama-105"
HEAD_FOLDER = DATA / "heads"
NARROW = "narrow eagle3"
RECURRENT, SLOTS = ("eagle", "fspad", "eagle3", NARROW), ("medusa", "parallel")
TOKENS = [1, 14, 33, 7, 52, 19, 88, 3, 41, 60, 22, 9, 71, 30]

BOTH = [(False, False), (True, False), (False, True), (True, True)]
SIZES = {  # methods.md 4.6: EAGLE, with feature sampling, with partial alignment, FSPAD
    "Vicuna-7B": (Shape(4096, 11008, 32, 32, 128, 1e-6, 32000), (235_937_792, 371_208_192, 281_026_560, 416_296_960)),
    "Vicuna-33B": (Shape(6656, 17920, 52, 52, 128, 1e-6, 32000), (623_653_888, 981_487_104, 742_929_408, 1_100_762_624)),
    "LLaMA3-70B": (Shape(8192, 28672, 64, 8, 128, 1e-5, 128256), (989_872_128, 1_694_523_392, 1_224_753_152, 1_929_404_416)),
}
SMALL = Shape(32, 48, 4, 2, 8, 1e-6, 50)


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str) -> None:
    shape, expected = SIZES[name]
    with torch.device("meta"):
        heads = [FeatureHead(shape, feature_sampling=sampling, partial_alignment=partial) for sampling, partial in BOTH]
    assert tuple(sum(one.numel() for one in head.parameters()) for head in heads) == expected


def test_fspad_with_both_parts_off_is_eagle() -> None:
    made = []
    for method, options in (("eagle", {}), ("fspad", {"feature_sampling": False, "partial_alignment": False})):
        torch.manual_seed(3)
        made.append(HEADS[method].make(SMALL, **options))
    weights = [head.state_dict() for head in made]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    inputs = torch.randn(2, 1, 6, 32, generator=torch.Generator().manual_seed(0))
    outs = [head(*inputs, unrolled(rotary())) for head in made]
    assert torch.equal(outs[0].scored, outs[1].scored)
    assert outs[0].scored is outs[0].carried


def rotary() -> Any:
    from transformers import LlamaConfig

    return tables(
        LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=64), torch.device("cpu")
    )


@pytest.mark.parametrize("sampling", [False, True])
def test_partial_alignment_routes_gradients(sampling: bool) -> None:
    torch.manual_seed(0)
    head = FeatureHead(SMALL, feature_sampling=sampling, partial_alignment=True)
    for part, mine, other in (("scored", slice(0, 32), slice(32, 64)), ("carried", slice(32, 64), slice(0, 32))):
        head.zero_grad()
        out = head(torch.randn(1, 5, 32), torch.randn(1, 5, 32), unrolled(rotary()))
        getattr(out, part).square().sum().backward()
        rows = head.layers[0].mlp.down_proj.weight.grad
        assert rows is not None
        assert rows[mine].abs().max() > 0
        assert rows[other].abs().max() == 0
        upstream = [p.grad for name, p in head.named_parameters() if "down_proj" not in name or "fc" in name]
        assert all(one is not None and one.abs().max() > 0 for one in upstream)


def test_degenerate_heads_are_the_ablations() -> None:
    """Equal halves make FSPAD the head with feature sampling alone; without its entry's perceptron, the one with alignment
    alone."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 1, 6, 32)
    full = FeatureHead(SMALL, feature_sampling=True, partial_alignment=True)
    down = full.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        down[32:] = down[:32]
    out = full(*inputs, unrolled(rotary()))
    torch.testing.assert_close(out.scored, out.carried)
    sampling = FeatureHead(SMALL, feature_sampling=True)
    weights = full.state_dict() | {"layers.0.mlp.down_proj.weight": down[:32]}
    sampling.load_state_dict(weights)
    torch.testing.assert_close(sampling(*inputs, unrolled(rotary())).scored, out.scored)

    full = FeatureHead(SMALL, feature_sampling=True, partial_alignment=True)
    with torch.no_grad():
        full.fc.mlp.down_proj.weight.zero_()
    partial = FeatureHead(SMALL, partial_alignment=True)
    weights = {name.replace("fc.fc.", "fc."): one for name, one in full.state_dict().items() if not name.startswith("fc.mlp")}
    weights.pop("fc.post_attention_layernorm.weight")
    partial.load_state_dict(weights)
    pair = [head(*inputs, unrolled(rotary())) for head in (full, partial)]
    torch.testing.assert_close(pair[0].scored, pair[1].scored)
    torch.testing.assert_close(pair[0].carried, pair[1].carried)


@cache
def target() -> Any:
    return load_target(STORIES, dtype="float32", device="cpu")


def features_of(tokens: list[int], layers: Any) -> Tensor:
    pool = target().new_pool(16)
    scores = target().forward(TreeBatch.chains([tokens]), [pool.allocate()], np.empty(0, np.int64), feature_layers=layers)
    return scores.features.clone()


def work_of(states: list[Any], roots: list[int], budget: Budget, temperature: float | int = 1) -> Work:
    many = len(states)
    return Work(states, roots, [budget] * many, [SamplingParams(temperature=temperature)] * many, [Draws(0)] * many)


class Remembering:
    """A grower that asks for the laws of a fixed tree level by level and remembers them."""

    def __init__(self, tokens: list[int], parents: list[int]):
        self.tree = TreeBatch.chains([tokens], [parents])[0]
        self.rows: dict[int, Tensor] = {}

    def grow(self, drafter: Any, work: Work) -> TreeBatch:
        batch = TreeBatch.chains([[work.roots[0], *self.tree.tokens[1:].tolist()]], [self.tree.parents.tolist()])
        self.tree = batch[0]
        for depth in range(min(int(self.tree.depths.max()), work.budgets[0].depth - 1) + 1):
            nodes = np.flatnonzero(self.tree.depths == depth)
            self.rows |= dict(zip(nodes.tolist(), drafter.expand(work.states, batch, nodes), strict=True))
        return batch


@cache
def folder_of(name: str) -> Path:
    return narrow_head(STORIES, Path(mkdtemp())) if name == NARROW else HEAD_FOLDER / name


def drafter_of(method: str, grower: Any) -> Any:
    own = method.split()[-1]
    setting = Setting(
        method=own,
        target=target(),
        model=folder_of(method),
        load=lambda _: None,
        vocabulary=lambda _: None,
        grower=grower,
        fingerprint=lambda: "",
    )
    return DRAFTERS[own].build(setting, force=True)


def without_cache(method: str, tokens: list[int], path: list[int]) -> Tensor:
    """The law behind `path`, from one run over everything, by the code that trains: no cache, no tree."""
    loaded = read_head(folder_of(method))
    head, tabs = loaded.head, tables(loaded.config, torch.device("cpu"))
    given = features_of(tokens[:-1], head.feature_layers)
    embed = target().embed
    if method in RECURRENT:
        features, ids = head.fuse(given), list(tokens[1:])
        for token in [*path, None]:
            out = head(head.embed(torch.tensor(ids), embed)[None], features[None], unrolled(tabs))
            features = torch.cat([features, out.carried[0, -1:]])
            ids.append(token or 0)
        return head.logits(out.scored[0, -1:], target().head)[0]
    if method == "medusa":
        return head(given[-1:])[0, len(path)]
    if method == "hydra":
        read = head.read(given[None], unrolled(tabs))[0, -1:]
        embedded = embed(torch.tensor([tokens[-1], *path])).flatten()[None]
        return head(len(path), read, embedded)[0]
    entries = head.enter(embed(torch.tensor(tokens[1:])), given)
    slots = head.enter_ahead(embed(torch.tensor(tokens[-1:])), given[-1:])[0]
    attend = with_slots(tabs, len(entries), torch.tensor([[len(entries) - 1]]), head.num_slots - 1)
    out = head(torch.cat([entries, slots])[None], attend)[0, len(entries) - 1 :]
    return head.logits(out, target().head)[len(path)]


TREES = {
    "wide": ([0, 5, 9, 14, 5, 5, 70, 21], [-1, 0, 0, 1, 1, 2, 3, 3]),
    "chain": ([0, 5, 5, 14], [-1, 0, 1, 2]),
    "repeats": ([0, 5, 5, 5], [-1, 0, 0, 1]),
}


@pytest.mark.parametrize("method", [*RECURRENT, *SLOTS, "hydra"])
@pytest.mark.parametrize("shape", TREES)
@torch.inference_mode()
def test_drafts_behind_its_cache_what_it_says_without_one(method: str, shape: str) -> None:
    """Over three steps, the last of which commits several tokens, on trees with branches and repeated tokens."""
    grower = Remembering(*TREES[shape])
    drafter = drafter_of(method, grower)
    known = 5
    state = drafter.start(TOKENS[:known], features_of(TOKENS[: known - 1], drafter.feature_layers))
    for more in (1, 4, 0):
        drafter.propose(work_of([state], [TOKENS[known - 1]], Budget(8, 8)))
        tree: DraftTree = grower.tree
        assert len(grower.rows) > 1
        for node, row in grower.rows.items():
            path = tree.tokens[tree.path_to(node)].tolist()
            torch.testing.assert_close(row, without_cache(method, TOKENS[:known], path), atol=1e-4, rtol=1e-4)
        new = TOKENS[known : known + more]
        before = features_of(TOKENS[: known + more - 1], drafter.feature_layers)[known - 1 :]
        if more:
            drafter.observe(state, new, before, list(range(more - 1)))
        known += more
        grower.rows = {}


def test_paths_to_all_nodes_at_once() -> None:
    rng = np.random.default_rng(0)
    parents = [[-1, *(int(rng.integers(i)) for i in range(1, size))] for size in (1, 12, 30)]
    batch = TreeBatch.chains([[0] * len(one) for one in parents], parents)
    node_ids = rng.permutation(43)
    for node, owner, depth, nodes in zip(node_ids.tolist(), *paths_of(batch, node_ids), strict=True):
        owner, begin = int(owner), int(batch.offsets[owner])
        assert begin <= node < batch.offsets[owner + 1]
        assert [begin, *(begin + one for one in batch[owner].path_to(node - begin))] == nodes[depth::-1].tolist()
        assert set(nodes[depth:].tolist()) == {begin}


@pytest.mark.parametrize("method", [*RECURRENT, *SLOTS, "hydra"])
@torch.inference_mode()
def test_requests_of_a_batch_draft_what_they_draft_alone(method: str) -> None:
    """Two trees with different depths in one call, the nodes of both mixed."""
    shapes, known = [TREES["wide"], TREES["chain"]], (5, 9)
    tokens = [[TOKENS[n - 1], *tokens[1:]] for n, (tokens, _) in zip(known, shapes, strict=True)]
    batch = TreeBatch.chains(tokens, [parents for _, parents in shapes])
    drafter = drafter_of(method, GROWERS["chain"].grower())
    states = [drafter.start(TOKENS[:n], features_of(TOKENS[: n - 1], drafter.feature_layers)) for n in known]
    together: dict[int, Tensor] = {}
    for nodes in ([0], [8, 1], [4, 9, 2], [10, 3]):
        together |= dict(zip(nodes, drafter.expand(states, batch, np.array(nodes)), strict=True))
    for b, n in enumerate(known):
        tree, begin = batch[b], int(batch.offsets[b])
        for node in (one - begin for one in together if begin <= one < batch.offsets[b + 1]):
            wanted = without_cache(method, TOKENS[:n], tree.tokens[tree.path_to(node)].tolist())
            torch.testing.assert_close(together[begin + node], wanted, atol=1e-4, rtol=1e-4)


def test_a_prompt_of_one_token_drafts_nothing_until_the_target_has_run() -> None:
    for method in HEADS:
        drafter = drafter_of(method, GROWERS["chain"].grower())
        state = drafter.start(TOKENS[:1], None)
        [batch] = [drafter.propose(work_of([state], TOKENS[:1], Budget(4, 4)))]
        assert len(batch.tokens) == 1
        drafter.observe(state, TOKENS[1:2], features_of(TOKENS[:1], drafter.feature_layers), [])
        assert len(drafter.propose(work_of([state], TOKENS[1:2], Budget(4, 4), 0)).tokens) > 1
        drafter.finish(state)


def test_a_long_prompt_is_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (TOKENS * 8)[:90]
    for method in ("fspad", "ctc", "hydra"):
        trees = []
        for chunk in (512, 16):
            monkeypatch.setattr(pairs, "PREFILL_CHUNK", chunk)
            drafter = drafter_of(method, GROWERS["topk"].grower())
            state = drafter.start(tokens, features_of(tokens[:-1], drafter.feature_layers))
            trees.append(drafter.propose(work_of([state], tokens[-1:], Budget(8, 4), 0)).tokens.tolist())
        assert trees[0] == trees[1]


def test_slots_are_filled_up_to_the_end_of_the_context() -> None:
    """Where fewer tokens fit than there are slots, beside a short request in one batch."""
    end = target().max_len
    text = (TOKENS * 20)[:end]
    for method in ("parallel", "ctc"):
        drafter = drafter_of(method, GROWERS["chain"].grower() if method == "parallel" else None)
        lengths = end - 1, end, 9
        states = [drafter.start(text[:n], features_of(text[: n - 1], drafter.feature_layers)) for n in lengths]
        batch = drafter.propose(work_of(states, [text[n - 1] for n in lengths], Budget(8, 8), 0))
        depths = [int(batch[b].depths.max()) for b in range(3)]
        assert depths[0] == 2
        assert depths[1] == 1
        assert depths[2] > 2


@torch.inference_mode()
def test_a_ctc_trie_is_that_of_the_slots_at_the_temperature_of_draft_laws() -> None:
    """The request's, and 0.6 where it is greedy; requests of one batch each at their own."""
    drafter = drafter_of("ctc", None)
    features = features_of(TOKENS[:8], drafter.feature_layers)
    states = [drafter.start(TOKENS[:9], features) for _ in range(2)]
    sampling = [SamplingParams(temperature=one) for one in (0.0, 1.0)]
    batch = drafter.propose(replace(work_of(states, [TOKENS[8]] * 2, Budget(12, 6)), sampling=sampling))
    trees = [(batch[b].tokens.tolist(), batch[b].parents.tolist()) for b in range(2)]
    slots = torch.stack([without_cache("ctc", TOKENS[:9], [0] * k) for k in range(drafter.slots.num_tokens)]).double()
    for tree, heat in zip(trees, (0.6, 1.0), strict=True):
        probs = (slots / heat).softmax(-1)
        best, tokens = (one.numpy() for one in probs[:, :-1].topk(8))
        assert tree == trie(prefix_search(tokens, best, probs[:, -1].numpy(), nodes=12, depth=6), TOKENS[8])
    assert trees[0] != trees[1]


def head_of(method: str, config: Any, **more: Any) -> Any:
    """A head of random weights in bfloat16, its logits about as large as those of a trained one."""
    options = {"feature_layers": [2, 4, 5], "draft_vocab_size": 1000} if method in ("eagle3", NARROW) else {}
    head = HEADS[method.split()[-1]].make(Shape.of(config), **options, **more)
    if options:
        head.d2t += 3 * torch.arange(1000)
        torch.nn.init.normal_(head.lm_head.weight, std=0.6 * config.hidden_size**-0.5)
        torch.nn.init.normal_(head.norm.weight, 1.0, 0.1)
        torch.nn.init.normal_(head.midlayer.hidden_norm.weight, 1.0, 0.2)
    return head.bfloat16()


def with_quantized_layers(head: Any) -> NativeTarget:
    """Rounds the linear layers of a head and what they are given; the bundled target with an output layer of that kind."""
    for one in head.modules():
        if isinstance(one, torch.nn.Linear):
            one.weight.data = in_four_bits(one.weight.data).to(one.weight.dtype)
            one.register_forward_pre_hook(round_inputs)
    weights, name = load_file(BUNDLED_TARGET / "model.safetensors"), "model.embed_tokens.weight"
    rounded = in_four_bits(weights[name]).to(weights[name].dtype)
    return QuantizedTarget(load_target(BUNDLED_TARGET, device="cpu").config, {**weights, name: rounded})


NEAR = {FULL: (0.05, 0.005), QUANTIZED: (0.1, 0.01)}
"""Largest and mean difference between logits of size 3 of the compiled layer and of the plain one, which rounds to bfloat16
in more places. With four bits an input that this moves may fall on the other side between two of its 127 steps."""


def are_near(plain: Tensor, compiled: Tensor, bits: int) -> bool:
    off = (plain - compiled).abs()
    return off.max() < NEAR[bits][0] and off.mean() < NEAR[bits][1]


COMPILED: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in ("eagle", "fspad", "eagle3", NARROW)),
    *(("eagle", {"qkv_bias": True}), ("eagle3", {"qkv_bias": True, "qk_norm": True, "own_embedding": True})),
]


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("bits", [FULL, QUANTIZED])
@pytest.mark.parametrize(("method", "options"), COMPILED)
def test_the_compiled_layer_is_the_plain_one(method: str, options: dict[str, Any], bits: int) -> None:
    """In bfloat16, as far as `NEAR` says. A node of a tree has bit for bit what it has in a chain. With weights of four bits it
    is the plain one of the weights and inputs that the bits say."""
    native = load_target(BUNDLED_TARGET, device="cpu")
    config = layer_config(native.config, native.vocab_size, {"hidden": 192} if method == NARROW else {})
    torch.manual_seed(0)
    head = head_of(method, config, **options)
    native = native if bits == FULL else with_quantized_layers(head)
    tokens = list(range(5, 45))
    cache = native.new_pool(4).allocate()
    none = np.empty(0, np.int64)
    features = native.forward(TreeBatch.chains([tokens]), [cache], none, feature_layers=head.feature_layers).features

    def laws(shape: tuple[list[int], list[int]], compiled: bool) -> Tensor:
        grower = Remembering(*shape)
        drafter = RecurrentDrafter(head, config, native, grower, compiled=compiled, weight_bits=bits)
        state, found = drafter.start(tokens[:30], features[:29]), []
        for more in (3, 0):
            drafter.propose(work_of([state], [tokens[29 if more else 32]], Budget(8, 8)))
            found += [grower.rows[node].float() for node in sorted(grower.rows)]
            grower.rows = {}
            if more:
                drafter.observe(state, tokens[30:33], features[29:32], [1, 2])
        return torch.stack(found)

    wide, chain = ([0, 7, 9, 11, 13], [-1, 0, 0, 1, 2]), ([0, 9, 13], [-1, 0, 1])
    both = laws(wide, compiled=False), laws(wide, compiled=True)
    known = both[0] > -torch.inf
    assert torch.equal(known, both[1] > -torch.inf)
    plain, compiled = (one[known] for one in both)
    assert 2 < plain.abs().max() < 4
    assert are_near(plain, compiled, bits)
    alone = laws(chain, compiled=True)
    assert torch.equal(alone[:3], both[1][[0, 2, 4]])


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["eagle", "fspad", "eagle3", "ctc", "parallel"])
def test_captured_forwards_change_nothing(method: str) -> None:
    """Levels and slots padded to fixed shapes and run again where they were, as on CUDA, draft the very trees of float64."""
    tree = {} if method == "ctc" else {"tree": "topk"}
    config = {"method": method, "model": str(HEAD_FOLDER / method), "num_speculative_tokens": 6, **tree}
    plain, captured = (LLM(STORIES, config, dtype="float64", device="cpu", max_num_seqs=2) for _ in range(2))
    runs = []

    def capture(run: Any) -> Any:
        runs.append(run)
        return replayed(run)

    drafter: Any = captured.engine.drafter
    runner = getattr(drafter, "slots", drafter)
    runner.graphs = replace(runner.make_graphs(capture), seen_before=0)
    for temperature in (0, 1):
        sampling = SamplingParams(temperature=temperature, max_tokens=24, seed=3)
        outputs = [llm.generate([TOKENS, TOKENS[:5], TOKENS[3:12]], sampling) for llm in (plain, captured)]
        wanted, found = ([(one.outputs[0].token_ids, one.metrics.num_steps) for one in some] for some in outputs)
        assert found == wanted
    assert 0 < len(runs) < 20


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize(("method", "bits"), [("parallel", FULL), ("ctc", FULL), ("ctc", QUANTIZED)])
def test_compiled_slots_are_the_plain_ones(method: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for two requests of different lengths over two steps; each has bit for bit what it has alone, its prompt run in
    parts."""
    native = load_target(BUNDLED_TARGET, device="cpu")
    config = layer_config(native.config, native.vocab_size)
    torch.manual_seed(0)
    head = HEADS[method].make(Shape.of(config), num_slots=8)
    head = head.bfloat16()
    native = native if bits == FULL else with_quantized_layers(head)
    tokens = list(range(5, 45))
    cache = native.new_pool(4).allocate()
    features = native.forward(TreeBatch.chains([tokens]), [cache], np.empty(0, np.int64), feature_layers=(-1,)).features

    def logits(begins: list[int], compiled: bool) -> Tensor:
        slots = LayerSlots(head, config, native, compiled=compiled, weight_bits=bits)
        states = [slots.start(tokens[: begin + 1], features[:begin]) for begin in begins]
        found = []
        for more in (2, 0):
            slots.settle(states)
            found.append(slots.fill(states).float())
            for state, begin in zip(states, begins, strict=True):
                if more:
                    slots.observe(state, tokens[begin + 1 : begin + 1 + more], features[begin : begin + more])
        return torch.stack(found)

    plain, compiled = logits([30, 9], compiled=False), logits([30, 9], compiled=True)
    assert plain.shape == (2, 2, head.num_slots, native.vocab_size + (method == "ctc"))
    assert 2 < plain.abs().max() < 5
    assert are_near(plain, compiled, bits)
    monkeypatch.setattr(pairs, "PREFILL_CHUNK", 4)
    assert torch.equal(logits([9], compiled=True)[:, 0], compiled[:, 1])


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize(("options", "bits"), [({}, FULL), ({"prefix_norms": True}, FULL), ({}, QUANTIZED)])
def test_the_compiled_prefix_layer_is_the_plain_one(
    options: dict[str, Any], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above: the laws after the roots of two requests, over two steps."""
    native = load_target(BUNDLED_TARGET, device="cpu")
    config = layer_config(native.config, native.vocab_size)
    torch.manual_seed(0)
    head = HEADS["hydra"].make(Shape.of(config), num_layers=1, **options).bfloat16()
    for one in (one for one in head.modules() if isinstance(one, torch.nn.Linear)):
        torch.nn.init.normal_(one.weight, std=0.8 * one.in_features**-0.5)
    native = native if bits == FULL else with_quantized_layers(head)
    tokens = list(range(5, 45))
    cache = native.new_pool(4).allocate()
    features = native.forward(TreeBatch.chains([tokens]), [cache], np.empty(0, np.int64), feature_layers=(-1,)).features

    def logits(begins: list[int], compiled: bool) -> Tensor:
        drafter = HydraDrafter(head, config, native, (grower := Roots()), compiled=compiled, weight_bits=bits)
        states = [drafter.start(tokens[: begin + 1], features[:begin]) for begin in begins]
        found = []
        for more in (2, 0):
            drafter.propose(work_of(states, [tokens[begin if more else begin + 2] for begin in begins], Budget(1, 1)))
            found.append(grower.logits.float())
            for state, begin in zip(states, begins, strict=True):
                if more:
                    drafter.observe(state, tokens[begin + 1 : begin + 1 + more], features[begin : begin + more], ())
        return torch.stack(found)

    plain, compiled = logits([30, 9], compiled=False), logits([30, 9], compiled=True)
    assert 2 < plain.abs().max() < 5
    assert are_near(plain, compiled, bits)
    monkeypatch.setattr(pairs, "PREFILL_CHUNK", 4)
    assert torch.equal(logits([9], compiled=True)[:, 0], compiled[:, 1])


@pytest.mark.skipif(library() is None, reason="no compiled kernels run here")
@pytest.mark.parametrize("bits", [FULL, QUANTIZED])
@pytest.mark.parametrize("method", ["medusa", "hydra"])
def test_compiled_linear_layers_are_the_plain_ones(method: str, bits: int) -> None:
    """Of a whole head, in the place of all of its own."""
    config = layer_config(load_target(BUNDLED_TARGET, device="cpu").config, 4096)
    torch.manual_seed(0)
    head = HEADS[method].make(Shape.of(config)).bfloat16()
    for one in (one for one in head.modules() if isinstance(one, torch.nn.Linear)):
        torch.nn.init.normal_(one.weight, std=0.6 * one.in_features**-0.5)
    target = with_quantized_layers(head) if bits == QUANTIZED else load_target(BUNDLED_TARGET, device="cpu")
    feature, embedding = torch.randn(2, 5, config.hidden_size, dtype=torch.bfloat16)
    given = (feature,) if method == "medusa" else (0, feature, embedding)
    with torch.inference_mode():
        plain = head(*given).float()
        compile_linears(head, target, bits)
        assert not any(isinstance(one, torch.nn.Linear) for one in head.modules())
        compiled = head(*given).float()
    assert 2 < plain.abs().max() < 5
    assert are_near(plain, compiled, bits)


def test_weights_of_so_many_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_bits must be 4 or 16, got 8"):
        drafting = {"method": "eagle", "model": str(DATA / "heads" / "eagle"), "tree": "chain", "num_speculative_tokens": 4}
        LLM(DATA / "babyllama-105", {**drafting, "weight_bits": 8})


@pytest.mark.parametrize("method", [name for name, row in DRAFTERS.items() if row.weights == "head"])
def test_a_head_is_asked_for_by_its_own_method(method: str) -> None:
    own = DRAFTERS[method].asks or method
    setting = Setting(method, target(), None, lambda _: None, lambda _: None, GROWERS["chain"].grower(), lambda: "")
    with pytest.raises(ValueError, match=rf"^method '{own}' needs a trained head\. Give its directory as 'model'"):
        DRAFTERS[method].build(setting)
    other = "eagle" if own == "fspad" else "fspad"
    with pytest.raises(ValueError, match=f"has method '{other}', expected '{own}'"):
        DRAFTERS[method].build(setting._replace(model=HEAD_FOLDER / other))


@pytest.mark.parametrize(
    ("name", "key", "value", "match"),
    [
        ("eagle3", "d2t", 26, r"drafts tokens outside its vocabulary\. `foredraft doctor`"),
        ("eagle3", "d2t", -1, r"drafts tokens outside its vocabulary"),
        ("eagle3", "feature_layers", [2, 3, 9], r"features after layers \[2, 3, 9\], but this target has 5 layers\."),
    ],
)
def test_a_head_that_reaches_beyond_its_target_is_refused(tmp_path: Path, name: str, key: str, value: Any, match: str) -> None:
    """Its tokens are places in memory that the compiled code writes to."""
    weights, config = load_file(HEAD_FOLDER / name / "model.safetensors"), read_json(HEAD_FOLDER / name / "config.json")
    if key in weights:
        place = -1 if value > 0 else 0
        weights[key][place] = value
    else:
        config["foredraft"]["options"][key] = value
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    setting = Setting(name, target(), tmp_path, lambda _: None, lambda _: None, GROWERS["chain"].grower(), lambda: "")
    with pytest.raises(ValueError, match=match):
        DRAFTERS[name].build(setting, force=True)


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({"method": "egale"}, "unknown method in config.json 'egale'. Did you mean 'eagle'?"),
        ({"method": ["eagle"]}, "unknown method in config.json"),
        (3, "unknown method in config.json 'None'"),
        ({"method": "eagle", "options": 3}, r"gives 3 as options of the head, but it must be an object\. Copy it again"),
        ({"method": "eagle", "target": 3}, r"gives 3 as target of the head, but it must be an object\. Copy it again"),
        ({"method": "eagle", "options": {"wide": True}}, r"'eagle' cannot have options {'wide': True} .*\. Copy config.json"),
        ({"method": "eagle3", "options": {"feature_layers": ["a"]}}, r"\['a'\] as feature_layers, but it must be a list"),
    ],
)
def test_a_head_that_says_nonsense_of_itself_is_refused(tmp_path: Path, about: Any, match: str) -> None:
    """By whoever reads it: the drafter, and the doctor."""
    (tmp_path / "model.safetensors").symlink_to(HEAD_FOLDER / "eagle" / "model.safetensors")
    config = {**read_json(HEAD_FOLDER / "eagle" / "config.json"), "foredraft": about}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=match):
        read_head(tmp_path)
    with pytest.raises(ModelError, match=match):
        examine(tmp_path, None)
