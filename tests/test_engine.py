"""Requests through the engine: where outputs end, seeds, `n`, logprobs, streams, and that every slot comes back. In float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foredraft import LLM, CompletionOutput, SamplingParams
from foredraft.cache.blocks import BLOCK, num_blocks
from foredraft.core.draws import Draws, hash_seed
from foredraft.core.tree import TreeBatch

DATA = Path(__file__).parent / "data"
TARGET, OTHER = DATA / "babyllama-105", DATA / "babyllama-105-b"
STORY = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, seed=5)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"method": "ar"},
    "all accepted": {"method": "lm", "model": str(TARGET), "tree": "chain", "num_speculative_tokens": 7},
    "tree": {"method": "lm", "model": str(OTHER), "tree": "dyspec", "num_speculative_tokens": 8},
    "suffix": {"method": "suffix", "num_speculative_tokens": 8},
}
methods = pytest.mark.parametrize("method", CONFIGS)


@cache
def model(method: str, slots: int = 8, **more: Any) -> LLM:
    return LLM(str(TARGET), CONFIGS[method], dtype="float64", max_num_seqs=slots, **more)


def one(method: str, sampling: SamplingParams, prompt: Any = STORY, **more: Any) -> CompletionOutput:
    return model(method, **more).generate(prompt, sampling)[0].outputs[0]


@cache
def whole() -> CompletionOutput:
    return one("plain", GREEDY)


def text_after(num_tokens: int) -> str:
    """The text of the first output tokens, from the tokenizer itself."""
    tokenizer = model("plain").tokenizer
    prompt = tokenizer(STORY)["input_ids"]
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode([*prompt, *whole().token_ids[:num_tokens]], skip_special_tokens=True)[len(before) :]


# --- Where an output ends


def many(method: str, sampling: list[SamplingParams], **more: Any) -> list[CompletionOutput]:
    return [result.outputs[0] for result in model(method, **more).generate([STORY] * len(sampling), sampling)]


@methods
@pytest.mark.parametrize(("size", "include"), [(1, False), (2, True), (7, False)])
def test_stop_strings_cut_exactly(method: str, size: int, include: bool) -> None:
    """One character is about one token, so that the stops lie across token borders and at every place of a path."""
    text = text_after(50)
    stops = [text[at : at + size] for at in range(1, 30, 5)]
    outputs = many(method, [replace(GREEDY, stop=["not there", one], include_stop_str_in_output=include) for one in stops])
    for stop, found in zip(stops, outputs, strict=True):
        num_tokens = next(n for n in range(51) if stop in text_after(n))
        assert found.token_ids == whole().token_ids[:num_tokens]
        assert found.text == text[: text.index(stop) + len(stop) * include]
        assert (found.finish_reason, found.stop_reason) == ("stop", stop)
        assert len(found.kinds) == num_tokens
    assert method != "all accepted" or "accepted" in {one.kinds[-1] for one in outputs}  # cut within a path, not at its end


@methods
def test_the_earliest_of_several_stop_strings(method: str) -> None:
    text = text_after(50)
    later, first, longer = text[30:36], text[12:15], text[12:17]
    assert text.index(longer) == text.index(first) < text.index(later)
    given = [[later, longer, first], [later, "never"], ["never", "ever"]]
    outputs = many(method, [replace(GREEDY, stop=stop) for stop in given])
    assert [one.stop_reason for one in outputs] == [first, later, None]
    assert [one.text for one in outputs] == [text[: text.index(first)], text[: text.index(later)], text]


@methods
@pytest.mark.parametrize("include", [False, True])
def test_stop_tokens(method: str, include: bool) -> None:
    tokens = [whole().token_ids[at] for at in (0, 3, 10, 11, 12)]
    given = [replace(GREEDY, stop_token_ids=[104, token], include_stop_str_in_output=include) for token in tokens]
    for token, found in zip(tokens, many(method, given), strict=True):
        first = whole().token_ids.index(token)
        assert found.token_ids == whole().token_ids[: first + 1]
        assert (found.finish_reason, found.stop_reason) == ("stop", token)
        assert found.text == text_after(first + include)


@pytest.fixture(scope="module")
def ends_early(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The target with a second end of sequence in generation_config.json, which its greedy text soon holds; and that id."""
    directory = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(TARGET, directory)
    end = whole().token_ids[9]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end], "temperature": 0.0}))
    yield str(directory), end


