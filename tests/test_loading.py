"""Loading: every way in agrees, and every fault is one clear line."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from foredraft.core.tree import TreeBatch
from foredraft.models.hf import HFTarget
from foredraft.models.llama import LlamaTarget
from foredraft.models.loading import ModelError, load_generation_config, load_target, load_tokenizer

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = [5, 9, 3, 30]


def make_model(kind="llama", **more):
    torch.manual_seed(0)
    options = {**SIZES, **more}
    if kind == "gpt2":
        options = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **more}
    # Eager, because Transformers 5.16 gives Gemma 2 to sdpa, which leaves out the soft capping.
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.2)
    return model


@pytest.fixture
def llama(tmp_path):
    make_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def gpt2(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def logits(target):
    cache = target.new_pool(2).allocate()
    return target.forward(TreeBatch.chains([TOKENS]), [cache]).logits


def wanted(model):
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def fails(source, match, load=load_target, **options):
    """Loading raises a `ModelError` of one line."""
    with pytest.raises(ModelError, match=match) as error:
        load(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path, change):
    weights = load_file(path / "model.safetensors")
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


# --- Ways in


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("shard", ["10GB", "6KB"])
def test_directory_and_loaded_model_agree(kind, shard, tmp_path):
    model = make_model(kind, **({"head_dim": 8} if kind in ("gemma2", "qwen3") else {}))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "6KB")
    expected = LlamaTarget if kind in ("llama", "mistral", "qwen2", "qwen3") else HFTarget
    for source in (str(tmp_path), tmp_path, model):
        target = load_target(source, device="cpu")
        assert type(target) is expected
        torch.testing.assert_close(logits(target), wanted(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(kind, tied, tmp_path):
    model = make_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not tied)
    for source in (tmp_path, model):
        torch.testing.assert_close(logits(load_target(source)), wanted(model), atol=1e-4, rtol=0)


def test_a_head_that_contradicts_the_configuration(llama):
    """As Transformers does: a head that differs from the embedding is kept, whatever the configuration says."""
    edit_config(llama, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(logits(load_target(llama)), wanted(model), atol=1e-4, rtol=0)
    edit_weights(llama, lambda weights: weights.pop("model.embed_tokens.weight"))
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(logits(load_target(llama)), wanted(model), atol=1e-4, rtol=0)


def test_tensors_that_the_configuration_does_not_know_are_left_out(llama):
    before = logits(load_target(llama))
    biases = {f"model.layers.0.self_attn.{name}_proj.bias": torch.ones(1) for name in "qkv"}
    edit_weights(llama, lambda weights: weights.update(biases))
    assert torch.equal(logits(load_target(llama)), before)


DTYPES = {
    torch.bfloat16: ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16],
    torch.float16: ["float16", "fp16", "half", torch.float16],
    torch.float32: ["float32", "fp32", "float", torch.float32],
    torch.float64: ["float64", "fp64", "double", torch.float64],
}


@pytest.mark.parametrize(("dtype", "name"), [(dtype, name) for dtype, names in DTYPES.items() for name in names])
def test_dtype_names(dtype, name, llama, gpt2):
    for source in (llama, gpt2):
        target = load_target(source, dtype=name)
        assert target.dtype == dtype
        assert logits(target).dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_the_dtype_of_the_checkpoint(kind, dtype, tmp_path):
    make_model(kind).to(dtype).save_pretrained(tmp_path)
    assert load_target(tmp_path).dtype == dtype
    edit_config(tmp_path, dtype=None)
    assert load_target(tmp_path).dtype == dtype


def test_device(llama):
    for device in ("auto", None, "cpu", torch.device("cpu")):
        expected = "cpu" if device not in ("auto", None) or not torch.cuda.is_available() else "cuda"
        assert load_target(llama, device=device).device.type == expected
    fails(llama, "device 'cude' cannot be used", device="cude")
    fails(llama, "device 'cuda:99' cannot be used", device="cuda:99")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_file_stays_mapped(kind, tmp_path):
    """Weights are copied, so that a file that is overwritten later changes nothing; test_bad_models overwrites one."""
    make_model(kind).save_pretrained(tmp_path)
    target = load_target(tmp_path, device="cpu")
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert not any(str(tmp_path) in line for line in maps)
    del target


# --- Bad input


def test_no_such_directory(tmp_path):
    for source in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "~/nothing-here", "a/b/c", "nothing/"):
        fails(source, "no directory .*nothing|no directory 'a/b/c'")
    fails(tmp_path / "nothing", "no directory", load_tokenizer)
    fails(tmp_path / "nothing", "no directory", load_generation_config)


def test_hub_id_without_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (load_target, load_tokenizer, load_generation_config):
        fails("nobody/no-such-model", "neither a directory nor in the local Hub cache.*hf download", load)
    fails("nobody/no-such-model", "at revision 'v2'", revision="v2")


@pytest.mark.parametrize("source", [None, 3, "", " ", ["x"]])
def test_not_a_model(source):
    fails(source, "must be a directory, a Hub id or a loaded PreTrainedModel")


def test_empty_directory_and_file(tmp_path):
    fails(tmp_path, r"is empty\. It must hold config.json")
    (tmp_path / "file").write_text("x")
    fails(tmp_path / "file", r"is a file\. Give the directory")


def test_revision_of_a_directory(llama):
    fails(llama, "revision 'main' is for Hub ids only", revision="main")


def test_bad_config(llama):
    path = llama / "config.json"
    good = path.read_text()
    path.unlink()
    fails(llama, "holds no config.json")
    for text, match in [
        (good[:40], "is not JSON"),
        ("[1]", "must be a JSON object, got a list"),
        ("{}", "names no model_type"),
        (json.dumps(json.loads(good) | {"model_type": "lama"}), "unknown model_type 'lama' .*did you mean 'llama'"),
        (json.dumps(json.loads(good) | {"num_hidden_layers": "many"}), "config.json in .* is not valid"),
        (json.dumps(json.loads(good) | {"num_hidden_layers": 3}), "lacks 'model.layers.2.input_layernorm.weight'.* and 7 more"),
        (json.dumps(json.loads(good) | {"intermediate_size": 32}), "has shape .* where config.json asks for"),
        (json.dumps(json.loads(good) | {"quantization_config": {"quant_method": "gptq"}}), "quantised"),
    ]:
        path.write_text(text)
        fails(llama, match)
    path.write_bytes(b"\xff\xfe\x00")
    fails(llama, "is not JSON")


def test_remote_code_is_refused_unless_the_type_is_known(llama):
    before = logits(load_target(llama))
    edit_config(llama, auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"})
    (llama / "modeling_x.py").write_text("raise SystemExit('code of the checkpoint was run')")
    assert torch.equal(logits(load_target(llama)), before)
    edit_config(llama, model_type="mine")
    fails(llama, "'mine' needs code from its checkpoint, which is never run")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_broken_safetensors(kind, tmp_path):
    make_model(kind).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    for content in (good[:-100], good[:50], b"", b"not safetensors at all" * 9, b"\xff" * 64):
        path.write_bytes(content)
        fails(tmp_path, "model.safetensors in .* is corrupt or cut off")
    save_file({}, path)
    fails(tmp_path, "hold no tensor")
    path.unlink()
    fails(tmp_path, r"holds no weights\. It needs model.safetensors or")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_broken_shards(kind, tmp_path):
    make_model(kind).save_pretrained(tmp_path, max_shard_size="6KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    fails(tmp_path, f"{shard.name} in .* is corrupt or cut off")
    shard.unlink()
    fails(tmp_path, f"lacks {shard.name}, which model.safetensors.index.json names")
    index.write_text("{}")
    fails(tmp_path, "has no weight_map")
    index.write_text("{")
    fails(tmp_path, "index.json' is not JSON")


def test_missing_tensor_and_wrong_shape(llama, gpt2):
    edit_weights(llama, lambda weights: weights.pop("lm_head.weight"))
    fails(llama, "lacks 'lm_head.weight'")
    edit_weights(gpt2, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight"))
    fails(gpt2, "lacks 'transformer.h.1.mlp.c_fc.weight'")
    make_model("gpt2").save_pretrained(gpt2)
    edit_config(gpt2, n_inner=50)
    fails(gpt2, "has another shape than config.json asks for in 'transformer.h.0.mlp.c_fc.bias'.* and 4 more tensors")


def test_pickled_weights_are_refused(llama):
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    fails(llama, "only pickled weights .pytorch_model.bin.*Convert them to safetensors with .*save_pretrained")


@pytest.mark.parametrize("name", ["fp33", "int8", "bfloat1", torch.int64])
def test_bad_dtype(name, llama):
    message = fails(llama, "unknown dtype", dtype=name)
    assert "bfloat16" in message and "auto" in message
    if name == "bfloat1":
        assert "Did you mean 'bfloat16'?" in message


def test_models_that_cannot_run_over_trees(tmp_path):
    refused = {"mamba": "state-space", "bloom": "ALiBi", "t5": "encoder-decoder", "vit": "not a causal language model"}
    for kind, named in refused.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        fails(tmp_path / kind, named)


def test_loaded_models_that_do_not_fit(tmp_path):
    from transformers import GPT2Model, LlamaModel

    fails(LlamaModel(AutoConfig.for_model("llama", **SIZES)), "LlamaModel has no language-model head")
    gpt2 = make_model("gpt2")
    fails(GPT2Model(gpt2.config), "GPT2Model has no language-model head")
    fails(gpt2, "a loaded GPT2LMHeadModel is not moved or cast", dtype="float64")
    bert = AutoConfig.for_model("bert", vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    fails(AutoModelForCausalLM.from_config(bert), "cannot run model type 'bert' over token trees")
    assert load_target(make_model("llama"), dtype="float64").dtype == torch.float64


# --- Tokenizer and defaults


def test_tokenizer(llama):
    assert load_tokenizer(llama) is None
    assert load_tokenizer(make_model()) is None
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(llama)
    assert load_tokenizer(llama).encode("a") == [1]
    assert load_tokenizer(AutoModelForCausalLM.from_pretrained(llama)).encode("a") == [1]
    (llama / "tokenizer.json").write_text("{")
    fails(llama, "cannot read the tokenizer in", load_tokenizer)


def test_generation_config(llama):
    assert load_generation_config(llama) == {"eos_token_id": [2]}
    path = llama / "generation_config.json"
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": None, "repetition_penalty": 1.1, "do_sample": False}
    path.write_text(json.dumps(given | {"eos_token_id": [7, 2], "max_length": 9}))
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 9}
    assert load_generation_config(llama) == expected | {"eos_token_id": [7, 2]}
    assert load_generation_config(AutoModelForCausalLM.from_pretrained(llama)) == expected | {"eos_token_id": [7, 2]}
    path.write_text("nonsense")
    fails(llama, "generation_config.json' is not JSON", load_generation_config)
    path.unlink()
    edit_config(llama, eos_token_id=None)
    assert load_generation_config(llama) == {"eos_token_id": []}
    shutil.rmtree(llama)
    fails(llama, "no directory", load_generation_config)
