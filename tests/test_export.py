"""Released checkpoints: converted, they say what the released code says; what is wrong with one is found and said."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.cli.doctor import doctor
from foredraft.core.contracts import Budget, Work
from foredraft.core.draws import Draws
from foredraft.core.params import SamplingParams as Sampling
from foredraft.core.setting import Setting
from foredraft.core.tree import TreeBatch
from foredraft.drafters import DRAFTERS
from foredraft.heads import HEADS
from foredraft.heads.folder import layer_config, read_head
from foredraft.importers.convert import convert, examine
from foredraft.importers.layouts import LAYOUTS, plan
from foredraft.importers.reading import Found, TargetFacts
from foredraft.importers.source import open_source
from foredraft.models.checkpoint import ModelError, open_weights
from foredraft.models.loading import fingerprint_of, load_target
from foredraft.train.run import TrainChoice
from foredraft.train.run import run as train_run
from released import TINY, VICUNA, Released, eagle, eagle3, filled, fspad, hydra, medusa, medusa_vllm, speculators, write

DATA = Path(__file__).parent / "data"
STORIES, OTHER_STORIES = DATA / "babyllama-105", DATA / "babyllama-105-b"
TOKENS, PATH = [1, 14, 33, 7, 52, 19, 88, 3, 41], [60, 22, 9]
VICUNA_FACTS = TargetFacts("vicuna-7b", layer_config(LlamaConfig(max_position_embeddings=4096), 32000), 32)

NARROW = TINY._replace(hidden=64, intermediate=96, heads=4)
CASES: dict[str, tuple[str, Released]] = {  # layout and checkpoint
    "eagle": ("eagle", eagle(TINY)),
    "eagle without bias": ("eagle", eagle(TINY, bias=False, embedding=False)),
    "eagle of Qwen2": ("eagle", eagle(TINY, qkv_bias=True)),
    "fspad": ("fspad", fspad(TINY)),
    "feature sampling alone": ("fspad", fspad(TINY, partial=False)),
    "partial alignment alone": ("fspad", fspad(TINY, sampling=False)),
    "eagle3": ("eagle3", eagle3(TINY, 60)),
    "eagle3 layers.0": ("eagle3", eagle3(TINY, 60, at="layers.0", eagle_aux_hidden_state_layer_ids=[1, 3, 5])),
    "eagle3 in eagle_config": (
        "eagle3",
        eagle3(TINY, 60, at="layers.0", eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}),
    ),
    "eagle3 narrow": ("eagle3", eagle3(NARROW, 105, width=128)),
    "speculators": ("eagle3-speculators", speculators(TINY, 60, [1, 2, 4])),
    "speculators residual": ("eagle3-speculators", speculators(TINY, 60, [1, 2, 4], norm_before_residual=True)),
    "speculators fc": ("eagle3-speculators", speculators(TINY, 60, [1, 2, 4], norm_before_fc=True, norm_output=True)),
    "speculators fc_norm": ("eagle3-speculators", speculators(TINY, 105, fc_norm=True, qk_norm=True)),
    "medusa": ("medusa", medusa(TINY, 3)),
    "medusa shared": ("medusa", medusa(TINY, 2, 3)),
    "medusa vllm": ("medusa-vllm", medusa_vllm(TINY, 3, prefix="medusa_heads.")),
    "medusa vllm small": ("medusa-vllm", medusa_vllm(TINY, 2, 2, bias=False, one_output=True, some_tokens=40)),
    "hydra": ("hydra", hydra(TINY, 3, 3, prefix=False)),
    "hydra++": ("hydra", hydra(TINY, 3, 4, prefix=True)),
}
PICKLED = {
    "eagle": "pytorch_model.bin",
    "eagle3": "pytorch_model.bin",
    "medusa": "medusa_lm_head.pt",
    "hydra++": "hydra_lm_head.pt",
}


@cache
def target() -> Any:
    return load_target(STORIES, dtype="float32")


@cache
def embedding() -> Tensor:
    return target().embed(torch.arange(TINY.vocab))


@cache
def states() -> tuple[Tensor, ...]:
    """Transformers' states of the known tokens but the last: after every layer, the last of them normed."""
    model: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda module, given, out: last.append(out))
    with torch.inference_mode():
        found = model(torch.tensor([TOKENS[:-1]]), output_hidden_states=True).hidden_states
    return (*(one[0] for one in found[:-1]), last[0][0], found[-1][0])