@methods
def test_every_end_of_sequence_of_the_generation_config(method: str, ends_early: tuple[str, int]) -> None:
    directory, end = ends_early
    llm = LLM(directory, CONFIGS[method], dtype="float64")
    greedy, early = whole().token_ids, whole().token_ids[2]
    first = greedy.index(end)
    [found] = llm.generate(STORY)[0].outputs  # greedy by default, to the end of the context
    assert found.token_ids == greedy[: first + 1]
    assert (found.finish_reason, found.stop_reason, found.text) == ("stop", None, text_after(first))
    late = SamplingParams(temperature=0, min_tokens=15, max_tokens=100)
    given = [replace(GREEDY, max_tokens=20), late, replace(late, stop_token_ids=[early])]
    ignored, put_off, both = (result.outputs[0].token_ids for result in llm.generate([STORY] * 3, given))
    assert ignored == greedy[:20]
    assert put_off[:first] == greedy[:first]
    assert not {end, 2} & set(put_off[:15])
    assert put_off[-1] in (end, 2)
    assert not {end, 2, early} & set(both[:15])
    assert both[-1] in (end, 2, early)
    if method != "plain":
        plain = LLM(directory, {"method": "ar"}, dtype="float64").generate([STORY] * 2, given[1:])
        assert [put_off, both] == [result.outputs[0].token_ids for result in plain]


@pytest.mark.parametrize("method", ["all accepted", "tree"])
def test_min_tokens_puts_stop_strings_off(method: str) -> None:
    stop, text = " ", text_after(50)
    found = one(method, replace(GREEDY, stop=stop, min_tokens=25))
    assert found.finish_reason == "stop"
    assert found.text == text[: text.index(stop, len(text_after(25)))]


# --- Several outputs, seeds, batches


@pytest.mark.parametrize(("method", "slots"), [("plain", 8), ("tree", 2), ("suffix", 1)])
def test_n_outputs_are_requests_with_derived_seeds(method: str, slots: int) -> None:
    llm = model(method, slots)
    found = [out.token_ids for out in llm.generate(STORY, replace(SAMPLED, n=3))[0].outputs]
    assert len({tuple(ids) for ids in found}) > 1
    assert found[0] == one(method, SAMPLED).token_ids
    prompt = llm.tokenizer(STORY)["input_ids"]
    for i, ids in enumerate(found):
        request = llm.engine.add_request(None, prompt, SAMPLED)
        request.sequences[0].draws = Draws(hash_seed(5, i))
        while not request.is_finished:
            llm.engine.step()
        assert request.output().outputs[0].token_ids == ids


