"""Checkpoints with the names and shapes of released draft heads: tiny ones with weights, and Vicuna-7B's without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


class Sizes(NamedTuple):
    """Widths of a target."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    eps: float = 1e-5
    max_len: int = 256

    @property
    def config(self) -> dict[str, Any]:
        """As config.json of the time said it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_len,
            "vocab_size": self.vocab,
        }


TINY = Sizes(128, 352, 8, 4, 16, 105, 5)
"""babyllama-105."""

VICUNA = Sizes(4096, 11008, 32, 32, 128, 32000, 32, max_len=4096)


class Released(NamedTuple):
    """A checkpoint without data."""

    config: dict[str, Any]
    shapes: Shapes


def layer(at: str, s: Sizes, inputs: int, outputs: int, *norms: str, bias: bool = False) -> Shapes:
    """A decoder layer."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    found: Shapes = {
        f"{at}.self_attn.q_proj.weight": (queries, inputs),
        f"{at}.self_attn.k_proj.weight": (keys, inputs),
        f"{at}.self_attn.v_proj.weight": (keys, inputs),
        f"{at}.self_attn.o_proj.weight": (s.hidden, queries),
        f"{at}.mlp.gate_proj.weight": (s.intermediate, s.hidden),
        f"{at}.mlp.up_proj.weight": (s.intermediate, s.hidden),
        f"{at}.mlp.down_proj.weight": (outputs, s.intermediate),
    }
    if bias:
        found |= {f"{at}.self_attn.{one}_proj.bias": (queries if one == "q" else keys,) for one in "qkv"}
    return found | {f"{at}.{norm}.weight": (s.hidden,) for norm in ("post_attention_layernorm", *norms)}


def eagle(s: Sizes, *, bias: bool = True, qkv_bias: bool = False, embedding: bool = True) -> Released:
    """EAGLE-1 and EAGLE-2."""
    shapes: Shapes = {"fc.weight": (s.hidden, 2 * s.hidden)} | ({"fc.bias": (s.hidden,)} if bias else {})
    shapes |= {"embed_tokens.weight": (s.vocab, s.hidden)} if embedding else {}
    shapes |= layer("layers.0", s, s.hidden, s.hidden, bias=qkv_bias)
    return Released(s.config | ({} if bias else {"bias": False}), shapes)


def fspad(s: Sizes, *, sampling: bool = True, partial: bool = True) -> Released:
    """FSPAD and its ablations."""
    h, i = s.hidden, s.intermediate
    at = "fc.fc" if sampling else "fc"
    shapes: Shapes = {"embed_tokens.weight": (s.vocab, h), f"{at}.weight": (h, 2 * h), f"{at}.bias": (h,)}
    if sampling:
        shapes |= {"fc.mlp.gate_proj.weight": (i, h), "fc.mlp.up_proj.weight": (i, h), "fc.mlp.down_proj.weight": (h, i)}
        shapes |= {"fc.post_attention_layernorm.weight": (h,)}
    return Released(s.config, shapes | layer("layers.0", s, h, 2 * h if partial else h))


def eagle3(
    s: Sizes, draft_vocab: int, *, at: str = "midlayer", width: int | None = None, qk_norm: bool = False, **more: Any
) -> Released:
    """EAGLE-3 as released; `width` is the target's where it is another, `more` goes into config.json."""
    h, width = s.hidden, width or s.hidden
    shapes: Shapes = {"embed_tokens.weight": (s.vocab, h), "fc.weight": (h, 3 * width)}
    shapes |= layer(at, s, 2 * h, h, "input_layernorm", "hidden_norm")
    shapes |= {"norm.weight": (h,), "lm_head.weight": (draft_vocab, h)}
    shapes |= {"d2t": (draft_vocab,), "t2d": (s.vocab,)}
    if qk_norm:
        shapes |= {f"{at}.self_attn.q_norm.weight": (s.head_dim,), f"{at}.self_attn.k_norm.weight": (s.head_dim,)}
    config = s.config | {"draft_vocab_size": draft_vocab} | ({"target_hidden_size": width} if width != h else {})
    return Released(config | more, shapes)


def speculators(s: Sizes, draft_vocab: int, ids: list[int] | None = None, **flags: Any) -> Released:
    """EAGLE-3 in the speculators format."""
    inner, shapes = eagle3(s, draft_vocab, at="layers.0", qk_norm=flags.pop("qk_norm", False))
    inner.pop("draft_vocab_size")
    if flags.get("norm_before_fc"):
        shapes["input_norm.weight"] = (3 * s.hidden,)
    if flags.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (s.hidden,) for i in range(3)}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": draft_vocab,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": ids,
        "embed_requires_grad": False,
        "transformer_layer_config": inner,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "some"}},
    }
    return Released(config | flags, shapes)


