"""GGUF files: every type is read as the package ``gguf`` reads it, models of mixed types run, damaged files are refused."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from foredraft import LLM, SamplingParams
from foredraft.core.errors import ModelError
from foredraft.core.tree import TreeBatch
from foredraft.kernels.quantized import Quantized
from foredraft.models.gguf import TYPES, open_gguf
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 512, 2, 4, 2, 300
MIXED = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "output": "Q5_K"}
"""Types as files of mixed types have them; the rest is Q4_0."""


def blocks_of(name: str, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Blocks of a type with any numbers, and scales of the size that weights have."""
    layout, generator = TYPES[name], np.random.default_rng(seed)
    raw = generator.integers(0, 256, (outputs, inputs // layout.inputs, layout.num_bytes), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,))
    for at in halves:
        size = 1e-5 if name == "Q6_K" else 1e-4 if name.endswith("K") else 3e-3
        scales = (generator.normal(size=raw.shape[:2]) * size).astype(np.float16)
        raw[:, :, at : at + 2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(outputs, -1)


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    """Bit for bit as the reference, whose arithmetic is in float32; where it rounds twice, within its rounding."""
    layout, raw = TYPES[name], blocks_of(name, 24, 1024)
    found = layout.read(torch.from_numpy(raw).unflatten(1, (-1, layout.num_bytes))).weight().numpy()
    wanted = dequantize(raw, gguf.GGMLQuantizationType[name])
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2.0**-23 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_types_of_real_weights(name: str) -> None:
    """What the package quantizes is near the weights that it was given."""
    weight = np.random.default_rng(0).normal(size=(8, 256)).astype(np.float32)
    raw, layout = quantize(weight, gguf.GGMLQuantizationType[name]), TYPES[name]
    found = layout.read(torch.from_numpy(raw).unflatten(1, (-1, layout.num_bytes)))
    assert np.abs(found.weight().numpy() - weight).max() < {8: 0.02, 5: 0.2}.get(found.bits, 0.4)
    assert found.num_bytes == raw.nbytes


def write(path: Path, types: dict[str, str], usual: str = "Q4_0") -> Path:
    """Writes a small Llama of random weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    shared, generator = HIDDEN // HEADS * KV_HEADS, np.random.default_rng(1)
    sizes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (shared, HIDDEN),
        "attn_v": (shared, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
    }
    sizes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    layers = {f"blk.{i}.{name}": size for i in range(LAYERS) for name, size in sizes.items()}
    for seed, (name, size) in enumerate({"token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN), **layers}.items()):
        kind = types.get(name.split(".")[-1], usual)
        if kind in TYPES:
            writer.add_tensor(f"{name}.weight", blocks_of(kind, *size, seed=seed), raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            numbers = (generator.normal(size=size) / 16).astype({"F32": np.float32, "F16": np.float16}[kind])
            writer.add_tensor(f"{name}.weight", numbers)
    for name in ("output_norm", *(f"blk.{i}.{kind}" for i in range(LAYERS) for kind in ("attn_norm", "ffn_norm"))):
        writer.add_tensor(f"{name}.weight", (1 + generator.normal(size=HIDDEN) / 10).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixed") / "mixed.gguf", MIXED)


TEXT = [7, 250, 31, 8, 8, 299, 100, 4, 77, 12]


def logits_of(path: Path, **options: str) -> Tensor:
    target = load_target(path, device="cpu", **options)
    return target.forward(TreeBatch.chains([TEXT]), [target.new_pool(4).allocate()]).logits.double()


def as_transformers_reads(path: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).double()
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0]


@pytest.mark.parametrize("usual", ["mixed", "Q4_1", "Q5_0", "Q5_1", "F16"])
def test_models_give_the_logits_of_the_dequantized_weights(usual: str, mixed: Path, tmp_path: Path) -> None:
    """In float64 as Transformers computes them; on the compiled decoder within the rounding of inputs to bfloat16."""
    path = mixed if usual == "mixed" else write(tmp_path / "model.gguf", {"token_embd": "F32", "attn_v": "Q8_0"}, usual)
    wanted = as_transformers_reads(path)
    size = wanted.std()
    assert (logits_of(path, dtype="float64") - wanted).abs().max() < 1e-5 * size
    assert (logits_of(path, dtype="float32") - wanted).abs().max() < 1e-4 * size
    assert (logits_of(path) - wanted).abs().max() < 0.1 * size
    assert (logits_of(path, activations="int8") - wanted).abs().max() < 0.3 * size


@pytest.mark.parametrize("activations", ["bf16", "int8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_decoding_of_few_bits(activations: str, temperature: float, mixed: Path) -> None:
    """Greedy output is that of plain decoding, bit for bit; a chain that is never accepted changes nothing either."""
    params = SamplingParams(temperature=temperature, max_tokens=24, seed=3)
    config = {"method": "ngram", "num_speculative_tokens": 5}
    plain, drafted = (LLM(mixed, way, activations=activations) for way in ({"method": "ar"}, config))
    assert isinstance(plain.target, NativeTarget)
    prompt = {"prompt_token_ids": TEXT * 3}
    [first], [second] = plain.generate(prompt, params), drafted.generate(prompt, params)
    if temperature == 0:
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert len(second.outputs[0].token_ids) == 24
    assert second.metrics.num_draft_tokens > 0


def test_parts_of_one_layer_that_are_stored_differently(mixed: Path) -> None:
    """q and k of one type are one part, v of another is its own; embedding and head have types of their own."""
    target = load_target(mixed, device="cpu")
    assert isinstance(target, NativeTarget)
    layer = target._layers[0]
    assert [part.outputs for part in layer.qkv] == [HIDDEN + HIDDEN // HEADS * KV_HEADS, HIDDEN // HEADS * KV_HEADS, 0]
    assert [part.bits for part in layer.qkv] == [4, 6, 0]
    tensors = {name: tensor.read() for name, tensor in open_gguf(mixed).items()}
    embedding = tensors["model.embed_tokens.weight"]
    assert isinstance(embedding, Quantized)
    ids = torch.tensor([0, 31, 32, 299])
    assert torch.equal(target.embed(ids), embedding.weight()[ids].to(target.dtype))


def test_memory_is_that_of_the_file(mixed: Path) -> None:
    """Without padding, each layout takes at most 1.03 times the bytes of the file."""
    for name, stored in open_gguf(mixed).items():
        weight = stored.read()
        if isinstance(weight, Quantized):
            assert weight.num_bytes <= 1.03 * stored.data.nbytes, name


def test_a_directory_with_one_file_is_that_file(mixed: Path, tmp_path: Path) -> None:
    assert torch.equal(logits_of(mixed.parent), logits_of(mixed))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(mixed.read_bytes())
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        load_target(tmp_path, device="cpu")


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "other.gguf", {})
    content = path.read_bytes()
    name = b"blk.0.ffn_gate.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    assert content[place] == gguf.GGMLQuantizationType.Q4_0
    path.write_bytes(content[:place] + bytes([gguf.GGMLQuantizationType.IQ4_NL]) + content[place + 1 :])
    with pytest.raises(ModelError, match=r"'blk.0.ffn_gate.weight' has the type IQ4_NL"):
        load_target(path, device="cpu")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'rwkv7'"):
        load_target(tmp_path / "other.gguf", device="cpu")


def mutations(content: bytes) -> Iterator[bytes]:
    """200 damaged copies: cut off, bytes changed in the header, counts and lengths made absurd, parts exchanged."""
    numbers, header = random.Random(0), content.index(b"blk.1.attn_k.weight")
    for _ in range(40):
        yield content[: numbers.randrange(len(content))]
    for _ in range(60):
        place = numbers.randrange(header)
        yield content[:place] + bytes([numbers.randrange(256)]) + content[place + 1 :]
    for _ in range(60):
        place = numbers.randrange(4, header - 8)
        absurd = numbers.choice([2**63, 2**64 - 1, 2**40, 0, 1 << 31]).to_bytes(8, "little")
        yield content[:place] + absurd + content[place + 8 :]
    for _ in range(40):
        first, second = sorted(numbers.sample(range(header), 2))
        yield content[:first] + content[second:] + content[first:second]


def test_damaged_files_are_refused_in_one_line(mixed: Path, tmp_path: Path) -> None:
    """Never another error. A change of a number that any model may have, such as a norm's epsilon, cannot be seen."""
    content, refused = mixed.read_bytes(), 0
    for number, damaged in enumerate(mutations(content)):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        try:
            load_target(path, device="cpu")
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
        path.unlink()
    assert refused > 120