@methods
@pytest.mark.parametrize("slots", [8, 2, 1])
def test_n_outputs_share_one_prefill(method: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over several waves."""
    llm = model(method, slots)
    forward, sizes = llm.target.forward, list[int]()

    def counted(batch: TreeBatch, *arguments: Any, **options: Any) -> Any:
        sizes.extend(np.diff(batch.offsets).tolist())
        return forward(batch, *arguments, **options)

    monkeypatch.setattr(llm.target, "forward", counted)
    prompt = list(range(3, 60))
    llm.generate([prompt, prompt], replace(SAMPLED, n=3, max_tokens=2))
    assert sum(size >= 56 for size in sizes) == 1  # plain decoding runs the root with it


@pytest.mark.parametrize("rows", [39, 40, 60])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_a_plain_request_has_its_first_token_with_the_end_of_its_prompt(sampling: SamplingParams, rows: int) -> None:
    """If a row is left for it: a prompt of 40 tokens takes 40 rows. Its tokens are the same."""
    llm, prompt = LLM(str(TARGET), CONFIGS["plain"], dtype="float64", max_num_batched_tokens=rows), list(range(3, 43))
    expected = one("plain", sampling, {"prompt_token_ids": prompt}).token_ids
    request = llm.engine.add_request(None, {"prompt_token_ids": prompt}, sampling)
    for steps in range(1, 3):
        llm.engine.step()
        assert len(request.sequences[0].output_ids) == steps - (rows == 39)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert request.sequences[0].output_ids == expected


@pytest.mark.parametrize("slots", [3, 1])
def test_a_drafter_gets_the_features_of_every_committed_token(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned rows: of the prompt except its last token at the start, then of the node before every new token."""
    llm = LLM(str(TARGET), CONFIGS["tree"], dtype="float64", max_num_seqs=slots)
    drafter, layers = llm.engine.drafter, (1, -1)
    seen: list[tuple[int, list[torch.Tensor]]] = []
    start, observe = drafter.start, drafter.observe

    def started(tokens: list[int], features: torch.Tensor | None, cache: Any, first: int) -> Any:
        state = start(tokens, None, cache, first)
        assert (features is None) == (len(tokens) == 1)
        seen.append((first, [] if features is None else [features]))
        state.seen = seen[-1][1]
        return state

    def observed(state: Any, tokens: list[int], features: torch.Tensor, path: list[int]) -> None:
        assert len(features) == len(tokens) == len(path) + 1
        state.seen.append(features)
        observe(state, tokens, None, path)

    monkeypatch.setattr(drafter, "feature_layers", layers)
    monkeypatch.setattr(drafter, "start", started)
    monkeypatch.setattr(drafter, "observe", observed)
    prompts = [2 * llm.tokenizer(STORY)["input_ids"], [7]]
    found = llm.generate(prompts, replace(SAMPLED, n=2))
    assert len(seen) == 4
    assert [first for first, _ in sorted(seen, key=lambda one: one[0])] == [0, 0, 0, BLOCK]  # one prompt of 44 tokens, twice
    for result in found:
        for output in result.outputs:
            ids = [*result.prompt_token_ids, *output.token_ids]
            pool = llm.target.new_pool(num_blocks(len(ids)))
            alone = llm.target.forward(TreeBatch.chains([ids[:-1]]), [pool.allocate()], feature_layers=layers).features
            got = [(first, torch.cat(parts)[: len(ids) - 1 - first]) for first, parts in seen]
            pairs = [(one, alone[i:]) for i, one in got if len(alone) - i - len(one) in (0, 1)]  # the last step may not count
            assert any(torch.allclose(one, rows[: len(one)], rtol=0, atol=1e-9) for one, rows in pairs)


@pytest.mark.parametrize("method", ["all accepted", "tree"])
def test_seeds(method: str) -> None:
    """A seed decides an output alone: not the requests before it, nor those beside it, nor its place."""
    crowd = [replace(SAMPLED, seed=seed, max_tokens=7 * seed) for seed in (1, 2, 3)]
    beside = [[7], "Tom and", "A"]
    first = one(method, SAMPLED)
    assert one(method, SAMPLED).token_ids == first.token_ids
    assert one(method, replace(SAMPLED, seed=6)).token_ids != first.token_ids
    for place in (0, 3):
        prompts: list[Any] = [*beside[:place], STORY, *beside[place:]]
        found = model(method).generate(prompts, [*crowd[:place], SAMPLED, *crowd[place:]])
        assert found[place].outputs[0].token_ids == first.token_ids


def test_without_a_seed_the_models_counts() -> None:
    free = replace(SAMPLED, seed=None)
    runs = [LLM(str(TARGET), {"method": "ar"}, seed=seed).generate([STORY] * 2, free) for seed in (0, 0, 1)]
    found = [[result.outputs[0].token_ids for result in run] for run in runs]
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0] + found[2]}) > 2


MIXED = [
    replace(GREEDY, max_tokens=24),
    SAMPLED,
    replace(SAMPLED, temperature=0.7, top_p=0.8, logprobs=2),
    replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.5, max_tokens=16),
    replace(SAMPLED, stop="e", min_tokens=6),
    replace(SAMPLED, n=2, logit_bias={5: 3.0}, max_tokens=1),
    replace(SAMPLED, bad_words=["the"], prompt_logprobs=0),
    replace(SAMPLED, allowed_token_ids=list(range(3, 40)), presence_penalty=1.0),
]


@pytest.mark.parametrize(("method", "slots"), [("plain", 3), ("tree", 8), ("suffix", 3)])
def test_requests_of_all_kinds_in_one_batch_are_what_each_is_alone(method: str, slots: int) -> None:
    prompts = [(STORY + ", there was a small red fox. ") * 3] * 8
    prompts = [prompt[: 1 + 5 * i] for i, prompt in enumerate(prompts)]
    together = model(method, slots).generate(prompts, MIXED)
    for prompt, sampling, result in zip(prompts, MIXED, together, strict=True):
        [alone] = model(method, 1).generate(prompt, sampling)
        assert result.finished
        for out, expected in zip(result.outputs, alone.outputs, strict=True):
            assert (out.token_ids, out.text, out.kinds) == (expected.token_ids, expected.text, expected.kinds)
            assert (out.finish_reason, out.stop_reason) == (expected.finish_reason, expected.stop_reason)


# --- Logprobs


