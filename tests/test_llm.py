"""The face: prompts and models in every form, contexts and vocabularies that differ, and what is said of what does not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from foredraft import LLM, SamplingParams

DATA = Path(__file__).parent / "data"
TARGET, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
STORY = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
TO_THE_END = SamplingParams(temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, seed=1)
PLAIN = {"method": "ar"}


def tree(draft: Any = OTHER, **more: Any) -> dict[str, Any]:
    return {"method": "lm", "model": draft, "tree": "dyspec", "num_speculative_tokens": 8, **more}


METHODS = {
    "plain": PLAIN,
    "chain": tree(tree="chain"),
    "tree": tree(),
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
    "ngram": {"method": "ngram", "num_speculative_tokens": 8},
}


def load(config: dict[str, Any], model: Any = TARGET, **more: Any) -> LLM:
    return LLM(model, config, dtype="float64", **more)


@cache
def plain() -> LLM:
    return load(PLAIN)


def ids_of(llm: LLM, prompt: Any = STORY, sampling: SamplingParams = GREEDY) -> list[int]:
    return llm.generate(prompt, sampling)[0].outputs[0].token_ids


@cache
def expected(prompt: str | tuple[int, ...]) -> list[int]:
    """Plain decoding's tokens."""
    return ids_of(plain(), prompt)


