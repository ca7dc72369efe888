"""Makes a Llama-family checkpoint as costly as a larger model, without changing its function.

    python benchmarks/inflate.py [--model DIR] --params 350M --output DIR [--drafter HEAD] ...

It adds hidden dimensions, heads, neurons and layers without effect:

- Added hidden dimensions stay zero in the residual stream, so the weights that read them may be random.
- Added heads and neurons are random and end in columns of zeros.
- Added layers are random and end in matrices of zeros.

In a wider RMSNorm the mean square is smaller by the width factor f. ``weight / sqrt(f)`` and ``epsilon / f`` correct this. f is
a power of 4, so both are exact in bfloat16 too.

All probabilities stay the same, but a forward pass costs as much as that of the larger model. The speed of an engine can thus
be measured with a realistic cost ratio of target to drafter, and with real acceptance. Reports name the use of such a model.
Draft heads of the model are widened too, into ``heads/`` of the output (`inflate_head.py`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from inflate_head import inflate_head
from safetensors.torch import save_file
from torch import Tensor

from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.progress import progress_bar
from foredraft.models.checkpoint import open_weights, read_config
from foredraft.models.llama import unsupported

_STEP = 64
"""The number of neurons is a multiple of this, as in real models."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-family model.

    Attributes:
        hidden: hidden size.
        layers: number of layers.
        heads: number of query heads.
        kv_heads: number of key heads.
        head_dim: size of a head.
        neurons: intermediate size.
        vocab: number of tokens.
        tied: whether embedding and output layer share their weights.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    vocab: int
    tied: bool

    @property
    def attention(self) -> int:
        """Number of weights of the projections of one attention layer."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def layer(self) -> int:
        """Number of weights of one layer, without its norms."""
        return self.attention + 3 * self.hidden * self.neurons

    @property
    def ends(self) -> int:
        """Number of weights of embedding and output layer."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """Number of all weights, without norms and biases."""
        return self.ends + self.layers * self.layer


def shape_of(config: Any) -> Shape:
    """Returns the sizes of a model."""
    heads = config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        neurons=config.intermediate_size,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def larger(base: Shape, params: int) -> Shape:
    """Finds a shape of about `params` weights.

    Its width is the largest one, in the proportions of `base`, that leaves at least half of the layers of `base`. The number of
    layers is chosen next. The number of neurons makes up the difference.

    Raises:
        ValueError: `params` is smaller than the number of weights of `base`.
    """
    if params < base.params:
        raise ValueError(f"--params must be at least the model's own {base.params:,}, got {params:,}")
    factor, wide = 1, base
    while True:
        factor *= 4
        parts = {name: getattr(base, name) * factor for name in ("hidden", "heads", "kv_heads", "neurons")}
        wider = Shape(**{**base.__dict__, **parts})
        if params - wider.ends < wider.layer * base.layers / 2:
            break
        wide = wider
    layers = max(base.layers, round((params - wide.ends) / wide.layer))
    left = (params - wide.ends) / layers - wide.attention
    neurons = max(base.neurons, round(left / (3 * wide.hidden) / _STEP) * _STEP)
    return Shape(**{**wide.__dict__, "layers": layers, "neurons": neurons})


class Inflater:
    """Converts the tensors of a checkpoint to the tensors of a larger one.

    Args:
        read: returns the tensor of a name; None if the checkpoint does not have it.
        old, new: sizes before and after.
        generator: source of the random weights.
    """

    def __init__(self, read: Callable[[str], Tensor | None], old: Shape, new: Shape, generator: torch.Generator):
        self._read, self._old, self._new, self._generator = read, old, new, generator
        self._shrink = (new.hidden / old.hidden) ** -0.5

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Yields the tensors in parts: embedding and output layer first, then each layer."""
        yield self._ends()
        for index in range(self._new.layers):
            yield self._layer(index)

    def _ends(self) -> dict[str, Tensor]:
        found = {
            "model.embed_tokens.weight": self._wide("model.embed_tokens.weight", self._new.vocab, self._new.hidden, zeros=True)
        }
        head = self._read("lm_head.weight")
        if head is not None:
            found["lm_head.weight"] = self._wide("lm_head.weight", self._new.vocab, self._new.hidden)
        found["model.norm.weight"] = self._norm("model.norm.weight")
        return found

    def _layer(self, index: int) -> dict[str, Tensor]:
        new, at = self._new, f"model.layers.{index}"
        queries, keys = new.heads * new.head_dim, new.kv_heads * new.head_dim
        found = {
            f"{at}.{name}.weight": self._norm(f"{at}.{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            found |= self._linear(f"{at}.self_attn.{name}_proj", rows, new.hidden)
        found |= self._linear(f"{at}.self_attn.o_proj", new.hidden, queries, zeros=True)
        for name in ("gate", "up"):
            found |= self._linear(f"{at}.mlp.{name}_proj", new.neurons, new.hidden)
        found |= self._linear(f"{at}.mlp.down_proj", new.hidden, new.neurons, zeros=True)
        for name in ("q_norm", "k_norm"):  # they norm one head, whose size does not change
            norm = self._read(f"model.layers.{index % self._old.layers}.self_attn.{name}.weight")
            if norm is not None:
                found[f"{at}.self_attn.{name}.weight"] = norm.clone()
        return found

    def _linear(self, name: str, rows: int, columns: int, *, zeros: bool = False) -> dict[str, Tensor]:
        found = {f"{name}.weight": self._wide(f"{name}.weight", rows, columns, zeros=zeros)}
        alive = self._read(f"model.layers.0.{name.split('.', 3)[3]}.bias")
        if alive is not None:
            found[f"{name}.bias"] = self._wide(f"{name}.bias", rows, zeros=zeros)
        return found

    def _norm(self, name: str) -> Tensor:
        """Widens a norm. Its original weights are rescaled; the added weights only scale zeros."""
        weight = self._wide(name, self._new.hidden)
        weight[: self._old.hidden] *= self._shrink
        return weight

    def _wide(self, name: str, *shape: int, zeros: bool = False) -> Tensor:
        """Puts a tensor in the corner of a larger one, whose other entries are random, or zero with `zeros`."""
        old = self._read(name)
        like = old if old is not None else self._read("model.embed_tokens.weight")
        assert like is not None
        wide = torch.zeros(shape, dtype=like.dtype)
        if not zeros:
            wide.normal_(0, 0.02, generator=self._generator)
        if old is not None:
            wide[tuple(slice(size) for size in old.shape)] = old
        return wide


def inflate(model: Path, params: int, output: Path, *, seed: int = 0) -> Shape:
    """Writes the larger checkpoint to `output`, with tokenizer and generation config, and returns its sizes.

    Raises:
        ValueError: the model is of another family, or `params` is too small.
    """
    config, weights = read_config(model), open_weights(model)
    reason = unsupported(config)
    if reason:
        raise ValueError(f"cannot inflate this model: {reason}")
    old = shape_of(config)
    new = larger(old, params)
    output.mkdir(parents=True, exist_ok=True)
    inflater = Inflater(
        lambda name: weights[name].read() if name in weights else None, old, new, torch.Generator().manual_seed(seed)
    )
    files: dict[str, str] = {}
    with progress_bar(f"inflating to {new.params / 1e6:.0f}M", new.layers + 1) as advance:
        for number, part in enumerate(inflater.parts()):
            file = f"model-{number + 1:05d}-of-{new.layers + 1:05d}.safetensors"
            save_file(part, output / file, metadata={"format": "pt"})
            files |= dict.fromkeys(part, file)
            advance(1)
    (output / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))
    (output / "config.json").write_text(
        json.dumps(larger_config(json.loads((model / "config.json").read_text()), old, new), indent=1)
    )
    for file in model.iterdir():
        if (
            file.suffix in (".json", ".jinja", ".model", ".txt")
            and not (output / file.name).exists()
            and "index" not in file.name
        ):
            shutil.copy(file, output)
    return new


def larger_config(config: dict[str, Any], old: Shape, new: Shape) -> dict[str, Any]:
    """Makes the config.json of the larger model."""
    changed = {
        "hidden_size": new.hidden,
        "num_hidden_layers": new.layers,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.kv_heads,
        "head_dim": new.head_dim,
        "intermediate_size": new.neurons,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * old.hidden / new.hidden,
    }
    if config.get("layer_types"):
        changed["layer_types"] = config["layer_types"] + ["full_attention"] * (new.layers - old.layers)
    return {**config, **changed}


def parse_params(text: str) -> int:
    """Parses a number of weights: ``350M``, ``7B`` or a plain number."""
    factor = {"M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    return round(float(text.rstrip("mMbB")) * factor)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, default=BUNDLED_TARGET, help="directory of a Llama-family model; default: the bundled target"
    )
    parser.add_argument("--params", type=parse_params, required=True, help="number of weights, such as 110M, 350M or 7B")
    parser.add_argument("--output", type=Path, required=True, help="directory for the larger model")
    parser.add_argument("--drafter", type=Path, action="append", default=[], help="a draft head of the model to widen too")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    try:
        shape = inflate(args.model, args.params, args.output, seed=args.seed)
        for drafter in args.drafter:
            inflate_head(drafter, args.output, args.output / "heads" / drafter.name)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"{args.output}: {shape.params / 1e6:.1f}M weights, {shape}")


if __name__ == "__main__":
    main()
