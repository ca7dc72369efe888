"""What is read without Transformers is what Transformers reads, and everything else goes to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from foredraft import LLM, SamplingParams
from foredraft.core.folders import BUNDLED, BUNDLED_TARGET
from foredraft.heads.folder import read_head
from foredraft.models import loading, plain
from foredraft.models.checkpoint import open_weights
from foredraft.models.plain import PlainConfig, expected, fits, plain_config, plain_model
from foredraft.models.rope import frequencies
from foredraft.models.tokenizer import QuickTokenizer, load_tokenizer, quick_tokenizer

TEXTS = [
    "Once upon a time",
    "",
    "  two  spaces\n\n\tand a tab 12345 1,234.5",
    "Zürich, naïve, 東京, 🙂🙃, \u200b",
    "<|end|> and <|pad|> inside<|end|>",
    "def f(x):\n    return x ** 2",
]


def altered(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """A copy of the bundled target whose JSON file `name` has other values; ... removes a key."""
    shutil.copytree(BUNDLED_TARGET, folder)
    values = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key)
        else:
            values[key] = value
    (folder / name).write_text(json.dumps(values))
    return folder


def test_the_plain_values_are_those_of_transformers() -> None:
    config, theirs = plain_model(BUNDLED_TARGET), AutoConfig.from_pretrained(BUNDLED_TARGET)
    assert isinstance(config, PlainConfig)
    read = [*plain._STATED, *plain._FIXED]
    assert {key: getattr(config, key) for key in read} == {key: getattr(theirs, key) for key in read}
    for ours, other in zip(frequencies(config, 64), frequencies(AutoConfig.from_pretrained(BUNDLED_TARGET), 64), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(other))


@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_those_of_transformers(tied: bool) -> None:
    values = json.loads((BUNDLED_TARGET / "config.json").read_text()) | {"tie_word_embeddings": tied, "head_dim": 32}
    config = plain_config(values)
    assert config is not None
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).state_dict()
    assert {name: one.shape for name, one in expected(config).items()} == {name: one.shape for name, one in theirs.items()}


def test_unscaled_frequencies_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for size, theta in ((64, 10000.0), (96, 500000.0), (128, 1e6)):
        values = json.loads((BUNDLED_TARGET / "config.json").read_text())
        values |= {"head_dim": size, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        config = plain_config(values)
        theirs = LlamaRotaryEmbedding(config=AutoConfig.for_model(**values))
        assert torch.equal(frequencies(config, 64).frequencies, theirs.inv_freq)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": ...},
        {"head_dim": None},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"model_type": "mistral", "sliding_window": None},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 1},
        {"something_new": 1},
        {"num_hidden_layers": True},
        {"hidden_size": -4},
        {"dtype": "int8"},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
def test_whatever_is_not_plain_goes_to_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    assert plain_model(altered(tmp_path / "model", **changes)) is None


def test_weights_that_do_not_fit_go_to_transformers(tmp_path: Path) -> None:
    weights = open_weights(BUNDLED_TARGET)
    assert fits(plain_model(altered(tmp_path / "same")), weights)  # type: ignore[arg-type]
    for number, changes in enumerate(({"num_hidden_layers": 7}, {"num_hidden_layers": 10**7}, {"hidden_size": 380})):
        config = plain_model(altered(tmp_path / str(number), **changes))
        assert config is not None
        assert not fits(config, weights)
    lacking = dict(list(weights.items())[1:])
    assert not fits(plain_model(BUNDLED_TARGET), lacking)  # type: ignore[arg-type]


def test_an_adapter_beside_it_goes_to_transformers(tmp_path: Path) -> None:
    folder = altered(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert plain_model(folder) is None
    with pytest.raises(ValueError, match="adapter"):
        LLM(folder, {"method": "ar"})


def test_tokens_are_those_of_transformers() -> None:
    quick, theirs = load_tokenizer(BUNDLED_TARGET), AutoTokenizer.from_pretrained(BUNDLED_TARGET)
    assert isinstance(quick, QuickTokenizer)
    for text in TEXTS:
        for special in (True, False):
            assert quick.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
            assert quick(text, add_special_tokens=special)["input_ids"] == theirs(text, add_special_tokens=special)["input_ids"]
        ids = theirs.encode(text)
        assert quick.decode(ids) == theirs.decode(ids)
        assert quick.backend_tokenizer.decode(ids) == theirs.backend_tokenizer.decode(ids)
    assert quick.get_vocab() == theirs.get_vocab()
    assert quick.get_added_vocab() == theirs.get_added_vocab()
    assert quick.chat_template == theirs.chat_template
    assert quick.eos_token_id == theirs.eos_token_id
    assert dict(quick(["a", "b"], padding=True)) == dict(theirs(["a", "b"], padding=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"bos_token": "<|begin|>"},
        {"add_bos_token": True},
        {"added_tokens_decoder": {}},
        {"model_max_length": "long"},
    ],
    ids=str,
)
def test_other_tokenizers_go_to_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    assert quick_tokenizer(BUNDLED_TARGET) is not None
    assert quick_tokenizer(altered(tmp_path / "model", "tokenizer_config.json", **changes)) is None


def test_a_model_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=16)
    quick = LLM(None, {"method": "ar"}, dtype="float64")
    monkeypatch.setattr(loading, "plain_model", lambda path: None)
    whole = LLM(None, {"method": "ar"}, dtype="float64")
    assert isinstance(quick.target.config, PlainConfig)
    assert not isinstance(whole.target.config, PlainConfig)
    ours, theirs = (llm.generate("Once upon a time", greedy)[0].outputs[0] for llm in (quick, whole))
    assert ours.token_ids == theirs.token_ids


def test_bundled_heads_are_plain() -> None:
    for name in ("fspad", "eagle", "ctc"):
        assert isinstance(read_head(BUNDLED / name).config, PlainConfig)


@pytest.mark.parametrize("drafting", [["--method", "ar"], ["--method", "fspad", "--tree", "dyspec", "--budget", "4"]], ids=str)
def test_the_bundled_model_generates_without_transformers(drafting: list[str]) -> None:
    probe = (
        "import sys\nfrom foredraft.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "sys.exit('transformers' in sys.modules or 'scipy' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, "generate", "Once", "--max-tokens", "4", *drafting]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
