"""generation_config.json: every field of the format is honoured, refused by name or without effect."""

from __future__ import annotations

import json
import math

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.cli.answers import MAX_TOKENS
from foredraft.models.generation import BIASES, LENGTHS, REFUSED, TAKEN_OVER, WITHOUT_EFFECT, default_params
from foredraft.models.loading import ModelError, load_generation_config
from test_loading import SIZES, make_model

WORDS = [f"w{i}" for i in range(SIZES["vocab_size"])]
PROMPT = "w5 w9 w3 w30"


@pytest.fixture
def folder(tmp_path):
    """A small model whose answers never end by themselves, with a tokenizer of one word a token."""
    make_model(eos_token_id=None, max_position_embeddings=400).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs `foredraft generate` in this process: (exit code, its JSON, standard error)."""

    def call(folder, *arguments):
        with pytest.raises(SystemExit) as ended:
            main(["generate", PROMPT, "--model", str(folder), "--method", "ar", "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        found = json.loads(out, parse_constant=pytest.fail) if out else None  # no -Infinity, which is no JSON
        return ended.value.code, found, err

    return call


def say(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))


def load(folder, **options):
    return LLM(folder, {"method": "ar"}, device="cpu", **options)


def output(folder, sampling=None, **options):
    return load(folder, **options).generate(PROMPT, sampling)[0].outputs[0]


# --- The length of an output


def test_a_limit_of_the_file_applies_where_the_caller_says_none(folder, run):
    say(folder, max_new_tokens=7, temperature=0.0)
    assert len(output(folder).token_ids) == 7
    assert len(run(folder)[1]["token_ids"]) == 7
    assert len(run(folder, "--max-tokens", 5)[1]["token_ids"]) == 5
    assert len(run(folder, "--max-tokens", 9)[1]["token_ids"]) == 9
    assert len(output(folder, SamplingParams(max_tokens=11)).token_ids) == 11


def test_sampling_parameters_stand_as_given(folder):
    say(folder, max_new_tokens=7, temperature=0.0, stop_strings=["w1"], suppress_tokens=[3])
    llm = load(folder, max_model_len=40)
    given = SamplingParams(ignore_eos=True)
    assert len(llm.generate(PROMPT, given)[0].outputs[0].token_ids) == 36
    assert given == SamplingParams(ignore_eos=True)


def test_without_a_file_the_command_line_has_its_own_limit(folder, run):
    assert len(run(folder)[1]["token_ids"]) == MAX_TOKENS == 256
    say(folder, temperature=0.5)
    assert len(run(folder)[1]["token_ids"]) == 256
    assert len(output(folder, max_model_len=300).token_ids) == 296


def test_max_length_counts_the_prompt(folder, run):
    say(folder, max_length=10)
    assert len(output(folder).token_ids) == 6
    assert len(run(folder)[1]["token_ids"]) == 6
    assert len(run(folder, "--max-tokens", 8)[1]["token_ids"]) == 8
    llm = load(folder)
    assert [len(one.outputs[0].token_ids) for one in llm.generate([PROMPT, "w5"])] == [6, 9]
    assert llm.get_default_sampling_params().max_tokens is None
    say(folder, max_length=10, max_new_tokens=12)  # as in Transformers, the number of new tokens wins
    assert len(output(folder).token_ids) == 12
    say(folder, max_length=300)  # the command line's own limit is the smaller one
    assert len(run(folder)[1]["token_ids"]) == 256


def test_a_prompt_as_long_as_max_length(folder, run):
    say(folder, max_length=4)
    with pytest.raises(
        ValueError, match=r"the prompt has 4 tokens, and .*max_length 4 for prompt and output\. Give max_tokens"
    ):
        output(folder)
    code, _, err = run(folder)
    assert code == 1
    assert "error: the prompt has 4 tokens" in err
    assert "hint: give max_tokens (--max-tokens)" in err
    assert run(folder, "--max-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        ({"min_new_tokens": 5}, {}, (None, 5)),
        ({"min_length": 9}, {}, (None, 5)),
        ({"min_length": 3}, {}, (None, 0)),
        ({"min_length": 9, "min_new_tokens": 2}, {}, (None, 2)),
        ({"min_new_tokens": 5, "max_new_tokens": 8}, {}, (8, 5)),
        ({"min_new_tokens": 5, "max_new_tokens": 8}, {"max_tokens": 3}, (3, 3)),
        ({"min_new_tokens": 5, "max_length": 7}, {}, (3, 3)),
        ({"min_new_tokens": 5}, {"min_tokens": 1}, (None, 1)),
    ],
)
def test_shortest_outputs(fields, given, expected, folder):
    say(folder, **fields)
    params = load(folder).default_params_for(PROMPT, given)
    assert (params.max_tokens, params.min_tokens) == expected


def test_a_shortest_output_is_kept(folder):
    say(folder, temperature=0.0)
    first = output(folder).token_ids[0]
    say(folder, temperature=0.0, eos_token_id=first)
    assert len(output(folder).token_ids) == 1
    say(folder, temperature=0.0, eos_token_id=first, min_new_tokens=6, max_new_tokens=20)
    assert len(output(folder).token_ids) >= 6


# --- What else is honoured


def test_fields_that_are_taken_over(folder):
    fields = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    say(folder, **fields, max_new_tokens=9, min_new_tokens=2, stop_strings=["a", "b"], num_return_sequences=2)
    expected = SamplingParams(**fields, max_tokens=9, min_tokens=2, stop=["a", "b"], n=2)
    assert load(folder).get_default_sampling_params() == expected
    assert len(load(folder).generate(PROMPT)[0].outputs) == 2


def test_explicit_options_come_first(folder, run):
    say(folder, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, stop_strings="w7", num_return_sequences=3)
    given = ["--temperature", 0.2, "--top-k", 5, "--top-p", 0.5, "--min-p", 0.1, "--stop", "w8", "--max-tokens", 2]
    sampling = run(folder, *given)[1]["config"]["sampling"]
    found = {name: sampling[name] for name in ("temperature", "top_k", "top_p", "min_p", "stop", "n")}
    assert found == {"temperature": 0.2, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "stop": ["w8"], "n": 1}
    sampling = run(folder, "--max-tokens", 2)[1]["config"]["sampling"]
    assert (sampling["temperature"], sampling["stop"], sampling["n"]) == (0.6, "w7", 1)


def test_stop_strings_end_an_output(folder):
    say(folder, temperature=0.0)
    text = output(folder).text
    third = text.split()[2]
    say(folder, temperature=0.0, stop_strings=third)
    stopped = output(folder)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", third)
    assert text.startswith(stopped.text)


def test_ends_of_sequence(folder):
    say(folder, eos_token_id=[4, 6])
    assert load(folder).eos_ids == [4, 6]
    say(folder, eos_token_id=7)
    assert load(folder).eos_ids == [7]
    for wrong in ("x", [4, "x"], 1.5, {"a": 1}, [[4]]):
        say(folder, eos_token_id=wrong)
        with pytest.raises(ModelError, match="eos_token_id must be a token id or a list of token ids"):
            load(folder)


@pytest.mark.parametrize("name", BIASES)
def test_banned_tokens(name, folder):
    say(folder, temperature=0.0, max_new_tokens=30)
    banned = sorted(set(output(folder).token_ids))
    ids = {"suppress_tokens": banned, "bad_words_ids": [[i] for i in banned], "sequence_bias": [[[i], -1e4] for i in banned]}
    say(folder, temperature=0.0, max_new_tokens=30, **{name: ids[name]})
    assert not set(output(folder).token_ids) & set(banned)


def test_bans_are_valid_json(folder, run):
    say(folder, suppress_tokens=[3])
    sampling = run(folder, "--max-tokens", 2)[1]["config"]["sampling"]
    assert sampling["logit_bias"] == {"3": "-inf"}


def test_biases_of_single_tokens():
    fields = {"suppress_tokens": [3, 99], "bad_words_ids": [[4], [2]], "sequence_bias": [[[5], 1.5], [[3], 2.0]]}
    model = make_model()
    model.generation_config = GenerationConfig(**fields, eos_token_id=2)
    found = load_generation_config(model, vocab_size=37)
    assert found["logit_bias"] == {3: -math.inf, 4: -math.inf, 5: 1.5}  # 99 is no token, 2 ends the output
    model.generation_config = GenerationConfig(sequence_bias={(5,): 1.5})
    assert load_generation_config(model)["logit_bias"] == {5: 1.5}


def test_a_loaded_model_brings_its_own(folder):
    say(folder, max_new_tokens=7, top_k=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert load(model).get_default_sampling_params() == SamplingParams(max_tokens=7, top_k=3)
    assert load(model, generation_config="none").get_default_sampling_params() == SamplingParams()
    model.generation_config.num_beams = 4
    with pytest.raises(ModelError, match="num_beams is 4, which is not supported"):
        load(model)


# --- Refused


UNSUPPORTED = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "top_h": 0.5,
    "encoder_repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "guidance_scale": 1.5,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "begin_suppress_tokens": [3],
    "exponential_decay_length_penalty": [10, 1.1],
    "watermarking_config": {"greenlist_ratio": 0.25},
    "token_healing": True,
    "constraints": [{}],
    "force_words_ids": [[3]],
    "max_time": 2.0,
}
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "begin_suppress_tokens": [],
    "token_healing": False,
    "constraints": [],
}


def test_every_refused_field_is_tested():
    assert set(UNSUPPORTED) == set(REFUSED)
    assert set(NEUTRAL) <= set(REFUSED)


@pytest.mark.parametrize("name", ["num_beams", "num_beam_groups"])
def test_a_truth_is_no_number(name, folder):
    say(folder, **{name: True})
    with pytest.raises(ModelError, match=f"{name} is True"):
        load_generation_config(folder)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_are_refused_by_name(name, folder):
    say(folder, **{name: UNSUPPORTED[name]})
    with pytest.raises(ModelError, match=f"generation_config.json cannot be used: {name} is") as error:
        load_generation_config(folder)
    assert "\n" not in str(error.value)
    say(folder, **{name: "nonsense"})
    with pytest.raises(ModelError, match=f"{name} is 'nonsense'"):
        load_generation_config(folder)
    say(folder, **{name: None})
    load_generation_config(folder)


def test_neutral_values_pass(folder):
    say(folder, **NEUTRAL, max_new_tokens=3, suppress_tokens=[], bad_words_ids=None, sequence_bias=[], max_length=None)
    assert load(folder).get_default_sampling_params() == SamplingParams(max_tokens=3)


def test_refused_on_the_command_line(folder, run):
    say(folder, no_repeat_ngram_size=2)
    code, _, err = run(folder)
    assert code == 1
    assert "error: the model's generation_config.json cannot be used: no_repeat_ngram_size is 2, which is not supported" in err
    assert "hint: correct the file, or ignore the file with generation_config='none' (--generation-config none)" in err
    assert run(folder, "--generation-config", "none", "--max-tokens", 3)[0] == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bad_words_ids": [[3, 4]]}, r"it bans or biases the token sequence \[3, 4\], but only single tokens"),
        ({"sequence_bias": [[[3, 4], 1.0]]}, r"the token sequence \[3, 4\]"),
        ({"sequence_bias": [[3]]}, "sequence_bias must be a list of pairs"),
        ({"sequence_bias": "x"}, "sequence_bias must be a list"),
        ({"bad_words_ids": 3}, "bad_words_ids must be a list"),
        ({"suppress_tokens": ["x"]}, "suppress_tokens must be a token id or a list of token ids"),
        ({"max_length": "x"}, "max_length must be a whole number"),
        ({"max_length": 0}, "max_length must be a whole number, at least 1, got 0"),
        ({"min_length": -1}, "min_length must be a whole number"),
        ({"max_new_tokens": "7"}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
        ({"min_new_tokens": 5, "max_new_tokens": 3}, r"min_new_tokens \(5\) must not exceed max_new_tokens \(3\)"),
        ({"temperature": "hot"}, "temperature must be 0 .greedy. or above, got 'hot'"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"stop_strings": [3]}, "stop_strings must be a string or a list of strings"),
    ],
)
@pytest.mark.unchecked
def test_malformed_values(fields, said, folder):
    say(folder, **fields)
    with pytest.raises(ModelError, match=said) as error:
        load(folder)
    assert "\n" not in str(error.value)


# --- Without effect


def test_every_field_of_the_format_is_known():
    """Transformers may add a field: then it must be decided what it means here."""
    known = {*TAKEN_OVER, *BIASES, *LENGTHS, *REFUSED, *WITHOUT_EFFECT, "eos_token_id"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - known == set()


def test_fields_without_effect(folder):
    odd = dict.fromkeys(WITHOUT_EFFECT, True)
    say(folder, **odd | {"do_sample": False, "chat_format": "chatml", "_from_model_config": True}, max_new_tokens=3)
    assert load(folder).get_default_sampling_params() == SamplingParams(max_tokens=3)


# --- Ignoring the file, or reading another one


@pytest.mark.parametrize("choice", ["none", "vllm"])
def test_the_file_can_be_ignored(choice, folder, run):
    say(folder, max_new_tokens=3, temperature=0.0, eos_token_id=5, num_beams=4)
    llm = load(folder, generation_config=choice)
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.eos_ids == []
    assert len(run(folder, "--generation-config", choice)[1]["token_ids"]) == MAX_TOKENS
    (folder / "generation_config.json").write_text("nonsense")
    load(folder, generation_config=choice)


def test_another_directory(folder, run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    say(folder, max_new_tokens=3)
    say(other, max_new_tokens=5)
    assert len(output(folder, generation_config=other).token_ids) == 5
    assert len(run(folder, "--generation-config", other)[1]["token_ids"]) == 5


@pytest.mark.parametrize("choice", ["nope", 3, "", "no/such/directory"])
@pytest.mark.unchecked
def test_unknown_choices(choice, folder, run):
    with pytest.raises(ModelError, match="generation_config must be 'auto', 'none' or a directory that holds"):
        load(folder, generation_config=choice)
    code, _, err = run(folder, "--generation-config", choice)
    assert code == 1
    assert "generation_config must be 'auto', 'none' or a directory" in err


def test_chat_takes_the_same_defaults(folder, monkeypatch, capsys):
    say(folder, max_new_tokens=4, temperature=0.0)
    for more, count in (([], 4), (["--generation-config", "none", "--max-tokens", "6"], 6)):
        monkeypatch.setattr("foredraft.cli.show.lines", lambda: iter(["w5 w9"]))
        with pytest.raises(SystemExit):
            main(["chat", "--model", str(folder), "--method", "ar", *more])
        assert f"{count} tokens" in capsys.readouterr().err


def test_defaults_of_nothing():
    assert default_params({}) == SamplingParams()
    assert default_params({}, 5, {"top_k": 3}, max_tokens=9) == SamplingParams(top_k=3, max_tokens=9)
