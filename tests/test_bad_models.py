"""Models that cannot be run as they are, and weights that change after loading: refused by name, in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.core.folders import BUNDLED_HEAD
from foredraft.heads.folder import read_head
from foredraft.models.loading import ModelError, load_target
from foredraft.models.weights import finite
from test_loading import SIZES, edit_config, edit_weights, fails, logits, make_model, wanted

KINDS = ["llama", "gpt2"]  # our decoder, and the model's own code
NAMES = {
    "llama": {name: name for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
    },
}
DRAFTING = {"method": "lm", "tree": "chain", "num_speculative_tokens": 2}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    make_model(kind).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def llama(tmp_path):
    make_model().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def complains(capsys):
    """`LLM` and the command line both refuse a model: the one raises a line, the other prints it and a hint."""

    def call(model, match, *arguments, drafter=None, **options):
        capsys.readouterr()
        config = {**DRAFTING, "model": str(drafter)} if drafter else {"method": "ar"}
        with pytest.raises((ValueError, TypeError), match=match) as error:
            LLM(model, config, **options)
        assert "\n" not in str(error.value)
        given = ["--model", model, *(["--draft-model", drafter] if drafter else ["--method", "ar"]), *arguments]
        with pytest.raises(SystemExit) as ended:
            main(["generate", "x", *map(str, given)])
        err = capsys.readouterr().err
        assert ended.value.code == 1
        assert "Traceback" not in err
        lines = err.splitlines()
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], err
        assert "TRACEBACK" not in lines[1]

    return call


def save_tokenizer(folder, size=SIZES["vocab_size"], *, added=()):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.add_special_tokens([AddedToken(one, special=True) for one in added])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


# --- Tokenizers beyond the embedding


@pytest.mark.parametrize(
    ("size", "added", "said"),
    [
        (37, ["<pad>"], r"ids up to 37, but the model's embedding has 37 rows, none for '<pad>' \(37\)"),
        (36, ["<a>", "<b>", "<c>"], r"ids up to 38, .* none for '<b>' \(37\), '<c>' \(38\)"),
        (45, [], r"ids up to 44, .* none for 'w37' \(37\), 'w38' \(38\), 'w39' \(39\), \.\.\."),
    ],
)
def test_tokens_that_the_model_does_not_have(size, added, said, folder, complains):
    save_tokenizer(folder, size, added=added)
    complains(folder, said)


def test_as_many_tokens_as_rows_or_fewer(folder):
    for size, added in ((36, ["<a>"]), (20, []), (37, [])):
        save_tokenizer(folder, size, added=added)
        assert LLM(folder, {"method": "ar"}).tokenizer is not None


def test_a_tokenizer_of_the_caller(folder, tmp_path):
    save_tokenizer(tmp_path / "other", 37, added=["<pad>"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="none for '<pad>'"):
        LLM(folder, {"method": "ar"}, tokenizer=tokenizer)
    for other in (3, ["x"], object()):
        with pytest.raises(TypeError, match="tokenizer must be a Transformers tokenizer"):
            LLM(folder, {"method": "ar"}, tokenizer=other)


def test_a_draft_model_whose_tokenizer_goes_beyond_it(llama, tmp_path, complains):
    save_tokenizer(llama)
    shutil.copytree(llama, tmp_path / "draft")
    save_tokenizer(tmp_path / "draft", 37, added=["<pad>"])
    complains(llama, r"the draft model's embedding has 37 rows, none for '<pad>' \(37\)", drafter=tmp_path / "draft")


@pytest.mark.parametrize(
    "content", [{"model_max_length": "x"}, {"tokenizer_class": 3}, {"eos_token": 3}, {"added_tokens_decoder": 3}, [], "x"]
)
def test_bad_tokenizer_config(content, folder, complains):
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content} if isinstance(content, dict) else content))
    complains(folder, "cannot read the tokenizer in|model_max_length in .* must be a number, got 'x'")


# --- Adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_a_model(name, folder, complains):
    (folder / name).write_text("{}")
    complains(folder, rf"also holds an adapter \({name}\), but adapters are not supported\. Merge it")


def test_an_adapter_alone(tmp_path, complains):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"}))
    complains(tmp_path, r"holds an adapter \(adapter_config.json\) of the model 'owner/base' and no model")
    (tmp_path / "adapter_config.json").write_text("{")
    complains(tmp_path, "adapter_config.json' is not JSON")


def test_an_adapter_beside_a_draft_model(llama, tmp_path, complains):
    shutil.copytree(llama, tmp_path / "draft")
    (tmp_path / "draft" / "adapter_config.json").write_text("{}")
    complains(llama, "also holds an adapter", drafter=tmp_path / "draft")


# --- Weights that are no numbers


PARTS = {
    "llama": ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"],
    "gpt2": ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.ln_f.weight"],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, kind, folder, complains):
    good = (folder / "model.safetensors").read_bytes()
    for name in PARTS[kind]:
        (folder / "model.safetensors").write_bytes(good)

        def spoil(weights, name=name):
            weights[name].view(-1)[-1] = value

        edit_weights(folder, spoil)
        complains(folder, rf"the tensor '{name}' holds NaN or infinity in torch.float32\. Copy the checkpoint again")
        fails(AutoModelForCausalLM.from_pretrained(folder), f"the tensor '{name}' holds NaN or infinity")


def test_weights_that_a_dtype_cannot_hold(folder, kind, complains):
    def grow(weights):
        weights[PARTS[kind][0]].view(-1)[3] = 1e6

    edit_weights(folder, grow)
    load_target(folder, dtype="float32")
    complains(
        folder, r"holds NaN or infinity in torch.float16\. .* a dtype with a wider range", "--dtype", "float16", dtype="float16"
    )


def test_a_draft_model_that_is_not_finite(llama, tmp_path, complains):
    shutil.copytree(llama, tmp_path / "draft")
    edit_weights(tmp_path / "draft", lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    complains(llama, "the tensor 'model.norm.weight' holds NaN", drafter=tmp_path / "draft")


def test_a_head_that_is_not_finite(tmp_path):
    shutil.copytree(BUNDLED_HEAD, tmp_path / "head")
    edit_weights(tmp_path / "head", lambda weights: weights[min(weights)].view(-1)[0].fill_(float("inf")))
    with pytest.raises(ModelError, match=r"the tensor '.*' holds NaN or infinity"):
        read_head(tmp_path / "head")
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        LLM(None, {"method": "fspad", "model": str(tmp_path / "head"), "tree": "chain", "num_speculative_tokens": 2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite(dtype):
    good = torch.full((40, 33), torch.finfo(dtype).max, dtype=dtype)  # sums of it are infinite, it is not
    good[::2] *= -1
    assert finite("x", good) is good
    assert finite("x", torch.empty(0, dtype=dtype)).numel() == 0
    for value in ("nan", "inf", "-inf"):
        for place in (0, 700, -1):
            bad = good.clone()
            bad.view(-1)[place] = float(value)
            with pytest.raises(ModelError, match="the tensor 'x' holds NaN or infinity"):
                finite("x", bad)
    assert finite("x", torch.arange(3)) is not None


def spoiled_head(folder, change=None, **config):
    shutil.copytree(BUNDLED_HEAD, folder)
    edit_weights(folder, change or (lambda weights: None))
    edit_config(folder, **config)
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": -1}, "hidden_size must be a whole number, at least 1, got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number above 0"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "rope_type is 'nope'"),
        ({"text_config": 3}, "text_config must be an object"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
    ],
)
def test_nonsense_in_the_config_of_a_head(config, said, tmp_path):
    with pytest.raises(ModelError, match=f"config.json of the head in .* is not valid: {said}") as error:
        read_head(spoiled_head(tmp_path / "head", **config))
    assert "\n" not in str(error.value)


def test_a_head_in_whole_numbers(tmp_path):
    def cast(weights):
        name = next(one for one in weights if one.endswith("down_proj.weight"))
        weights[name] = (weights[name] * 30).to(torch.int8)

    with pytest.raises(ModelError, match=r"stored as I8, and config\.json has no quantization_config"):
        read_head(spoiled_head(tmp_path / "head", cast))


def test_the_file_of_a_head_is_overwritten(tmp_path):
    folder = spoiled_head(tmp_path / "head", lambda weights: weights.update({k: v.float() for k, v in weights.items()}))
    head = read_head(folder).head
    before = {name: one.clone() for name, one in head.state_dict().items()}
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * (folder / "model.safetensors").stat().st_size)
    assert all(torch.equal(one, before[name]) for name, one in head.state_dict().items())


# --- Weights that change later


def test_a_loaded_model_that_changes(kind):
    """Our decoder keeps the weights that it read; another model runs as it is, all of it."""
    model = make_model(kind)
    before, target = wanted(model), load_target(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    expected = before if kind == "llama" else wanted(model)
    assert not torch.allclose(wanted(model), before, atol=1e-2)
    torch.testing.assert_close(logits(target), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["auto", "float64", "bfloat16"])
def test_a_file_that_is_overwritten(dtype, kind, folder):
    target = load_target(folder, dtype=dtype)
    before = logits(target)
    size = (folder / "model.safetensors").stat().st_size
    with open(folder / "model.safetensors", "r+b") as file:  # the same file, as a copy over it writes
        file.write(b"\xff" * size)
    assert torch.equal(logits(target), before)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(8)  # a mapped file would end the process
    assert torch.equal(logits(target), before)


def test_the_fingerprint_is_that_of_the_weights_that_were_read(llama):
    llm = LLM(llama, {"method": "ar"})
    expected = LLM(llama, {"method": "ar"})._parts.fingerprint
    edit_weights(llama, lambda weights: [one.mul_(3) for one in weights.values()])
    assert llm._parts.fingerprint == expected
    assert LLM(llama, {"method": "ar"})._parts.fingerprint != expected


# --- Configurations against files


@pytest.mark.parametrize("value", [0, -1, 1, 3, 10**7])
def test_numbers_of_layers(value, kind, folder, complains):
    edit_config(folder, **{NAMES[kind]["num_hidden_layers"]: value})
    said = {0: "whole number, at least 1, got 0", -1: "whole number, at least 1, got -1"}
    said |= {1: "num_hidden_layers 1, the file holds 2 layers", 3: "num_hidden_layers 3, the file holds 2 layers"}
    complains(folder, said.get(value, f"lacks .*num_hidden_layers {value}, the file holds 2 layers"))


def test_a_loaded_model_with_another_number_of_layers():
    model = make_model()
    model.config.num_hidden_layers = 1
    fails(model, "config.json says num_hidden_layers 1, the file holds 2 layers")


def test_layers_that_are_known_to_be_left_out(kind, folder):
    """Some checkpoints hold layers that predict several tokens, behind the others, and say how many."""
    stack = "model.layers" if kind == "llama" else "transformer.h"
    edit_weights(folder, lambda weights: weights.update({f"{stack}.2.eh_proj.weight": torch.ones(2, 2)}))
    fails(folder, "num_hidden_layers 2, the file holds 3 layers")
    edit_config(folder, num_nextn_predict_layers=1)
    load_target(folder)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -4, 10**9, "16", 2.5, True])
def test_sizes(name, value, kind, folder, complains):
    key = NAMES[kind].get(name, name)
    edit_config(folder, **{str(key): value})
    said = (
        f"{key} must be a whole number, at least 1, got"
        if value != 10**9
        else "asks for|must be|[Mm]ultiple|cannot build a model"
    )
    complains(folder, said)


def test_heads_that_do_not_fit(llama, complains):
    for changes, said in (
        ({"num_key_value_heads": 5}, r"num_attention_heads \(2\) must be a multiple of num_key_value_heads \(5\)"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number, at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be a whole number"),
        ({"num_attention_heads": 3}, r"(?i)hidden.size \(16\) .*multiple of"),
        ({"pad_token_id": 100}, r"pad_token_id \(100\) must be below vocab_size \(37\)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a whole number"),
        ({"sliding_window": -3}, "sliding_window must be a whole number, at least 1, or null, got -3"),
    ):
        good = (llama / "config.json").read_text()
        edit_config(llama, **changes)
        complains(llama, said)
        (llama / "config.json").write_text(good)


# --- Nonsense in config.json


def nested(levels):
    inside = {}
    for _ in range(levels):
        inside = {"a": inside}
    return inside


NONSENSE = [
    ({"text_config": 3}, "text_config must be an object, got 3"),
    ({"text_config": "x"}, "text_config must be an object, got 'x'"),
    ({"text_config": {"hidden_size": 16}}, "has no text_config"),
    ({"x": nested(100)}, "nested 101 levels deep, but at most 16 levels are allowed"),
    ({"rope_scaling": nested(900)}, "nested 901 levels deep"),
    ({"dtype": "int8"}, "dtype must be one of float64, float32, float16, bfloat16, got 'int8'"),
    ({"dtype": None, "torch_dtype": "nope"}, "torch_dtype must be one of .*, got 'nope'"),
    ({"dtype": 3}, "dtype must be one of .*, got 3"),
    ({"attn_implementation": "nope"}, "attn_implementation must be one of eager, sdpa.*, got 'nope'"),
    ({"attn_implementation": "owner/kernel"}, "attn_implementation must be one of .*, got 'owner/kernel'"),
    ({"_attn_implementation": 3}, "_attn_implementation must be one of .*, got 3"),
    ({"quantization_config": 3}, "quantization_config must be an object, got 3"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"rope_scaling": []}, r"rope_scaling must be an object, got \[\]"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a number above 0, got 0"),
    ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon must be a number above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0, got nan"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0, got 'small'"),
    ({"rope_theta": float("inf")}, "rope_theta must be a number above 0, got inf"),
    ({"rope_theta": [1e4]}, r"rope_theta must be a number above 0, got \[10000.0\]"),
    ({"hidden_act": "nope"}, "hidden_act is 'nope', but must be one of"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"id2label": 3}, "is not valid"),
    ({"auto_map": 3}, "is not valid"),
]


@pytest.mark.parametrize(("changes", "said"), NONSENSE, ids=[str(changes)[:40] for changes, _ in NONSENSE])
def test_nonsense_in_config_json(changes, said, folder, complains):
    edit_config(folder, **changes)
    complains(folder, said)


def test_a_file_nested_too_deep_to_be_read(folder, complains):
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    complains(folder, "config.json' is not JSON")


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_the_attention_of_a_checkpoint_is_not_used(name, folder):
    before = logits(load_target(folder))
    edit_config(folder, attn_implementation=name)
    assert torch.equal(logits(load_target(folder)), before)


def test_a_window_that_the_published_model_does_not_read(llama):
    edit_config(llama, sliding_window=2)
    expected = wanted(AutoModelForCausalLM.from_pretrained(llama))
    torch.testing.assert_close(logits(load_target(llama)), expected, atol=1e-4, rtol=0)


# --- Whole numbers without a scale


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_checkpoints_in_whole_numbers(dtype, kind, folder, complains):
    name = {"llama": "model.layers.0.mlp.up_proj.weight", "gpt2": "transformer.h.0.mlp.c_fc.weight"}[kind]
    edit_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype)}))
    complains(folder, f"'{name}' stored as .*, and config.json has no quantization_config")


def test_all_of_a_checkpoint_in_int8(folder, complains):
    def cast(weights):
        for name in weights:
            weights[name] = (weights[name] * 30).to(torch.int8)

    edit_weights(folder, cast)
    complains(folder, "stored as I8, and config.json has no quantization_config that gives their scale")


def test_whole_numbers_that_are_no_weights(kind, folder):
    """Old checkpoints store masks and positions, which nobody reads."""
    mask, places = torch.ones(1, 1, 4, 4, dtype=torch.uint8), torch.arange(4)
    stack = "model.layers" if kind == "llama" else "transformer.h"
    edit_weights(folder, lambda weights: weights.update({f"{stack}.0.attn.masked": mask, "position_ids": places}))
    load_target(folder)


def test_a_loaded_model_in_whole_numbers(kind):
    model = make_model(kind)
    linear = model.model.layers[0].mlp.up_proj if kind == "llama" else model.transformer.h[0].mlp.c_fc
    linear.weight = torch.nn.Parameter((linear.weight * 30).to(torch.int8), requires_grad=False)
    fails(model, "stored as torch.int8, and config.json has no quantization_config")


# --- Arguments


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "meta"}, r"device 'meta' cannot be used .models run on cpu and cuda only.\. Give auto, cpu"),
        ({"device": "xyz"}, "device 'xyz' cannot be used"),
        ({"device": 3}, "device '3' cannot be used"),
        ({"device": "mps"}, "device 'mps' cannot be used"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"dtype": 3}, "unknown dtype '3'"),
        ({"dtype": torch.int8}, "unknown dtype 'torch.int8'"),
        ({"seed": "x"}, "seed must be a whole number between 0 and .*, got 'x'"),
        ({"seed": 1.5}, "seed must be a whole number between 0 and .*, got 1.5"),
        ({"seed": None}, "seed must be a whole number between 0 and .*, got None"),
        ({"revision": "main"}, "revision 'main' is for Hub ids only"),
        ({"revision": 3}, "revision must be the name of a branch, tag or commit, got 3"),
        ({"revision": ""}, "revision must be the name of a branch, tag or commit, got ''"),
        ({"max_model_len": 0}, "max_model_len must be a whole number, at least 1, got 0"),
        ({"max_model_len": "x"}, "max_model_len must be a whole number, at least 1, got 'x'"),
    ],
)
def test_arguments(options, said, llama):
    with pytest.raises((ValueError, TypeError), match=said) as error:
        LLM(llama, {"method": "ar"}, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("x" * 5000, "has 5000 characters, and a path has at most 4096"),
        ("/tmp/" + "x" * 300, "cannot look into '/tmp/x"),
        ("x" * 200, "is neither a directory nor a valid Hub id|cannot look into|no directory"),
        ("a--b/c", "is neither a directory nor a valid Hub id"),
        ("~nobody-of-this-name/model", "cannot look into '~nobody|no directory"),
    ],
)
def test_paths(model, said, complains, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    complains(model, said)
    complains(Path(model), "has 5000 characters|cannot look into|no directory")


def test_what_is_no_model():
    with pytest.raises(ModelError, match=r"loaded PreTrainedModel, got Linear\(in_features=2"):
        LLM(torch.nn.Linear(2, 2), {"method": "ar"})
    with pytest.raises(ModelError, match="got a Sequential") as error:
        LLM(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"method": "ar"})
    assert "\n" not in str(error.value)


def test_a_loaded_model_and_a_revision():
    fails(make_model(), r"the model is loaded already\. Leave it out", revision="main")


def test_a_loaded_model_without_data(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_model(kind).config)
    fails(model, "device 'meta' cannot be used")


def test_a_good_model_still_runs(folder):
    assert len(LLM(folder, {"method": "ar"}).generate([5, 9, 3], GREEDY)[0].outputs[0].token_ids) == 6


@pytest.mark.parametrize("name", ["q_proj.lora_A.weight", "q_proj.weight_scale", "o_proj.qweight", "v_proj.scales"])
def test_an_adapter_or_scales_in_the_file_are_refused(name, folder, kind, complains):
    stack = "model.layers.0.self_attn" if kind == "llama" else "transformer.h.0.attn"
    edit_weights(folder, lambda weights: weights.update({f"{stack}.{name}": torch.ones(4)}))
    complains(folder, f"holds '{stack}.{name}': an adapter or a quantisation was not merged")


@pytest.mark.parametrize("name", ["q_proj.bias", "q_norm.weight"])
def test_other_tensors_that_the_configuration_does_not_know_are_reported(name, caplog):
    """Transformers leaves them out too."""
    model = make_model("llama")
    with caplog.at_level("WARNING", "foredraft"):
        load_target(model)
        assert not caplog.records
    from foredraft.models.weights import check_unused

    check_unused([f"model.layers.0.self_attn.{name}", "model.layers.0.self_attn.rotary_emb.inv_freq"], ["model.layers.0"])
    [line] = caplog.records
    assert f"holds 'model.layers.0.self_attn.{name}', which a model with this config.json does not use" in line.getMessage()


def test_a_loaded_model_with_hooks_or_other_layers():
    class Tripled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    hooked = make_model("llama")
    hooked.model.layers[0].register_forward_hook(lambda module, given, found: None)
    fails(hooked, "the module 'model.layers.0' has forward hooks")
    other = make_model("llama")
    other.model.layers[1].mlp.up_proj = Tripled(2, 2)
    fails(other, "the module 'model.layers.1.mlp.up_proj' is a Tripled of test_bad_models")