def weights_of(case: str) -> dict[str, Tensor]:
    """The weights of a fixture; an embedding of its own where the target's is of another width."""
    return filled(CASES[case][1], embedding())


# --- the released forwards, written from their description


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + TINY.eps) * weight


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def turned(x: Tensor) -> Tensor:
    """Rotary positions 0, 1, ...; heads [t, h, e]."""
    size = x.shape[-1]
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    """Causal, over a whole text [t, d]."""
    query, key, value = (linear(w, f"{at}.self_attn.{one}_proj", x).unflatten(-1, (-1, TINY.head_dim)) for one in "qkv")
    if f"{at}.self_attn.q_norm.weight" in w:
        query, key = norm(query, w[f"{at}.self_attn.q_norm.weight"]), norm(key, w[f"{at}.self_attn.k_norm.weight"])
    query, key = turned(query), turned(key)
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for one in (key, value))
    scores = torch.einsum("qhe,khe->hqk", query, key) / math.sqrt(TINY.head_dim)
    scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
    return linear(w, f"{at}.self_attn.o_proj", torch.einsum("hqk,khe->qhe", scores.softmax(-1), value).flatten(1))


def mlp(w: dict[str, Tensor], at: str, x: Tensor, gate: Tensor | None = None) -> Tensor:
    gated = F.silu(linear(w, f"{at}.gate_proj", x if gate is None else gate)) * linear(w, f"{at}.up_proj", x)
    return linear(w, f"{at}.down_proj", gated)


def target_head(x: Tensor) -> Tensor:
    return x @ embedding().T


