"""Names of vLLM, Transformers and the OpenAI API: every row of the table, through `LLM` and the command line."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer

from foredraft import LLM, SamplingParams
from foredraft.__main__ import build, main
from foredraft.core import arguments
from foredraft.core.arguments import OWN, config_with_our_names
from foredraft.core.chat import Template
from foredraft.core.names import METHODS, NAMES
from foredraft.core.treatment import CHAT, DRAFT, LOAD, RUN, SAMPLE, remote_code
from foredraft.engine.options import EngineOptions
from foredraft.plan.config import parse
from foredraft.plan.speculation import Speculation

DATA = Path(__file__).parent / "data"
TARGET, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
PLAIN = {"method": "ar"}
HELLO = [{"role": "user", "content": "Hi"}]
SHORT = SamplingParams(temperature=0, max_tokens=1)

NEUTRAL: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "load_in_8bit": False,
    "load_in_4bit": False,
    "quantization_config": False,
    "kv_cache_dtype": "auto",
    "trust_remote_code": False,
    "hf_overrides": {},
    "rope_scaling": {},
    "rope_theta": {},
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "load_format": "safetensors",
    "use_safetensors": True,
    "hf_token": False,
    "token": False,
    "task": "generate",
    "runner": "auto",
    "convert": "auto",
    "model_impl": "transformers",
    "config_format": "hf",
    "enable_lora": False,
    "enable_prompt_adapter": False,
    "limit_mm_per_prompt": {},
    "allowed_local_media_path": "",
    "mm_processor_kwargs": {},
    "guided_decoding_backend": "auto",
    "structured_outputs_config": {},
    "override_generation_config": {},
    "device_map": "auto",
    "response_format": {"type": "text"},
    "do_sample": True,
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_beam_search": False,
    "early_stopping": False,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "constraints": 0,
    "force_words_ids": 0,
    "best_of": 1,
    "min_length": 0,
    "stopping_criteria": [],
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "typical_p": 1.0,
    "top_h": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "dola_layers": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "enable_expert_parallel": False,
    "logprobs_mode": "raw_logprobs",
    "local_files_only": False,
    "return_full_text": False,
    "functions": [],
    "function_call": [],
    "logits_processors": [],
    "logits_processor": [],
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "extra_args": {},
    "vllm_xargs": {},
    "logprob_token_ids": False,
    "prompt_logprob_token_ids": False,
    "flat_logprobs": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "stream": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "draft_tensor_parallel_size": 1,
    "rejection_sample_method": "standard",
    "acceptance_method": "rejection_sampler",
    "parallel_drafting": False,
    "use_heterogeneous_vocab": False,
}
"""A value of each name that asks for what happens anyway."""

REFUSED: dict[str, Any] = {"trust_remote_code": True, "do_sample": False}
"""Values that are refused, where 77 would not be of the right kind."""

ALIASES = {
    "max_new_tokens": 7,
    "max_completion_tokens": 7,
    "min_new_tokens": 2,
    "num_return_sequences": 3,
    "stop_strings": ["x"],
}
ALIASES |= {"top_logprobs": 2, "torch_dtype": "float64", "pretrained_model_name_or_path": str(TARGET), "use_tqdm": False}


def at(place: str, *, ignored: bool = False) -> list[str]:
    """Names of a place that are refused unless they are neutral, or ignored."""
    rows = {name: row for name, row in NAMES.items() if place in row.places and not row.means}
    return [name for name, row in rows.items() if row.ignored is ignored]


@cache
def chatting() -> LLM:
    return LLM(None, PLAIN)


def raised(call: Any) -> str:
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


def check_refusal(said: str, name: str) -> None:
    """A message that names the argument, what it is elsewhere, and what to use here."""
    row = NAMES[name]
    assert said.startswith(f"{name}=")
    assert f" is not supported: in {row.library} it " in said
    assert said.endswith(row.use)
    assert "unexpected keyword" not in said


def given(name: str) -> Any:
    return REFUSED.get(name, 77)


# --- every row, in Python


def test_the_tests_cover_the_table() -> None:
    assert set(NEUTRAL) == {name for name, row in NAMES.items() if row.fits and not row.means}
    assert set(ALIASES) == {name for name, row in NAMES.items() if row.means}
    assert all(row.places and row.library and row.does and row.use for row in NAMES.values())


@pytest.mark.parametrize("name", at(LOAD))
def test_llm_refuses(name: str) -> None:
    model = "owner/with-code" if name == "trust_remote_code" else TARGET
    check_refusal(raised(lambda: LLM(model, PLAIN, **{name: given(name)})), name)


@pytest.mark.parametrize("name", at(SAMPLE))
def test_sampling_params_refuse(name: str) -> None:
    check_refusal(raised(lambda: SamplingParams(**{name: given(name)})), name)


@pytest.mark.parametrize("name", at(RUN))
def test_generate_and_stream_refuse(name: str) -> None:
    for method in (chatting().generate, chatting().stream):
        check_refusal(raised(lambda method=method: method("x", SHORT, **{name: given(name)})), name)


@pytest.mark.parametrize("name", at(CHAT))
def test_chat_refuses(name: str) -> None:
    for arguments_ in ((HELLO, SHORT), (HELLO,)):
        method = chatting().chat if len(arguments_) == 2 else chatting().chat_prompt
        check_refusal(raised(lambda m=method, a=arguments_: m(*a, **{name: given(name)})), name)


@pytest.mark.parametrize("name", at(DRAFT))
def test_a_speculative_config_refuses(name: str) -> None:
    check_refusal(raised(lambda: parse({"method": "ngram", name: 77})), name)


def test_neutral_values_and_none_are_accepted() -> None:
    def neutral(place: str) -> dict[str, Any]:
        return {name: NEUTRAL.get(name) for name in at(place)}

    config = parse({"method": "ngram", "num_speculative_tokens": 3, **neutral(DRAFT)})
    assert config == parse({"method": "ngram", "num_speculative_tokens": 3})
    llm = LLM(TARGET, PLAIN, **neutral(LOAD))
    assert SamplingParams(**neutral(SAMPLE)) == SamplingParams()
    assert SamplingParams(**dict.fromkeys(at(SAMPLE))) == SamplingParams()
    wanted = llm.generate("Once", SHORT)[0].outputs[0].token_ids
    assert llm.generate("Once", SHORT, **neutral(RUN))[0].outputs[0].token_ids == wanted
    assert [*llm.stream("Once", SHORT, **neutral(RUN))][-1].outputs[0].token_ids == wanted
    assert chatting().chat(HELLO, SHORT, **neutral(CHAT))[0].outputs[0].token_ids


def test_what_only_tunes_speed_is_ignored_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    arguments._say_ignored.cache_clear()
    with caplog.at_level(logging.INFO, logger="foredraft"):
        names = {place: dict.fromkeys(at(place, ignored=True), 77) for place in (LOAD, SAMPLE, RUN, CHAT, DRAFT)}
        assert all(names.values())
        for _ in range(2):
            llm = LLM(TARGET, PLAIN, **names[LOAD])
            assert SamplingParams(**names[SAMPLE]) == SamplingParams()
            llm.generate("Once", SHORT, **names[RUN])
            chatting().chat(HELLO, SHORT, **names[CHAT])
            assert parse({"method": "suffix", **names[DRAFT]}) == parse({"method": "suffix"})
    lines = [one.getMessage() for one in caplog.records if "ignores" in one.getMessage()]
    assert [line.split()[0] for line in lines] == ["LLM", "SamplingParams", "LLM.generate", "LLM.chat", "speculative_config"]
    assert all(name in line for line, some in zip(lines, names.values(), strict=True) for name in some)


def test_none_is_ignored_without_a_line(caplog: pytest.LogCaptureFixture) -> None:
    arguments._say_ignored.cache_clear()
    SamplingParams(pad_token_id=None, use_cache=None)  # type: ignore[call-arg]
    assert not caplog.records


def test_aliases() -> None:
    for name, value in ALIASES.items():
        row = NAMES[name]
        if SAMPLE in row.places:
            assert SamplingParams(**{name: value}) == SamplingParams(**{row.means: value})
            assert "both are given" in raised(lambda n=name, v=value, m=row.means: SamplingParams(**{n: v, m: v}))
    llm = LLM(pretrained_model_name_or_path=str(TARGET), speculative_config=PLAIN, torch_dtype="float64")  # type: ignore
    assert str(llm.target.dtype) == "torch.float64"
    assert "both are given" in raised(lambda: LLM(TARGET, PLAIN, pretrained_model_name_or_path=TARGET))  # type: ignore
    assert llm.generate("Once", SHORT, use_tqdm=True)[0].outputs[0].token_ids  # type: ignore[call-arg]
    assert chatting().chat(HELLO, SHORT, use_tqdm=False)  # type: ignore[call-arg]
    check_refusal(raised(lambda: llm.generate("Once", SHORT, use_tqdm=print)), "use_tqdm")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        (LOAD, "temperature", "LLM does not take temperature. It belongs to SamplingParams. Use generate("),
        (LOAD, "max_new_tokens", "It is max_tokens here, and belongs to SamplingParams"),
        (LOAD, "num_speculative_tokens", "belongs to speculative_config. Use LLM(model, speculative_config={'num_spec"),
        (SAMPLE, "speculative_config", "SamplingParams does not take speculative_config. It belongs to LLM"),
        (SAMPLE, "use_tqdm", "It is progress here, and belongs to generate. Use LLM.generate(progress=...)"),
        (SAMPLE, "tensor_parallel_size", "tensor_parallel_size=1 is not supported: in vLLM it spreads"),
        (
            RUN,
            "max_new_tokens",
            "It is max_tokens here, and belongs to SamplingParams. Use generate(prompts, SamplingParams(max_t",
        ),
        (RUN, "temperature", "LLM.generate does not take temperature. It belongs to SamplingParams"),
        (RUN, "chat_template", "It belongs to chat. Use LLM.chat(messages, chat_template=...)"),
        (CHAT, "top_p", "LLM.chat does not take top_p. It belongs to SamplingParams"),
        (LOAD, "modle", "LLM takes no argument 'modle'. Did you mean 'model'? It takes activations, device, dtype,"),
        (SAMPLE, "temprature", "SamplingParams takes no argument 'temprature'. Did you mean 'temperature'? It takes allowed_"),
        (RUN, "progres", "LLM.generate takes no argument 'progres'. Did you mean 'progress'? It takes"),
        (CHAT, "tool", "LLM.chat takes no argument 'tool'. Did you mean 'tools'? It takes add_generation_prompt,"),
        (CHAT, "xyzzy", "LLM.chat takes no argument 'xyzzy'. It takes"),
    ],
)
def test_names_at_another_place_and_unknown_ones(place: str, name: str, said: str) -> None:
    calls = {
        LOAD: lambda **more: LLM(TARGET, PLAIN, **more),
        SAMPLE: SamplingParams,
        RUN: lambda **more: chatting().generate("x", SHORT, **more),
        CHAT: lambda **more: chatting().chat(HELLO, SHORT, **more),
    }
    assert said in raised(lambda: calls[place](**{name: 1}))


def test_own_names_are_those_of_the_signatures() -> None:
    def names(function: Any) -> set[str]:
        return {*inspect.signature(function).parameters} - {"self", "template"}

    assert names(LLM.__init__) - {"engine"} | {*EngineOptions.__annotations__} == set(OWN[LOAD])
    assert names(LLM.generate) == set(OWN[RUN])
    assert {"messages", *Template.__annotations__} == set(OWN[CHAT])
    assert {*OWN[DRAFT]} <= {*Speculation.__annotations__, "method", "num_speculative_tokens", "rule"}
    for place, own in {**OWN, SAMPLE: SamplingParams.names()}.items():
        assert not {name for name in own if name in NAMES and place in NAMES[name].places}


# --- SamplingParams stays a plain frozen dataclass


def test_sampling_params_are_still_a_dataclass() -> None:
    one = SamplingParams(max_new_tokens=7, seed=3, num_beams=1)  # type: ignore[call-arg]
    assert one == SamplingParams(max_tokens=7, seed=3)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == copy.copy(one) == one
    assert hash(one) == hash(replace(one))
    assert replace(one, max_tokens=8) == SamplingParams(max_tokens=8, seed=3)
    assert [*asdict(one)] == SamplingParams.names() == [*inspect.signature(SamplingParams).parameters]
    assert repr(one).startswith("SamplingParams(n=1, ")
    with pytest.raises(FrozenInstanceError):
        one.seed = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="max_tokens must be"):
        SamplingParams(max_new_tokens=0)  # type: ignore[call-arg]


def test_do_sample_agrees_with_the_temperature_or_is_refused() -> None:
    assert SamplingParams(do_sample=False, temperature=0) == SamplingParams(temperature=0)  # type: ignore[call-arg]
    assert SamplingParams(do_sample=True, temperature=0.5) == SamplingParams(temperature=0.5)  # type: ignore[call-arg]
    for value, temperature in ((True, 0), (False, 0.5)):
        said = raised(lambda v=value, t=temperature: SamplingParams(do_sample=v, temperature=t))  # type: ignore[call-arg]
        assert "Use temperature: 0 is greedy" in said
    assert SamplingParams(n=4, best_of=4).n == 4  # type: ignore[call-arg]
    assert "best_of=5" in raised(lambda: SamplingParams(n=4, best_of=5))  # type: ignore[call-arg]


# --- speculative_config


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"method": "draft_model", "model": str(OTHER)}, {"method": "lm", "model": str(OTHER)}),
        ({"method": "ngram_gpu", "prompt_lookup_max": 5, "prompt_lookup_min": 2},
         {"method": "ngram", "prompt_lookup_max": 5, "prompt_lookup_min": 2}),
        ({"method": "eagle", "model": "x", "draft_tensor_parallel_size": 1}, {"method": "eagle", "model": "x"}),
        ({"method": "suffix", "suffix_decoding_max_tree_depth": 8, "suffix_decoding_max_spec_factor": 2.0,
          "suffix_decoding_min_token_prob": 0.2, "suffix_decoding_max_cached_requests": 9},
         {"method": "suffix", "suffix_decoding_max_tree_depth": 8, "suffix_decoding_max_spec_factor": 2.0,
          "suffix_decoding_min_token_prob": 0.2}),
        ({"method": "medusa", "quantization": None}, {"method": "medusa"}),
    ],
)  # fmt: skip
def test_configs_of_vllm(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    more = {"num_speculative_tokens": 3}
    assert config_with_our_names({**theirs, **more}) == {**ours, **more}
    assert parse({**theirs, **more}) == parse({**ours, **more})


def test_their_methods_are_ours() -> None:
    from foredraft import DRAFTERS

    assert set(METHODS.values()) <= set(DRAFTERS)
    assert not set(METHODS) & set(DRAFTERS)


def test_a_draft_model_of_vllm_generates() -> None:
    config = {"method": "draft_model", "model": str(OTHER), "num_speculative_tokens": 3}
    llm = LLM(TARGET, config, dtype="float64")
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    plain = LLM(TARGET, PLAIN, dtype="float64").generate("Once", sampling)[0].outputs[0].token_ids
    assert llm.generate("Once", sampling)[0].outputs[0].token_ids == plain


# --- names that are ours too


def test_tokenizer_as_a_directory(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(TARGET, bare, ignore=shutil.ignore_patterns("token*", "special*", "vocab*"))
    assert LLM(bare, PLAIN).get_tokenizer() is None
    for tokenizer in (str(TARGET), TARGET, AutoTokenizer.from_pretrained(TARGET)):
        llm = LLM(bare, PLAIN, tokenizer=tokenizer, revision=None)
        assert llm.get_tokenizer() is getattr(llm.tokenizer, "whole", llm.tokenizer)
        assert llm.generate("Once", SHORT)[0].prompt_token_ids == LLM(TARGET, PLAIN).generate("Once", SHORT)[0].prompt_token_ids
    with pytest.raises(ValueError, match=r"holds no tokenizer\. Give a directory"):
        LLM(TARGET, PLAIN, tokenizer=str(bare))
    for wrong in (3, ["x"], {"a": 1}):
        assert "tokenizer must be a Transformers tokenizer" in raised(lambda w=wrong: LLM(TARGET, PLAIN, tokenizer=w))


@pytest.mark.parametrize("name", ["half", "float", "bfloat16"])
def test_names_of_dtypes(name: str) -> None:
    assert LLM(TARGET, PLAIN, dtype=name).target.dtype.is_floating_point


def test_remote_code_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(TARGET, model)
    assert remote_code(model) == []
    assert LLM(model, PLAIN, trust_remote_code=True)  # type: ignore[call-arg]  # there is nothing to run
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "owner/repo--modeling_x.XForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    said = raised(lambda: LLM(model, PLAIN, trust_remote_code=True))  # type: ignore[call-arg]
    assert "it runs configuration_x.py, modeling_x.py of the checkpoint. No code of a checkpoint is run here" in said
    assert remote_code("owner/name") is None
    assert remote_code(None) == remote_code(object()) == []


def test_the_modules_load_no_torch() -> None:
    modules = ", ".join(f"foredraft.core.{name}" for name in ("names", "arguments", "chat", "params"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*given: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in given])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err  # type: ignore[return-value]

    return call


def options_of(command: str) -> set[str]:
    found: Any = typer.main.get_command(build([command]))
    return {option for one in found.commands[command].params for option in one.opts}


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


ABSENT = [name for name in NAMES if option(name) not in options_of("generate")]


def test_names_that_are_options_are_other_things_elsewhere() -> None:
    for name in set(NAMES) - set(ABSENT):
        assert not {LOAD, SAMPLE} & {*NAMES[name].places}, f"{name} is an option, and refused in Python"


@pytest.mark.parametrize("name", ABSENT)
def test_an_option_of_the_table_is_explained(run: Any, name: str) -> None:
    code, out, err = run("generate", "x", option(name), "2")
    row = NAMES[name]
    assert (code, out) == (2, "")
    error, hint = err.splitlines()
    assert error.startswith(f"error: `foredraft generate` has no option {option(name)}: in {row.library} it ")
    assert hint == f"hint: {row.command or row.use}"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--num-speculative-tokens", "Use --budget"),
        ("--draft_temperature", "Use --speculative-config '{\"draft_temperature\": VALUE}'"),
        ("--n", "Leave it out. In Python, use generate(prompts, SamplingParams(n=...))"),
        ("--presence-penalty", "Leave it out. In Python, use generate(prompts, SamplingParams(presence_penalty=...))"),
        ("--max-num-seqs", "Leave it out. In Python, use LLM(model, max_num_seqs=...)"),
        ("--continue-final-message", "Leave it out. In Python, use LLM.chat(messages, continue_final_message=...)"),
    ],
)
def test_arguments_of_python_that_are_no_options(run: Any, given: str, hint: str) -> None:
    code, _, err = run("generate", "x", given, "2")
    assert code == 2
    assert err.splitlines() == [f"error: `foredraft generate` has no option {given}", f"hint: {hint}"]


@pytest.mark.parametrize(("name", "kind"), [("static", "tree"), ("dyspec", "tree"), ("block", "rule")])
def test_a_tree_or_a_rule_is_not_a_method(run: Any, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} is a {kind}, not a method. Use {kind!r}: {name!r}"):
        LLM(TARGET, {"method": name})
    code, _, err = run("generate", "x", "--method", name)
    assert code == 1
    assert f"--{kind} {name}" in err


def test_hints_name_options_that_exist() -> None:
    known = options_of("generate") | {"--local-dir"}  # of `hf download`
    for name in ABSENT:
        hint = NAMES[name].command or NAMES[name].use
        assert set(re.findall(r"--[a-z][a-z-]+", hint)) <= known, name
        python = re.search(r"SamplingParams|LLM|speculative_config=|\w=", hint)
        assert python is None or "In Python" in hint, (name, hint)


@pytest.mark.parametrize("given", [("--tensor_parallel_size", 2), ("--tensor-parallel-size=2",)])
@pytest.mark.parametrize("command", ["generate", "chat", "bench", "audit"])
def test_every_command_and_spelling(run: Any, command: str, given: tuple[Any, ...]) -> None:
    code, _, err = run(command, *given)
    assert code == 2
    assert f"`foredraft {command}` has no option" in err
    assert "spreads a model over devices" in err


def test_their_method_in_every_command(run: Any) -> None:
    """`audit` chooses a tree by the method before it is parsed."""
    from foredraft.cli.choices import speculative_config

    config = speculative_config(str(TARGET), "draft_model", str(OTHER), None, None, None)
    assert config == {"method": "lm", "model": str(OTHER)}
    code, _, err = run("bench", "--methods", "draft_model:nope", "--prompts", "missing.jsonl")
    assert code == 1
    assert "unknown tree 'nope'" in err


def test_other_unknown_options_are_said_as_before(run: Any) -> None:
    code, _, err = run("generate", "x", "--modle", "y")
    assert code == 2
    assert "No such option" in err and "--help` lists all options" in err


@pytest.mark.parametrize("name", [*at(DRAFT), *at(LOAD)[:3], "max_new_tokens"])
def test_keys_of_a_config_on_the_command_line(run: Any, name: str) -> None:
    code, out, err = run("generate", "x", "--method", "ngram", "--speculative-config", json.dumps({name: 77}))
    assert (code, out) == (1, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ") and name in error and hint.startswith("hint: ")


def test_method_and_tokenizer_on_the_command_line(run: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(TARGET, bare, ignore=shutil.ignore_patterns("token*", "special*", "vocab*"))
    given = ["generate", "Once", "--temperature", 0, "--max-tokens", 5, "--json"]
    draft = ["--method", "draft_model", "--draft-model", OTHER, "--tree", "chain", "--budget", 3]
    code, out, err = run(*given, "--model", bare, "--tokenizer", TARGET, *draft)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["config"]["method"] == "lm"
    assert found["config"]["tokenizer"] == str(TARGET)
    assert found["text"] == json.loads(run(*given, "--model", TARGET, *draft)[1])["text"]
    code, _, err = run(*given, "--model", TARGET, "--tokenizer", bare)
    assert code == 1
    assert "holds no tokenizer" in err and "hint: Give a directory" in err