def changed(tmp_path: Path, source: Path, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A copy of a model directory with another configuration and other files."""
    directory = tmp_path / "changed"
    shutil.copytree(source, directory)
    for name, values in {"config": config or {}, **files}.items():
        path = directory / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


# --- Prompts


def test_prompts_in_every_form() -> None:
    llm = plain()
    encoded = llm.tokenizer(STORY)["input_ids"]
    wanted = ids_of(llm)
    forms = [STORY, encoded, tuple(encoded), {"prompt_token_ids": encoded}, {"prompt": STORY}]
    for form in forms:
        assert ids_of(llm, form) == wanted
    results = llm.generate([*forms, {"prompt": "shown", "prompt_token_ids": encoded}], GREEDY)
    assert all(one.outputs[0].token_ids == wanted and one.prompt_token_ids == encoded for one in results)
    assert [one.prompt for one in results] == [STORY, None, None, None, STORY, "shown"]
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ([3, -1], "token id -1 in the prompt is outside the vocabulary"),
        ([3, 105], "token id 105 in the prompt is outside the vocabulary (0 to 104)"),
        ([5] * 256, "the prompt has 256 tokens, but the context of 256 must also fit an output"),
    ],
)
def test_prompts_that_do_not_fit(prompt: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        plain().generate(prompt, GREEDY)
    assert said in str(caught.value)


WRONG_TYPES = """
import sys, numpy
from foredraft import LLM, SamplingParams
llm = LLM(sys.argv[1], {"method": "ar"})
prompts = [None, 5, [[3], None], [[3.0]], [[True]], {"prompt_ids": [3]}, numpy.arange(3), [numpy.arange(3)], [b"x"]]
for arguments in [*((one,) for one in prompts), *(("x", one) for one in ({"temperature": 0}, [None], 5))]:
    try:
        print("accepted", arguments, llm.generate(*arguments))
    except TypeError as error:
        print(error)
"""


def test_wrong_types() -> None:
    """In a process of its own, without the type checks that the tests put before ours."""
    command = [sys.executable, "-c", WRONG_TYPES, str(TARGET)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert len(lines) == 12, done.stderr
    assert all(line.startswith("a prompt is a str, a list of token ids (whole numbers) or {") for line in lines[:9])
    assert all(line.startswith("sampling_params must be a SamplingParams or a list of them, got ") for line in lines[9:])


@pytest.mark.parametrize("method", METHODS)
def test_one_bad_prompt_loses_nothing(method: str) -> None:
    """Nothing runs before all is checked, and what comes next is as if nothing had been."""
    llm = load(METHODS[method], max_num_seqs=1)
    with pytest.raises(ValueError, match="empty"):
        llm.generate([STORY, ""], GREEDY)
    with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
        llm.generate([STORY, STORY], [GREEDY])
    with pytest.raises(ValueError, match="empty"):
        llm.stream("", GREEDY)  # at the call, not at the first step
    assert ids_of(llm) == expected(STORY)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_of_one_token(method: str) -> None:
    """It has no prefill."""
    results = load(METHODS[method]).generate([[34], [34]], [SAMPLED, GREEDY])
    assert [one.outputs[0].finish_reason for one in results] == ["length"] * 2
    assert len(results[0].outputs[0].token_ids) == 20
    assert results[1].outputs[0].token_ids == expected((34,))


# --- Contexts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("length", "room"), [(19, 1), (18, 2), (12, 8)])
def test_max_model_len(method: str, length: int, room: int) -> None:
    llm = load(METHODS[method], max_model_len=20)
    prompt = tuple(range(5, 5 + length))
    found = llm.generate([prompt] * 2, [TO_THE_END, SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)])
    assert [one.outputs[0].token_ids for one in found] == [expected(prompt)[:room]] * 2
    with pytest.raises(ValueError, match="the prompt has 20 tokens, but the context of 20"):
        llm.generate([[5] * 20], GREEDY)


@pytest.mark.parametrize("method", METHODS)
def test_to_the_end_of_the_models_own_context(method: str) -> None:
    prompts = [tuple(5 + i % 90 for i in range(length)) for length in (255, 254, 247)]
    found = [one.outputs[0] for one in load(METHODS[method]).generate(prompts, TO_THE_END)]
    assert [len(one.token_ids) for one in found] == [1, 2, 9]
    assert [one.token_ids for one in found] == [expected(prompt) for prompt in prompts]
    assert {one.finish_reason for one in found} == {"length"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 257}, "max_model_len 257 exceeds the model's context of 256"),
        ({"max_model_len": 0}, "max_model_len must be a whole number, at least 1, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number, at least 1, got 0"),
    ],
)
def test_sizes_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(PLAIN, **options)


@pytest.mark.parametrize("shape", ["chain", "dyspec", "topk"])
def test_a_draft_model_with_a_smaller_context(shape: str, tmp_path: Path) -> None:
    """Where its context is full it drafts no more, and the target goes on alone."""
    draft = changed(tmp_path, OTHER, {"max_position_embeddings": 30})
    prompts = [(34,), STORY, (5,) * 29, (5,) * 30, "There was a girl. " * 3]
    found = load(tree(draft, tree=shape)).generate(prompts, GREEDY)
    assert [one.outputs[0].token_ids for one in found] == [expected(one) for one in prompts]
    assert found[1].metrics.num_draft_tokens > 0
    assert found[3].metrics.num_draft_tokens == found[4].metrics.num_draft_tokens == 0


@pytest.mark.parametrize("method", ["plain", "lm"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model("llama", num_key_value_heads=1, max_position_embeddings=1200, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    prompts = [[1 + (i * i + i // 7) % 36 for i in range(length)] for length in (1, 512, 513, 514, 1025, 1100)]
    unscored = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, seed=3, logprobs=0)
    sampling = [replace(unscored, prompt_logprobs=0) if len(prompt) in (1, 512, 513, 1025) else unscored for prompt in prompts]

    def scores() -> list[Any]:
        results = load(PLAIN if method == "plain" else tree(tmp_path), tmp_path).generate(prompts, sampling)
        listed = [(one.prompt_logprobs or [])[1:] + (one.outputs[0].logprobs or []) for one in results]
        return [[(token, entry.logprob) for each in one for token, entry in (each or {}).items()] for one in listed]

    chunked = scores()
    for name in ("foredraft.cache.pool.PREFILL_CHUNK", "foredraft.drafters.lm.PREFILL_CHUNK"):
        monkeypatch.setattr(name, 4096)
    for some, whole in zip(chunked, scores(), strict=True):
        assert [token for token, _ in some] == [token for token, _ in whole]
        np.testing.assert_allclose([value for _, value in some], [value for _, value in whole], atol=1e-9)


# --- Vocabularies


def padded(tmp_path: Path, source: Path) -> Path:
    directory = changed(tmp_path, source, {"vocab_size": 112})
    weights = load_file(directory / "model.safetensors")
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([rows, rows.new_zeros(7, rows.shape[1])])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("shape", ["chain", "dyspec"])
def test_a_draft_model_with_a_padded_vocabulary(shape: str, tmp_path: Path) -> None:
    llm = load(tree(padded(tmp_path, OTHER), tree=shape))
    [result] = llm.generate(STORY, GREEDY)
    assert result.outputs[0].token_ids == expected(STORY)
    assert result.metrics.acceptance_length > 1.5
    assert max(ids_of(llm, STORY, SamplingParams(temperature=3.0, max_tokens=60, seed=2, ignore_eos=True))) < 105


def test_a_target_with_a_padded_vocabulary(tmp_path: Path) -> None:
    """It may emit an id of the padding, or be given one; the draft model does not know such tokens, and they change nothing."""
    directory = padded(tmp_path, TARGET)
    prompt = [34, 9, 110, 22, 111]
    found = load(tree(tree="topk"), directory).generate([prompt, STORY], GREEDY)
    wanted = load(PLAIN, directory).generate([prompt, STORY], GREEDY)
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in wanted]
    hot = SamplingParams(temperature=9.0, max_tokens=60, seed=4, ignore_eos=True)
    assert max(ids_of(load(tree(), directory), STORY, hot)) >= 105


def test_a_permuted_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizer = json.loads((OTHER / "tokenizer.json").read_text())["model"]
    by_id = {token_id: token for token, token_id in tokenizer["vocab"].items()}
    swapped = tokenizer["vocab"] | {by_id[50]: 60, by_id[60]: 50}
    directory = changed(tmp_path, OTHER, tokenizer={"model": tokenizer | {"vocab": swapped}})
    with pytest.raises(ValueError, match="vocabulary mismatch: 2 token ids stand for other tokens") as caught:
        load(tree(directory))
    assert f"the first is 50: {by_id[60]!r} there, {by_id[50]!r} in the target" in str(caught.value)


# --- Models and tokenizers


def test_a_loaded_model() -> None:
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (TARGET, OTHER)]
    llm = LLM(models[0], tree(models[1]), tokenizer=AutoTokenizer.from_pretrained(TARGET), dtype="float64")
    [result] = llm.generate(STORY, GREEDY)
    [wanted] = plain().generate(STORY, GREEDY)
    assert (result.outputs[0].token_ids, result.outputs[0].text) == (wanted.outputs[0].token_ids, wanted.outputs[0].text)
    assert result.metrics.acceptance_length > 1.5


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    directory = changed(tmp_path, TARGET)
    for file in directory.glob("token*"):
        file.unlink()
    for config in (PLAIN, tree()):
        llm = load(config, directory)
        prompt = plain().tokenizer(STORY)["input_ids"]
        out = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=0))[0].outputs[0]
        assert (out.token_ids, out.text) == (expected(STORY), "")
        assert out.logprobs and out.logprobs[0][out.token_ids[0]].decoded_token is None
        stops = [SamplingParams(stop="x"), SamplingParams(bad_words=["x"])]
        for prompts, sampling in ((STORY, GREEDY), *(([prompt], one) for one in stops)):
            with pytest.raises(ValueError, match="this model has no"):
                llm.generate(prompts, sampling)
        with pytest.raises(ValueError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Hi"}])


BOS_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [BOS_TEMPLATE, BOS_TEMPLATE.removeprefix("{{ bos_token }}")], ids=["bos", "none"])
def test_a_chat_template_decides_alone_about_bos(template: str, tmp_path: Path) -> None:
    """This tokenizer puts BOS before every text; a template that does so itself must not get a second one."""
    directory = changed(tmp_path, TARGET)
    (directory / "chat_template.jinja").write_text(template)
    llm, messages = load(PLAIN, directory), [{"role": "user", "content": STORY}]
    assert llm.generate(STORY, GREEDY)[0].prompt_token_ids.count(1) == 1
    results = [*llm.chat(messages, GREEDY), *llm.chat([messages, messages], GREEDY)]
    assert [one.prompt_token_ids.count(1) for one in results] == [int(template is BOS_TEMPLATE)] * 3
    if template is BOS_TEMPLATE:
        assert results[0].outputs[0].token_ids == ids_of(llm)


def test_default_sampling_is_the_generation_configs(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "do_sample": False, "max_length": 99}
    llm = load(PLAIN, changed(tmp_path, TARGET, generation_config=given))
    wanted = SamplingParams(temperature=0.6, max_tokens=20, top_k=20, top_p=0.9, repetition_penalty=1.1)
    assert replace(llm.get_default_sampling_params(), max_tokens=20) == wanted
    assert plain().get_default_sampling_params() == SamplingParams()
    first = load(PLAIN, tmp_path / "changed").generate(STORY, wanted)[0].outputs[0]
    assert llm.generate(STORY)[0].outputs[0].token_ids[:20] == first.token_ids
    path = tmp_path / "changed" / "generation_config.json"
    path.write_text('{"temperature": -1}')
    with pytest.raises(
        ValueError, match=r"generation_config.json cannot be used: temperature must be .*got -1\. Correct the file"
    ):
        load(PLAIN, tmp_path / "changed")


def test_without_arguments_the_bundled_pair() -> None:
    llm = LLM()
    assert llm.speculation is not None and llm.speculation.drafter == "auto"
    [result] = llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(temperature=0, max_tokens=8))
    assert result.outputs[0].text
    other = LLM(str(TARGET))
    assert other.speculation is not None and other.speculation.drafter == "suffix"


@pytest.mark.parametrize("tree", ["dyspec", "topk"])
def test_trees_branch_at_temperature_0(tree: str) -> None:
    llm = LLM(speculative_config={"tree": tree, "num_speculative_tokens": 16}, dtype="float32", max_num_seqs=2)
    outputs = llm.generate(["The old lighthouse", "def add(a, b):"], SamplingParams(temperature=0, max_tokens=24))
    assert all(one.metrics.branched_rate >= 0.5 for one in outputs)