def eagle_layer(w: dict[str, Tensor], e: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """EAGLE and FSPAD: what is scored, and what is fed back."""
    both = torch.cat([e, f], dim=-1)
    if "fc.fc.weight" in w:
        fused = linear(w, "fc.fc", both)
        x = fused + mlp(w, "fc.mlp", norm(fused, w["fc.post_attention_layernorm.weight"]), gate=e)
    else:
        x = linear(w, "fc", both)
    x = x + attention(w, "layers.0", x)
    out = mlp(w, "layers.0.mlp", norm(x, w["layers.0.post_attention_layernorm.weight"]))
    halves = [x + one for one in out.split(x.shape[-1], dim=-1)]
    return halves[0], halves[-1]


def eagle3_layer(w: dict[str, Tensor], config: dict[str, Any], e: Tensor, f: Tensor) -> Tensor:
    at = "midlayer" if "midlayer.hidden_norm.weight" in w else "layers.0"
    normed = norm(f, w[f"{at}.hidden_norm.weight"])
    both = torch.cat([norm(e, w[f"{at}.input_layernorm.weight"]), normed], dim=-1)
    x = (normed if config.get("norm_before_residual") else f) + attention(w, at, both)
    return x + mlp(w, f"{at}.mlp", norm(x, w[f"{at}.post_attention_layernorm.weight"]))


def recurrent_logits(case: str, w: dict[str, Tensor]) -> list[Tensor]:
    """Logits at the root and after every token of the path."""
    config, ids, found = CASES[case][1].config, list(TOKENS[1:]), []
    is_third = "d2t" in w
    features = fused(config, w) if is_third else states()[-1]
    table = w["embed_tokens.weight"] if is_third else embedding()
    for token in [*PATH, None]:
        if is_third:
            out = eagle3_layer(w, config, table[torch.tensor(ids)], features)
            normed = norm(out, w["norm.weight"])
            full = torch.full((TINY.vocab,), -torch.inf)
            full[torch.arange(len(w["d2t"])) + w["d2t"]] = linear(w, "lm_head", normed[-1])
            found.append(full)
            carried = normed if config.get("norm_output") else out
        else:
            scored, carried = eagle_layer(w, table[torch.tensor(ids)], features)
            found.append(target_head(scored[-1]))
        features = torch.cat([features, carried[-1:]])
        ids.append(token or 0)
    return found


LAYERS = {  # after how many layers the states are, of those that are not said at the top of config.json
    "eagle3": [2, 2, 2],
    "eagle3 in eagle_config": [1, 3, 4],
    "eagle3 narrow": [2, 2, 2],
    "speculators fc_norm": [2, 2, 2],
}


def fused(config: dict[str, Any], w: dict[str, Tensor]) -> Tensor:
    name = next(one for one in CASES if CASES[one][1].config is config)
    parts = [states()[i] for i in LAYERS.get(name) or config["eagle_aux_hidden_state_layer_ids"]]
    if config.get("fc_norm"):
        parts = [norm(one, w[f"fc_norm.{i}.weight"]) for i, one in enumerate(parts)]
    given = torch.cat(parts, dim=-1)
    return linear(w, "fc", norm(given, w["input_norm.weight"]) if config.get("norm_before_fc") else given)


def medusa_logits(case: str, w: dict[str, Tensor]) -> list[Tensor]:
    """One for every head."""
    config, found = CASES[case][1].config, []
    for i in range(config.get("medusa_num_heads") or config["num_heads"]):
        x = states()[-1][-1]
        for j in range(config.get("medusa_num_layers") or config["num_hidden_layers"]):
            at = f"{i}.{j}.linear" if "0.0.linear.weight" in w else f"blocks.{i}.layers.{j}"
            x = x + F.silu(linear(w, at, x))
        outputs = (f"{i}.{config.get('medusa_num_layers')}", f"lm_heads.{i}", "lm_head")
        logits = linear(w, next(one for one in outputs if f"{one}.weight" in w), x)
        if "token_map" in w:
            full = torch.full((TINY.vocab,), -torch.inf)
            full[w["token_map"]] = logits
            logits = full
        found.append(logits)
    return found


def hydra_logits(case: str, w: dict[str, Tensor]) -> list[Tensor]:
    """At the root and after the path, as far as there are heads."""
    config, at, found = CASES[case][1].config, "prefix_embeding_layer", []
    x = states()[-1]
    has_prefix = f"{at}.norm.weight" in w
    if has_prefix:
        inner = f"{at}.layers.0"
        x = x + attention(w, inner, norm(x, w[f"{inner}.input_layernorm.weight"]))
        x = x + mlp(w, f"{inner}.mlp", norm(x, w[f"{inner}.post_attention_layernorm.weight"]))
        x = norm(x, w[f"{at}.norm.weight"])
    first, step, output = (1, 2, ".1") if has_prefix else (0, 1, "")
    for i in range(config["hydra_num_heads"]):
        tokens = [TOKENS[-1], *PATH[:i]]
        y = torch.cat([x[-1], *embedding()[torch.tensor(tokens)]])
        y = linear(w, f"hydra_mlp.{i}.{first}.res_connection", y) + F.silu(linear(w, f"hydra_mlp.{i}.{first}.linear", y))
        for _ in range(config["hydra_num_layers"] - 1):
            y = y + F.silu(linear(w, f"hydra_mlp.{i}.{first + step}.linear", y))
        found.append(linear(w, f"hydra_lm_head.{i}{output}", y))
    return found


REFERENCE = {"eagle": recurrent_logits, "fspad": recurrent_logits, "eagle3": recurrent_logits}
REFERENCE |= {"medusa": medusa_logits, "hydra": hydra_logits}


# --- the converted heads


class Asking:
    """A grower that asks for the laws along a path."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def grow(self, drafter: Any, work: Work) -> TreeBatch:
        tokens = [work.roots[0], *PATH]
        batch = TreeBatch.chains([tokens], [[-1, *range(len(PATH))]])
        for node in range(min(len(tokens), work.budgets[0].depth)):
            self.rows += drafter.expand(work.states, batch, np.array([node]))
        return batch


@torch.inference_mode()
def converted_logits(folder: Path, method: str) -> list[Tensor]:
    grower: Any = Asking()
    setting = Setting(
        method=method,
        target=target(),
        model=folder,
        load=lambda _: None,
        vocabulary=lambda _: None,
        grower=grower,
        fingerprint=lambda: fingerprint_of(STORIES),
    )
    drafter = DRAFTERS[method].build(setting)
    cache = target().new_pool(4).allocate()
    known = TreeBatch.chains([TOKENS[:-1]])
    features = target().forward(known, [cache], np.empty(0, np.int64), feature_layers=drafter.feature_layers).features
    state = drafter.start(TOKENS, features)
    drafter.propose(Work([state], TOKENS[-1:], [Budget(8, 8)], [Sampling()], [Draws(0)]))
    return grower.rows


def converted(case: str, folder: Path, file: str = "model.safetensors", dtype: torch.dtype = torch.float32) -> Path:
    """A fixture, written and converted."""
    source, out = folder / "source", folder / "out"
    tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in weights_of(case).items()}
    write(source, CASES[case][1].config, tensors, file)
    convert(source, str(STORIES), out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_converted_head_has_the_laws_of_the_released_code(case: str, tmp_path: Path) -> None:
    out = converted(case, tmp_path, PICKLED.get(case, "model.safetensors"))
    about = json.loads((out / "config.json").read_text())["foredraft"]
    w = {name.removeprefix("medusa_heads."): one for name, one in weights_of(case).items()}
    with torch.inference_mode():
        wanted = REFERENCE[about["method"]](case, w)
    got = converted_logits(out, about["method"])
    assert len(got) == len(wanted) >= 2
    assert max(float(its.softmax(-1).max()) for its in wanted) > 0.15  # flat laws would agree with any other
    for mine, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.softmax(-1), its.softmax(-1), atol=1e-5, rtol=0)
    read_head(out)


@pytest.mark.parametrize("case", CASES)
def test_generation_stays_greedy(case: str, tmp_path: Path) -> None:
    out = converted(case, tmp_path)
    method = json.loads((out / "config.json").read_text())["foredraft"]["method"]
    config = {"method": method, "model": str(out), "tree": "topk", "num_speculative_tokens": 6}
    greedy = SamplingParams(temperature=0, max_tokens=24)
    drafted, plain = (
        LLM(str(STORIES), one, dtype="float64").generate("Once upon a time", greedy)[0].outputs[0]
        for one in (config, {"method": "ar"})
    )
    assert drafted.token_ids == plain.token_ids


@pytest.mark.parametrize("case", CASES)
def test_the_doctor_finds_nothing_wrong(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = converted(case, tmp_path)
    layout, _ = CASES[case]
    _, made = examine(tmp_path / "source", str(STORIES))
    trap = ["eagle_config"] if case == "eagle3 in eagle_config" else []
    assert made.layout == layout
    assert [key for one in made.findings for key in ["eagle_config"] if key in one.what] == trap
    assert len(made.findings) == len(trap), made.findings
    assert examine(tmp_path / "source", None)[1].layout == layout
    assert doctor(out, model=str(STORIES)) == 0
    assert "fits" in capsys.readouterr().out
    assert json.loads((out / "provenance.json").read_text())["converted_from"] == layout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    out, given = converted("eagle", tmp_path, dtype=dtype), weights_of("eagle")
    for name, one in open_weights(out).items():
        assert torch.equal(one.read(), given[name].to(dtype))


def test_a_shared_block_may_stand_there_once(tmp_path: Path) -> None:
    for case, missing in (("medusa shared", r"\d\.[12]\.linear"), ("hydra++", r"hydra_mlp\.\d\.[57]\.")):
        whole = converted(case, tmp_path / case)
        tensors = {name: one for name, one in weights_of(case).items() if not re.match(missing, name)}
        assert len(tensors) < len(weights_of(case))
        source, out = tmp_path / case / "once", tmp_path / case / "once-out"
        write(source, CASES[case][1].config, tensors)
        convert(source, str(STORIES), out)
        first, second = (read_head(one).head.state_dict() for one in (whole, out))
        assert all(torch.equal(one, second[name]) for name, one in first.items())


def test_flags_of_speculators_change_laws(tmp_path: Path) -> None:
    """So that a flag that is not obeyed could not pass for one that is."""
    case = "speculators"
    w = weights_of(case)
    laws = []
    for number, flag in enumerate(("", "norm_before_residual", "norm_output")):
        config = {**CASES[case][1].config, **({flag: True} if flag else {})}
        convert(write(tmp_path / f"s{number}", config, w), str(STORIES), tmp_path / f"o{number}")
        laws.append(torch.stack(converted_logits(tmp_path / f"o{number}", "eagle3")).softmax(-1))
    assert (laws[0] - laws[1]).abs().max() > 0.01
    assert torch.equal(laws[0][0], laws[2][0])  # nothing was carried yet
    assert (laws[0][1:] - laws[2][1:]).abs().max() > 0.01


# --- full size, without weights


FULL = {
    "eagle": (eagle(VICUNA), 235_937_792),
    "fspad": (fspad(VICUNA), 416_296_960),
    "medusa": (medusa(VICUNA, 5), 5 * (4096 * 4096 + 4096 + 32000 * 4096)),
    "hydra": (hydra(VICUNA, 4, 4, prefix=True), None),
    "eagle3": (eagle3(VICUNA, 32000), None),
    "eagle3-speculators": (speculators(VICUNA, 32000, [2, 16, 29]), None),
    "medusa-vllm": (medusa_vllm(VICUNA, 5), 5 * (4096 * 4096 + 4096 + 32000 * 4096)),
}


@pytest.mark.parametrize("layout", FULL)
def test_full_size_shapes(layout: str) -> None:
    """Vicuna-7B's heads, on the meta device. A head without an embedding of its own has all other weights of the file."""
    released, count = FULL[layout]
    given = {name: torch.empty(shape, device="meta") for name, shape in released.shapes.items()}
    found = Found(released.config, {name: tuple(one.shape) for name, one in given.items()}, VICUNA_FACTS, True)
    made = plan(found)
    assert (made.layout, made.findings) == (layout, [])
    unused = sum(one.numel() for name, one in given.items() if "embed_tokens" in name or name in ("t2d", "d2t"))
    sizes = sum(one.numel() for one in given.values()) - unused
    parameters = sum(one.numel() for one in made.head.parameters())
    assert parameters == sizes
    assert count is None or parameters == count
    if made.reading.method == "eagle3":
        assert made.reading.options["feature_layers"] == [2, 16, 29]


def test_every_layout_is_tested() -> None:
    assert {layout for layout, _ in CASES.values()} == set(FULL) == set(LAYOUTS) - {"foredraft"}


# --- what is wrong


def without(name: str) -> Any:
    return lambda config, w: w.pop(name)


def said(**keys: Any) -> Any:
    return lambda config, w: config.update(keys)


def changed(name: str, change: Any) -> Any:
    return lambda config, w: w.update({name: change(w[name])})


def planted(name: str, value: float) -> Any:
    def plant(config: Any, w: Any) -> None:
        w[name].view(-1)[3] = value

    return plant


FAULTS = {  # fixture, fault, what is said, whether it can still be converted
    "missing": ("eagle", without("fc.weight"), r"missing: fc\.weight", False),
    "missing part": ("eagle", without("layers.0.mlp.up_proj.weight"), r"missing: layers\.0\.mlp\.up_proj\.weight", False),
    "too many": ("eagle", lambda c, w: w.update({"x.weight": torch.ones(3)}), r"not supported: x\.weight", False),
    "input norm": (
        "eagle",
        lambda c, w: w.update({"layers.0.input_layernorm.weight": torch.ones(128)}),
        "tensors that are not supported",
        False,
    ),
    "shape": (
        "eagle",
        changed("fc.weight", lambda x: x[:, :200]),
        r"fc\.weight has shape 128 x 200, but must have 128 x 256",
        False,
    ),
    "bias said": ("eagle", said(bias=False), "config.json says false", False),
    "bias unsaid": ("eagle without bias", lambda c, w: c.pop("bias"), "config.json says nothing", True),
    "vocabulary": ("eagle", said(vocab_size=110), "110 tokens, the target's 105", False),
    "layers": ("eagle", said(num_hidden_layers=2), "num_hidden_layers is 2", False),
    "gelu": ("eagle", said(hidden_act="gelu"), "hidden_act is 'gelu'", False),
    "rope": ("eagle", said(rope_theta=500000.0), "rope_theta is 500000, the target's is 10000", True),
    "rope type": ("eagle", said(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'", False),
    "context": ("eagle", said(max_position_embeddings=128), "max_position_embeddings is 128, the target's is 256", True),
    "embedding": ("eagle", changed("embed_tokens.weight", lambda x: x + 0.1), "not the target's embedding", False),
    "nan": ("eagle", planted("fc.weight", math.nan), r"fc\.weight has entries", False),
    "inf": ("medusa", planted("0.1.weight", math.inf), r"0\.1\.weight has entries", False),
    "double": ("eagle", changed("fc.weight", lambda x: x.double()), "stored as F64", False),
    "integers": ("fspad", changed("fc.fc.bias", lambda x: x.int()), "stored as I32", False),
    "d2t absolute": ("eagle3", changed("d2t", lambda x: x + torch.arange(len(x))), "seems to hold token ids", False),
    "d2t outside": ("eagle3", planted("d2t", 1000), "1 of 60 are outside the vocabulary of 105", False),
    "d2t twice": ("eagle3", changed("d2t", lambda x: x[0] - torch.arange(len(x))), "of 60 repeat another token", False),
    "d2t shape": ("eagle3", changed("d2t", lambda x: x.view(2, 30)), "d2t has shape 2 x 30, but must have 60", False),
    "d2t kind": ("eagle3", changed("d2t", lambda x: x.float()), "d2t is stored as F32, but must be one of I64, I32", False),
    "d2t gone": ("eagle3", without("d2t"), "missing: d2t", False),
    "t2d": ("eagle3", changed("t2d", lambda x: ~x), "t2d and d2t name different tokens", True),
    "ids range": ("eagle3", said(eagle_aux_hidden_state_layer_ids=[1, 3, 6]), "from 0 to 5", False),
    "ids count": ("eagle3", said(eagle_aux_hidden_state_layer_ids=[1, 3]), "fc fuses 3 of them", False),
    "ids by one": ("eagle3", said(eagle_aux_hidden_state_layer_ids=[1, 1, 1]), "each one less than usual", True),
    "ids both": (
        "eagle3 layers.0",
        said(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}),
        "they name different layers",
        True,
    ),
    "norm_output": ("eagle3", said(norm_output=True), "norm_output is True", False),
    "residual unsaid": (
        "speculators",
        lambda c, w: c.pop("norm_before_residual"),
        "the default is false in speculators",
        False,
    ),
    "both norms": ("speculators fc", said(fc_norm=True), "exclude each other", False),
    "narrow": ("eagle3 narrow", without("embed_tokens.weight"), r"missing: embed_tokens\.weight", False),
    "wider": ("eagle3", said(target_hidden_size=256), "features of width 256, the target's have 128", False),
    "fc bias": ("medusa vllm", said(medusa_fc_bias=False), "medusa_fc_bias, without which vLLM drops them", True),
    "stray": ("medusa vllm", said(num_attention_heads=8), "num_attention_heads, which vLLM takes", True),
    "heads": ("medusa", said(medusa_num_heads=4), "medusa_num_heads 4, but the weights have 3 heads", False),
    "scale": ("medusa vllm", said(logit_scale=0.5), "logit_scale is 0.5", False),
    "map": ("medusa vllm small", planted("token_map", 200), "1 of 40 are outside", False),
    "grounded": ("hydra", said(grounded_heads=False), "grounded_heads is False", False),
    "offset": ("hydra++", said(hidden_state_offset=1), "hidden_state_offset is 1", False),
    "hydra heads": ("hydra++", said(hydra_num_heads=4), "hydra_num_heads 4", False),
    "hydra part": (
        "hydra++",
        without("prefix_embeding_layer.norm.weight"),
        r"missing: prefix_embeding_layer\.norm\.weight",
        False,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_names_a_planted_fault(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, plant, words, convertible = FAULTS[fault]
    config, w = json.loads(json.dumps(CASES[case][1].config)), weights_of(case)
    plant(config, w)
    source = write(tmp_path / "source", config, w)
    assert doctor(source, model=str(STORIES)) == 1
    printed = capsys.readouterr().out
    assert re.search(words, printed), printed
    assert "to do: " in printed
    if convertible:
        convert(source, str(STORIES), tmp_path / "out")
        assert re.search(words, (tmp_path / "out" / "provenance.json").read_text())
    else:
        with pytest.raises(ModelError, match=r"cannot convert") as raised:
            convert(source, str(STORIES), tmp_path / "out")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_a_shorter_context_is_made_as_long_as_the_targets(tmp_path: Path) -> None:
    released = CASES["eagle"][1]
    source = write(tmp_path / "source", {**released.config, "max_position_embeddings": 32}, weights_of("eagle"))
    convert(source, str(STORIES), tmp_path / "out")
    assert read_head(tmp_path / "out").config.max_position_embeddings == 256


def test_an_embedding_of_its_own_is_kept(tmp_path: Path) -> None:
    """EAGLE-3 may learn one; a copy of the target's is not stored again, also where it was rounded."""
    w = weights_of("eagle3")
    same = write(tmp_path / "same", CASES["eagle3"][1].config, {**w, "embed_tokens.weight": embedding().half()})
    other = write(tmp_path / "other", CASES["eagle3"][1].config, {**w, "embed_tokens.weight": embedding() + 0.1})
    made = [convert(one, str(STORIES), tmp_path / f"{one.name}-out").reading.options for one in (same, other)]
    assert ["own_embedding" in one for one in made] == [False, True]
    laws = [converted_logits(tmp_path / f"{name}-out", "eagle3")[0].softmax(-1) for name in ("same", "other")]
    assert (laws[0] - laws[1]).abs().max() > 0.01


# --- heads of this library


def test_what_is_not_converted_is_refused_with_advice(tmp_path: Path) -> None:
    source = write(tmp_path / "source", CASES["eagle"][1].config, weights_of("eagle"))
    with pytest.raises(ValueError, match="foredraft convert"):
        LLM(str(STORIES), {"method": "eagle", "model": str(source)})


def test_training_does_not_offer_what_only_converted_heads_have(tmp_path: Path) -> None:
    choice = TrainChoice("eagle3", str(STORIES), [], tmp_path, options={"qk_norm": True})
    with pytest.raises(ValueError, match="unknown option of method 'eagle3': 'qk_norm'"):
        train_run(choice)


def test_the_doctor_reads_our_own_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in HEADS:
        assert doctor(DATA / "heads" / method, model=str(STORIES)) == 0
        assert "a head of this library" in capsys.readouterr().out
    assert doctor(DATA / "heads" / "eagle", model=str(OTHER_STORIES)) == 1
    assert "this target has other weights" in capsys.readouterr().out
    with pytest.raises(ModelError, match="already"):
        convert(DATA / "heads" / "eagle", str(STORIES), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("eagle", {"max_position_embeddings": 64}, "max_position_embeddings is 64"),
        ("eagle", {"vocab_size": 104}, "104 tokens"),
        ("eagle3", {"vocab_size": 106}, "106 tokens"),
        ("eagle", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta is 7"),
    ],
)
def test_faults_in_our_own_heads(method: str, change: Any, words: str, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(DATA / "heads" / method, tmp_path / "head")
    file = tmp_path / "head" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert doctor(tmp_path / "head", model=str(STORIES)) == 1
    assert words in capsys.readouterr().out


# --- files


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this was run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, legacy in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CASES["eagle"][1].config))
        content = {"fc.weight": torch.ones(2), "x": Malicious()}
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ModelError, match="would run code, which is never done"):
            convert(folder, str(STORIES), tmp_path / "out")
    assert "this was run" not in capsys.readouterr().out


def test_pickles_in_shards_and_of_the_old_kind(tmp_path: Path) -> None:
    w, config = weights_of("eagle"), CASES["eagle"][1].config
    write(tmp_path / "whole", config, w)
    convert(tmp_path / "whole", str(STORIES), tmp_path / "whole-out")
    folder, names = tmp_path / "shards", list(w)
    write(folder, config, {name: w[name] for name in names[:3]}, "pytorch_model-00001-of-00002.bin")
    torch.save({name: w[name] for name in names[3:]}, folder / "b.bin", _use_new_zipfile_serialization=False)
    torch.save({}, folder / "training_args.bin")
    index = {name: "pytorch_model-00001-of-00002.bin" if i < 3 else "b.bin" for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    convert(folder, str(STORIES), tmp_path / "shards-out")
    first, second = (read_head(tmp_path / f"{one}-out").head.state_dict() for one in ("whole", "shards"))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    (folder / "b.bin").unlink()
    with pytest.raises(ModelError, match=r"lacks b\.bin"):
        convert(folder, str(STORIES), tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no weights"),
        ({"a.pt": b"x", "b.pt": b"y"}, r"several files of weights \(a\.pt, b\.pt\)"),
        ({"model.safetensors": b"x"}, "corrupt or cut off"),
        ({"medusa_lm_head.pt": b"x"}, r"medusa_lm_head\.pt (is corrupt|holds more than tensors)"),
        ({"config.json": b"{", "a.pt": b"x"}, "is not JSON"),
    ],
)
def test_what_is_no_head_is_said_in_one_line(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=words) as raised:
        examine(tmp_path, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("case", "keys", "words"),
    [
        ("eagle", {"hidden_size": "wide"}, "hidden_size 'wide', but it must be a number above 0"),
        ("eagle", {"hidden_size": None}, "config.json lacks hidden_size"),
        ("eagle", {"num_attention_heads": 7}, "config.json is invalid"),
        ("eagle3", {"eagle_config": "x"}, "eagle_config 'x', but it must be an object"),
        ("eagle3", {"eagle_aux_hidden_state_layer_ids": [1, "2", 3]}, "must be a list of numbers"),
        ("eagle3", {"target_hidden_size": 0}, "must be a number above 0"),
        ("speculators", {"transformer_layer_config": None}, "config.json lacks hidden_size"),
        ("medusa", {"architectures": 3}, "must be a list"),
    ],
)
@pytest.mark.parametrize("facts", [VICUNA_FACTS, None])
def test_a_malformed_config_is_said_in_one_line(case: str, keys: Any, words: str, facts: Any) -> None:
    _, released = CASES[case]
    with pytest.raises(ModelError, match=words) as raised:
        plan(Found({**released.config, **keys}, released.shapes, facts))
    assert "\n" not in str(raised.value)


def test_other_heads_and_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="this is a language model"):
        examine(STORIES, None)
    with pytest.raises(ModelError, match="not a draft head with a known layout"):
        examine(write(tmp_path / "none", {}, {"weight": torch.ones(2)}), None)
    source = write(tmp_path, {"speculators_model_type": "dflash"}, {"fc.weight": torch.ones(2)})
    with pytest.raises(ModelError, match="type 'dflash' is not supported"):
        examine(source, None)
    with pytest.raises(ModelError, match="Did you mean 'medusa'"):
        examine(source, None, "medsa")
    for layout in LAYOUTS:  # a wrong --format is an error of one line, or a list of what does not fit
        try:
            assert examine(source, str(STORIES), layout)[1].findings
        except ModelError as error:
            assert "\n" not in str(error)


# --- the command line


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code, out, err  # type: ignore[return-value]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source", CASES["medusa"][1].config, weights_of("medusa"), "medusa_lm_head.pt")
    out = tmp_path / "head"
    code, printed, _ = call(capsys, "doctor", source)
    assert (code, "pickled" in printed, "convert it" in printed) == (1, True, True)
    code, _, err = call(capsys, "convert", source, "--model", STORIES, "--out", out)
    assert (code, "Medusa as released" in err, '"method": "medusa"' in err) == (0, True, True)
    code, printed, _ = call(capsys, "doctor", out, "--model", STORIES, "--json")
    assert (code, json.loads(printed)["fits"], json.loads(printed)["layout"]) == (0, True, "foredraft")
    code, _, err = call(capsys, "convert", source, "--model", STORIES, "--out", out)
    assert (code, "already exists" in err, "hint: " in err) == (1, True, True)
    code, _, err = call(capsys, "convert", source, "--model", STORIES, "--out", source, "--force")
    assert (code, "holds the checkpoint to convert" in err, "hint: " in err) == (1, True, True)
    assert call(capsys, "convert", source, "--model", STORIES, "--out", out, "--force")[0] == 0
    code, _, err = call(capsys, "convert", source, "--model", STORIES, "--out", out, "--force", "--format", "medusaa")
    assert (code, "Did you mean 'medusa'" in err) == (1, True)
    code, _, err = call(capsys, "doctor", tmp_path / "nowhere")
    assert (code, "no directory" in err) == (1, True)
    given = ["--model", STORIES, "--method", "medusa", "--draft-model", out, "--max-tokens", 8]
    assert call(capsys, "generate", "Once upon a time", *given, "--temperature", 0, "--budget", 4, "--tree", "chain")[0] == 0


def test_a_pickle_of_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"layers.0.self_attn.q_proj.weight": torch.eye(4).to_sparse()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is not a dict of dense tensors"):
        open_source(tmp_path)


def test_an_index_that_names_no_files_is_refused(tmp_path: Path) -> None:
    for named in ({"a": 3}, {}, []):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
        with pytest.raises(ModelError, match=r"has no weight_map\. Copy it again"):
            open_source(tmp_path)