def own_logprobs(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Row i: the model's log-probabilities after the first i + 1 tokens, each from a forward of its own."""
    rows = []
    for end in range(1, len(ids) + 1):
        cache_ = llm.target.new_pool(16).allocate()
        rows.append(llm.target.forward(TreeBatch.chains([ids[:end]]), [cache_], np.asarray([end - 1])).logits[0])
    return torch.stack(rows).log_softmax(-1)


@methods
def test_logprobs_are_those_of_a_plain_forward(method: str) -> None:
    """Whatever the sampling does to the law; the three requests differ only in how many they ask for."""
    sampling = replace(SAMPLED, temperature=0.7, top_k=5, presence_penalty=1.0, max_tokens=12)
    llm, counts = model(method), [0, 3, -1]
    results = llm.generate(["Once upon"] * 3, [replace(sampling, logprobs=count, prompt_logprobs=count) for count in counts])
    prompt, tokens = results[0].prompt_token_ids, results[0].outputs[0].token_ids
    sorted_rows = [(row, row.sort(descending=True).indices) for row in own_logprobs(llm, prompt + tokens)]
    for count, result in zip(counts, results, strict=True):
        [out], before = result.outputs, result.prompt_logprobs
        assert out.logprobs is not None and before is not None and before[0] is None
        assert (out.token_ids, len(out.logprobs), len(before)) == (tokens, 12, len(prompt))
        for token, (row, best), given in zip((prompt + tokens)[1:], sorted_rows, before[1:] + out.logprobs, strict=False):
            assert given is not None
            assert set(given) == {token, *best[: count if count >= 0 else None].tolist()}
            for other, entry in given.items():
                assert entry.logprob == pytest.approx(float(row[other]), abs=1e-9)
                assert best[entry.rank - 1] == other
        assert {entry.decoded_token for entry in out.logprobs[0].values()} >= {llm.tokenizer.decode(tokens[:1])}
        total = sum(entry[token].logprob for entry, token in zip(out.logprobs, tokens, strict=True))
        assert out.cumulative_logprob == pytest.approx(total)
    assert one(method, sampling).logprobs is one(method, sampling).cumulative_logprob is None


# --- Streams, and what is left behind


@pytest.mark.parametrize("method", ["all accepted", "tree"])
@pytest.mark.parametrize("sampling", [GREEDY, replace(SAMPLED, n=2, stop=["th", "e "], logprobs=1)], ids=["greedy", "sampled"])
def test_a_stream_grows_into_what_generate_gives(method: str, sampling: SamplingParams) -> None:
    llm = model(method)
    [expected] = llm.generate(STORY, sampling)
    before = [("", list[int]())] * sampling.n
    for output in llm.stream(STORY, sampling):
        for out, (text, ids) in zip(output.outputs, before, strict=True):
            assert out.text.startswith(text)
            assert out.token_ids[: len(ids)] == ids
        before = [(out.text, out.token_ids) for out in output.outputs]
    assert output.finished
    for out, wanted in zip(output.outputs, expected.outputs, strict=True):
        assert (out.text, out.token_ids, out.kinds) == (wanted.text, wanted.token_ids, wanted.kinds)
        assert (out.logprobs, out.finish_reason) == (wanted.logprobs, wanted.finish_reason)
        assert out.metrics.num_steps == wanted.metrics.num_steps


@pytest.mark.parametrize("method", ["plain", "tree"])
@pytest.mark.parametrize(("failure", "call"), [(RuntimeError, 1), (KeyboardInterrupt, 2), (KeyboardInterrupt, 5)])
def test_slots_come_back_after_a_failure(method: str, failure: type, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one slot, the next request could not run, or would run on what the failed one left."""
    llm, calls = model(method, 1), 0
    forward = llm.target.forward

    def fails(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise failure("in the middle")
        return forward(*arguments, **options)

    monkeypatch.setattr(llm.target, "forward", fails)
    if issubclass(failure, Exception):  # ends the request of the step
        failed, answered = (output.outputs[0] for output in llm.generate([STORY, "Tom"], GREEDY))
        assert failed.finish_reason == "error" and "in the middle" in str(failed.error)
        assert answered.token_ids and answered.error is None
    else:
        with pytest.raises(failure, match="in the middle"):
            llm.generate([STORY, "Tom"], GREEDY)
    assert llm.generate(STORY, GREEDY)[0].outputs[0].token_ids == whole().token_ids


@pytest.mark.parametrize("method", ["plain", "tree"])
def test_slots_come_back_after_a_stream_is_left(method: str) -> None:
    llm = model(method, 1)
    llm.stream(STORY, GREEDY)  # never begun
    for steps in (1, 3):
        for step, _ in enumerate(llm.stream(STORY, GREEDY), start=1):
            if step == steps:
                break
        stream = llm.stream(STORY, GREEDY)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert llm.generate(STORY, GREEDY)[0].outputs[0].token_ids == whole().token_ids