def medusa(s: Sizes, heads: int, layers: int = 1) -> Released:
    """Medusa as released."""
    shapes: Shapes = {}
    for i in range(heads):
        for j in range(layers):
            shapes |= {f"{i}.{j}.linear.weight": (s.hidden, s.hidden), f"{i}.{j}.linear.bias": (s.hidden,)}
        shapes[f"{i}.{layers}.weight"] = (s.vocab, s.hidden)
    return Released({"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": "some"}, shapes)


def medusa_vllm(
    s: Sizes,
    heads: int,
    layers: int = 1,
    *,
    bias: bool = True,
    one_output: bool = False,
    some_tokens: int | None = None,
    prefix: str = "",
) -> Released:
    """Medusa as vLLM names it."""
    rows = some_tokens or s.vocab
    shapes: Shapes = {}
    for i in range(heads):
        for j in range(layers):
            shapes[f"{prefix}blocks.{i}.layers.{j}.weight"] = (s.hidden, s.hidden)
            shapes |= {f"{prefix}blocks.{i}.layers.{j}.bias": (s.hidden,)} if bias else {}
        if not one_output:
            shapes[f"{prefix}lm_heads.{i}.weight"] = (rows, s.hidden)
    shapes |= {f"{prefix}lm_head.weight": (rows, s.hidden)} if one_output else {}
    shapes |= {f"{prefix}token_map": (rows,)} if some_tokens else {}
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": s.hidden,
        "vocab_size": s.vocab,
        "num_heads": heads,
        "num_hidden_layers": layers,
        "truncated_vocab_size": rows,
        "medusa_fc_bias": bias,
        "original_lm_head": one_output,
    }
    return Released(config, shapes)


def hydra(s: Sizes, heads: int, layers: int, *, prefix: bool) -> Released:
    """Hydra, and Hydra++ with its layer over the prefix."""
    first, step, output = (1, 2, ".1") if prefix else (0, 1, "")
    shapes: Shapes = {}
    for i in range(heads):
        for j in range(layers):
            inputs = (i + 2) * s.hidden if j == 0 else s.hidden
            for part in ("linear", "res_connection") if j == 0 else ("linear",):
                at = f"hydra_mlp.{i}.{first + step * j}.{part}"
                shapes |= {f"{at}.weight": (s.hidden, inputs), f"{at}.bias": (s.hidden,)}
        shapes |= {f"hydra_lm_head.{i}{output}.weight": (s.vocab, s.hidden), f"hydra_lm_head.{i}{output}.bias": (s.vocab,)}
    if prefix:
        at = "prefix_embeding_layer"
        shapes |= {f"{at}.embed_tokens.weight": (s.vocab, s.hidden), f"{at}.norm.weight": (s.hidden,)}
        shapes |= layer(f"{at}.layers.0", s, s.hidden, s.hidden, "input_layernorm")
    config = {"hydra_num_heads": heads, "hydra_num_layers": layers, "hydra_head_arch": "prefix-mlp" if prefix else "mlp"}
    return Released(config | {"grounded_heads": True, "hidden_state_offset": 0}, shapes)


def filled(released: Released, embedding: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Weights: laws are far from flat, norms far from 1, blocks that the released code shares are one."""
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.3 * noise
        if name.endswith("bias"):
            return 0.2 * noise
        return noise * (4.0 if "lm_head" in name or is_output(name) else 1.1) * shape[-1] ** -0.5

    found = {name: fill(name, shape) for name, shape in released.shapes.items()}
    if "embed_tokens.weight" in found and found["embed_tokens.weight"].shape == embedding.shape:
        found["embed_tokens.weight"] = embedding.clone()
    for name in found:
        kind = name.split(".")
        if kind[0] == "hydra_mlp" and int(kind[2]) > 1 + ("prefix-mlp" in released.config.values()):
            found[name] = found[".".join([*kind[:2], "3" if "prefix-mlp" in released.config.values() else "1", *kind[3:]])]
        if kind[0].isdigit() and kind[2:3] == ["linear"]:
            found[name] = found[".".join([kind[0], "0", *kind[2:]])]
    tokens = torch.randperm(len(embedding), generator=generator)
    if "d2t" in found:
        chosen = tokens[: len(found["d2t"])].sort().values
        found["d2t"] = chosen - torch.arange(len(chosen))
        found["t2d"] = torch.isin(torch.arange(len(embedding)), chosen)
    return found | {name: tokens[: len(one)] for name, one in found.items() if name.endswith("token_map")}


def is_output(name: str) -> bool:
    """Medusa's output layers have two numbers for a name."""
    parts = name.split(".")
    return len(parts) == 3 and parts[0].isdigit() and parts[1].isdigit()


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    """The directory of a checkpoint; the ending of `file` says how the weights are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: one.clone() for name, one in tensors.items()}, folder / file, {"format": "pt"})
    else:
        torch.save(tensors, folder / file)
    return folder
