"""Checkpoints packed by AWQ, GPTQ and compressed-tensors: packed here by their formulas, number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from foredraft import LLM, SamplingParams
from foredraft.core.errors import ModelError
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.tree import TreeBatch
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget

MODEL = BUNDLED_TARGET
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
TEXT = [5, 17, 33, 2, 90, 41, 8]


class Weight:
    """Numbers, scales and zeros of a weight [o, i], and what they stand for."""

    def __init__(self, plain: Tensor, bits: int, group: int, symmetric: bool):
        blocks = plain.float().unflatten(1, (-1, group))
        top = (1 << bits) - 1
        if symmetric:
            scales = blocks.abs().amax(2) / (top // 2)
            self.zeros = torch.full_like(scales, 1 << (bits - 1)).int()
        else:
            low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
            scales = (high - low) / top
            self.zeros = (-low / scales).round().clamp(1, top).int()
        self.scales = scales.half()
        steps = blocks / self.scales.float()[..., None] + self.zeros[..., None]
        self.numbers = steps.round().clamp(0, top).int().flatten(1)
        self.plain = (
            (self.numbers.unflatten(1, (-1, group)) - self.zeros[..., None]) * self.scales.float()[..., None]
        ).flatten(1)


def words(numbers: Tensor, bits: int, columns: tuple[int, ...] = ()) -> Tensor:
    """Packs each row of numbers: number columns[i] of a word stands at place i."""
    count = 32 // bits
    packed = torch.zeros(len(numbers), numbers.shape[1] // count, dtype=torch.int64)
    for place, column in enumerate(columns or range(count)):
        packed |= numbers[:, column::count].long() << (bits * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def awq(weight: Weight, bits: int) -> dict[str, Tensor]:
    numbers, zeros = (words(part.T.contiguous(), bits, AWQ_COLUMNS) for part in (weight.numbers, weight.zeros))
    return {"qweight": numbers, "qzeros": zeros, "scales": weight.scales.T.contiguous()}


def gptq(weight: Weight, bits: int, less: int = 1) -> dict[str, Tensor]:
    inputs = weight.numbers.shape[1]
    return {
        "qweight": words(weight.numbers, bits).T.contiguous(),
        "qzeros": words((weight.zeros - less).T.contiguous(), bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": (torch.arange(inputs) // (inputs // weight.scales.shape[1])).int(),
    }


def compressed(weight: Weight, bits: int, symmetric: bool) -> dict[str, Tensor]:
    packed = {"weight_packed": words(weight.numbers, bits), "weight_scale": weight.scales.bfloat16()}
    packed["weight_shape"] = torch.tensor(weight.numbers.shape)
    return packed if symmetric else packed | {"weight_zero_point": words(weight.zeros.T.contiguous(), bits).T.contiguous()}


def scheme(bits: int) -> dict[str, Any]:
    return {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": bits}, "targets": ["Linear"]}}}


VARIANTS: dict[str, tuple[dict[str, Any], Any, int, int, bool]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq, 4, 32, False),
    "gptq v1": ({"quant_method": "gptq", "bits": 4}, gptq, 4, 32, False),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda weight, bits: gptq(weight, bits, less=0),
        4,
        32,
        False,
    ),
    "gptq v2 that calls itself v1": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"},
        lambda weight, bits: gptq(weight, bits, less=0),
        4,
        32,
        True,
    ),
    "gptq v1 that calls itself v2": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq, 4, 32, True),
    "gptq 8": ({"quant_method": "gptq", "bits": 8}, gptq, 8, 32, True),
    "W4A16": (
        {"quant_method": "compressed-tensors", **scheme(4)},
        lambda weight, bits: compressed(weight, bits, symmetric=True),
        4,
        32,
        True,
    ),
    "W4A16 asymmetric": (
        {"quant_method": "compressed-tensors", **scheme(4)},
        lambda weight, bits: compressed(weight, bits, symmetric=False),
        4,
        32,
        False,
    ),
    "W8A16": (
        {"quant_method": "compressed-tensors", **scheme(8)},
        lambda weight, bits: compressed(weight, bits, symmetric=True),
        8,
        32,
        True,
    ),
}


def write(folder: Path, variant: str, group: int | None = None) -> Path:
    """Packs the linear layers of the bundled model. Returns the folder; beside it stands the dequantised model."""
    about, pack, bits, usual, symmetric = VARIANTS[variant]
    tensors = load_file(MODEL / "model.safetensors")
    packed, plain = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            weight = Weight(tensor, bits, group or usual, symmetric)
            if about["quant_method"] == "compressed-tensors":  # its scales are in bfloat16
                weight.scales = weight.scales.bfloat16().half()
                weight.plain = (
                    (weight.numbers.unflatten(1, (-1, group or usual)) - weight.zeros[..., None])
                    .mul(weight.scales.bfloat16().float()[..., None])
                    .flatten(1)
                )
            packed |= {f"{name.removesuffix('weight')}{end}": part for end, part in pack(weight, bits).items()}
            plain[name] = weight.plain
        else:
            packed[name] = plain[name] = tensor.float()
    config = json.loads((MODEL / "config.json").read_text())
    for place, content, more in ((folder / "packed", packed, {"quantization_config": about}), (folder / "plain", plain, {})):
        place.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config | more))
    return folder


def logits_of(path: Path, **options: Any) -> Tensor:
    target = load_target(path, device="cpu", **options)
    return target.forward(TreeBatch.chains([TEXT]), [target.new_pool(2).allocate()]).logits.double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_models_are_the_dequantized_ones(variant: str, tmp_path: Path) -> None:
    folder = write(tmp_path, variant)
    wanted = logits_of(folder / "plain", dtype="float64")
    assert (logits_of(folder / "packed", dtype="float64") - wanted).abs().max() < 1e-6 * wanted.std()
    assert (logits_of(folder / "packed", dtype="float32") - wanted).abs().max() < 1e-4 * wanted.std()
    target = load_target(folder / "packed", device="cpu", dtype="bfloat16")
    assert isinstance(target, NativeTarget)
    assert {part.bits for part in target._layers[0].qkv if part.outputs} == {VARIANTS[variant][2]}


def test_greedy_speculative_decoding_on_packed_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, "awq") / "packed"
    params, prompt = SamplingParams(temperature=0, max_tokens=24), {"prompt_token_ids": TEXT}
    for activations in ("bf16", "int8"):
        outputs = [
            LLM(folder, way, dtype="bfloat16", activations=activations).generate(prompt, params)[0].outputs[0].token_ids
            for way in ({"method": "ar"}, {"method": "ngram", "num_speculative_tokens": 5})
        ]
        assert outputs[0] == outputs[1]


def damaged(folder: Path, change: Any, about: dict[str, Any] | None = None) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= about or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_order_of_activations_is_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        order = tensors["model.layers.0.self_attn.q_proj.g_idx"]
        tensors["model.layers.0.self_attn.q_proj.g_idx"] = order.flip(0).contiguous()

    with pytest.raises(ModelError, match=r"q_proj.weight' follow the order of activations"):
        load_target(damaged(write(tmp_path, "gptq v1") / "packed", change), device="cpu")


@pytest.mark.parametrize(
    ("variant", "about", "said"),
    [
        ("awq", {"version": "gemv"}, "only AWQ of the version gemm"),
        ("gptq v1", {"bits": 3}, "GPTQ with 3 bits cannot be read"),
        ("W4A16", {"format": "nvfp4-pack-quantized"}, "compressed-tensors of the format 'nvfp4-pack-quantized'"),
        ("W4A16", {"quant_method": "bitsandbytes"}, "the checkpoint is quantised, which is not supported"),
    ],
)
def test_other_variants_are_refused_by_name(variant: str, about: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        load_target(damaged(write(tmp_path, variant) / "packed", lambda tensors: None, about), device="cpu")


def test_a_packed_weight_without_scales_is_refused(tmp_path: Path) -> None:
    folder = damaged(write(tmp_path, "awq") / "packed", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scales"))
    with pytest.raises(ModelError, match=r"lacks 'model.layers.0.mlp.up_proj.scales'"):
        load_target(folder, device="cpu")


def test_small_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has groups of 16 inputs"):
        load_target(write(tmp_path, "awq", group=16) / "packed", device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("bits", [4, 8])
def test_words_as_the_package_compressed_tensors_packs_them(bits: int) -> None:
    """Where the package is installed."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    middle = 1 << (bits - 1)
    signed = torch.randint(-middle, middle, (16, 64)).to(torch.int8)
    assert torch.equal(words(signed.int() + middle, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(words(signed.T.int() + middle, bits).T, helpers.pack_to_int32(signed, bits, packed_dim=0))
