"""Training: what is read, what is written, what goes wrong, and that a run that is cut off ends as one that was not."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.core import typed
from foredraft.heads import HEADS
from foredraft.heads.eagle import Eagle3Head, FeatureHead
from foredraft.heads.folder import read_head
from foredraft.heads.layers import Attend, FittedLinear, Shape
from foredraft.kernels.attention import rotate
from foredraft.models.checkpoint import ModelError, fingerprint
from foredraft.models.loading import fingerprint_of
from foredraft.train import checkpoint, course, loop, shards
from foredraft.train.attention import Tables, tables, unrolled, with_slots
from foredraft.train.batches import Batch
from foredraft.train.corpus import read_conversations, read_corpus
from foredraft.train.course import Settings
from foredraft.train.lesson import Lesson
from foredraft.train.loop import rate
from foredraft.train.recipes import RECIPES
from foredraft.train.records import Conversation
from foredraft.train.run import TrainChoice, run
from foredraft.train.shards import TrainingError
from foredraft.train.start import directions, fitted

pytestmark = pytest.mark.unchecked

DATA = Path(__file__).parent / "data"
STORIES, OTHER_STORIES = DATA / "babyllama-105", DATA / "babyllama-105-b"
SHAPE = Shape(32, 48, 4, 2, 8, 1e-6, 50)
CONFIG = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and shards that all tests share."""
    folder = tmp_path_factory.mktemp("train")
    prompts = [
        f"{name} went to {place}" for name in ("Tom", "Lily", "Sue", "Ben", "Mia") for place in ("the park", "school", "bed")
    ]
    prompts += [f"One day, {one}" for one in prompts] + [f"Once upon a time, {one}" for one in prompts]
    (folder / "stories.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    run(choice(folder, "eagle", "first", steps=1))
    return folder


def choice(folder: Path, method: str, out: str, *, options: dict[str, Any] | None = None, **settings: Any) -> TrainChoice:
    usual = {"steps": 4, "batch_tokens": 512, "evaluate_every": 2, "lr": 3e-3, "optimizer": "muon"}
    return TrainChoice(
        method,
        str(STORIES),
        [folder / "stories.jsonl"],
        folder / out,
        options=options or {},
        shards=folder / "shards",
        num_tokens=1500,
        max_len=96,
        feature_layers=(2, 3),
        settings={**usual, **settings},
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in read_head(folder).head.state_dict().items()}


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_learns_and_drafts(made: Path, method: str) -> None:
    options = {"unroll": 2, "feature_layers": [2, 3]} if method == "eagle3" else {}
    done = run(choice(made, method, f"learn-{method}", options=options, steps=12, evaluate_every=6))
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    about = json.loads((made / f"learn-{method}" / "provenance.json").read_text())
    assert about["token_passes"] == done.token_passes > 0
    llm = LLM(STORIES, {"method": method, "model": made / f"learn-{method}", "num_speculative_tokens": 4}, max_num_seqs=2)
    [output] = llm.generate("Tom", SamplingParams(max_tokens=12, seed=1))
    assert len(output.outputs[0].token_ids) == 12


def test_whole_sequences_are_learned_too(made: Path) -> None:
    done = run(choice(made, "ctc", "whole", options={"prefixes": False, "labels": 3}, steps=8, evaluate_every=4))
    assert done.history[-1]["loss"] < done.history[0]["loss"]


def test_several_seeds_learn_from_the_same_shards(made: Path) -> None:
    before = (made / "shards" / "manifest.json").read_bytes()
    run(dataclasses.replace(choice(made, "eagle", "seed-1", steps=1), seed=1))
    assert (made / "shards" / "manifest.json").read_bytes() == before
    run(choice(made, "eagle", "seed-0", steps=1))
    first, second = weights(made / "seed-0"), weights(made / "seed-1")
    assert not torch.equal(first["layers.0.mlp.up_proj.weight"], second["layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("method", ["eagle", "eagle3", "ctc"])
def test_without_features_in_the_shards_a_head_learns_the_same(made: Path, method: str) -> None:
    options = {"feature_layers": [2, 3, -1]} if method == "eagle3" else {}
    kept = choice(made, method, f"{method}-kept", options=options, bf16=False)
    again = dataclasses.replace(kept, out=made / f"{method}-again", shards=made / "texts", keep_features=False)
    run(kept)
    run(again)
    assert all(torch.equal(one, weights(again.out)[name]) for name, one in weights(kept.out).items())
    held = sum(file.stat().st_size for file in (made / "texts").glob("*.safetensors"))
    assert 20 * held < sum(file.stat().st_size for file in (made / "shards").glob("*.safetensors"))


def test_a_narrow_head_learns_and_drafts(made: Path) -> None:
    """Sizes that are not given are the target's in proportion; the head has an embedding of its own, and learns it."""
    options = {"unroll": 2, "feature_layers": [2, 3], "hidden": 64, "intermediate": 96, "draft_vocab_size": 60}
    found = []
    for steps in (1, 12):
        given = choice(made, "eagle3", f"narrow-{steps}", options=options, steps=steps, evaluate_every=1)
        found.append((run(given).history, read_head(given.out)))
    (_, first), (history, last) = found
    assert history[-1]["loss"] < history[0]["loss"]
    assert "regression" not in history[0]
    config = last.config
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads)
    assert sizes == (64, 96, 4, 2)
    assert config.target_hidden_size == 128
    assert last.head.fc.weight.shape == (64, 256)
    assert (first.head.embed_tokens.weight - last.head.embed_tokens.weight).abs().max() > 1e-3
    llm = LLM(STORIES, {"method": "eagle3", "model": made / "narrow-12", "num_speculative_tokens": 4}, max_num_seqs=2)
    [output] = llm.generate("Tom", SamplingParams(max_tokens=12, seed=1))
    assert len(output.outputs[0].token_ids) == 12
    for method, more, said in (
        ("eagle3", {"regression": 1.0}, "regression needs a head as wide as the target"),
        (
            "eagle3",
            {"kv_heads": 3},
            "heads a multiple of kv_heads. They would be hidden 64, intermediate 96, heads 4, kv_heads 3",
        ),
        ("eagle", {}, "unknown option of method 'eagle'"),
    ):
        with pytest.raises(ValueError, match=said):
            run(choice(made, method, "refused", options={**options, **more} if method == "eagle3" else {"hidden": 64}))


def test_a_narrow_head_begins_as_the_target_in_its_main_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(40, 5, generator=generator) @ torch.randn(5, 24, generator=generator)).double() + 3.0  # rank 5, moved
    for width in (5, 8, 30):
        narrowed = rows @ directions(rows, width)
        assert narrowed.shape == (40, width)
        torch.testing.assert_close(torch.cdist(narrowed, narrowed), torch.cdist(rows, rows), atol=1e-3, rtol=1e-3)
    fewer = rows @ directions(rows, 2)
    assert torch.cdist(fewer, fewer).sum() < 0.95 * torch.cdist(rows, rows).sum()
    assert torch.equal(rows @ directions(rows, 24), rows)


@pytest.mark.parametrize(("ahead", "embeddings", "features_first"), [(1, 1, False), (3, 2, True), (2, 0, False)])
def test_an_entry_is_fitted_to_what_is_linear(ahead: int, embeddings: int, features_first: bool) -> None:
    """Features that are a linear function of what a pair is given are predicted exactly, up to the ridge."""
    generator = torch.Generator().manual_seed(0)
    table, size, length = torch.randn(50, 8, generator=generator), 8 * (1 + embeddings), 30
    ids, features = torch.randint(50, (40, length), generator=generator), torch.randn(40, length, 8, generator=generator)
    matrix, final = torch.randn(8, size, generator=generator), torch.zeros(40, length, 8)
    places = range(length - ahead)
    for place in places:
        tokens = [table[ids[:, place + 1 + k]] for k in range(embeddings)]
        parts = [features[:, place], *tokens] if features_first else [*tokens, features[:, place]]
        final[:, place + ahead] = torch.cat(parts, dim=-1) @ matrix.T + 2.0

    class Table:
        def embed(self, token_ids: Tensor) -> Tensor:
            return table[token_ids]

    batch = Batch(ids, features, final, torch.ones(40, length, dtype=torch.bool), 40 * length)
    prediction = FittedLinear(nn.Linear(size, 8), ahead, embeddings, features_first)
    found, bias = fitted(prediction, Table(), [batch])
    torch.testing.assert_close(found, matrix, atol=0.03, rtol=0.0)
    torch.testing.assert_close(bias, torch.full((8,), 2.0), atol=0.03, rtol=0.0)


def test_a_head_of_another_target_is_refused_unless_forced(made: Path) -> None:
    config = {"method": "eagle", "model": made / "first", "num_speculative_tokens": 4, "tree": "chain"}
    with pytest.raises(ModelError, match="trained for 'babyllama-105', and this target has other weights") as caught:
        LLM(OTHER_STORIES, config)
    assert "--force" in str(caught.value)
    assert "\n" not in str(caught.value)
    LLM(OTHER_STORIES, {**config, "force": True})


def test_fingerprints_tell_weights_apart_and_nothing_else() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    assert fingerprint_of(STORIES) == fingerprint_of(model) == fingerprint(model.bfloat16().state_dict())
    assert fingerprint_of(STORIES) != fingerprint_of(OTHER_STORIES)
    state = model.state_dict()
    state["model.layers.2.mlp.up_proj.weight"] = state["model.layers.2.mlp.up_proj.weight"] * 1.01
    assert fingerprint(state) != fingerprint_of(STORIES)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_stops_between_goes_on_bit_for_bit(made: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    whole = choice(made, "fspad", f"whole-{accumulate}", steps=6, accumulate=accumulate)
    run(whole)
    cut = choice(made, "fspad", f"cut-{accumulate}", steps=6, accumulate=accumulate)
    real, calls = loop.backward, []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5 * accumulate:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "backward", stops)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    monkeypatch.setattr(loop, "backward", real)
    again = run(cut)
    assert again.step == 6
    assert again.token_passes == run(whole).token_passes
    pair = weights(whole.out), weights(cut.out)
    assert all(torch.equal(one, pair[1][name]) for name, one in pair[0].items())


@pytest.mark.slow
def test_kill_9_at_random_moments(made: Path) -> None:
    """Up to five times, also while text is written. The same command then ends with the weights of a run without a cut.

    The first kill comes before the end: at most after three quarters of the seconds of the run without a cut.
    """
    arguments = "--tokens 1500 --max-len 96 --feature-layers 2,3 --steps 60 --batch-tokens 512 --evaluate-every 5 --lr 3e-3"

    def start(out: str) -> subprocess.Popen[bytes]:
        given = f"--method fspad --model {STORIES} --data {made}/stories.jsonl --out {made}/{out} {arguments}"
        return subprocess.Popen(
            [sys.executable, "-m", "foredraft", "train", *given.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    began = time.monotonic()
    assert start("uncut").wait() == 0
    whole_s = time.monotonic() - began
    generator = torch.Generator().manual_seed(int(time.time()))
    killed = 0
    while killed < 5:
        process = start("killed")
        try:
            process.wait(timeout=whole_s * (0.15 + 0.6 * float(torch.rand((), generator=generator))))
            break  # it got to its end first
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    assert start("killed").wait() == 0
    assert killed > 0
    pair = weights(made / "uncut"), weights(made / "killed")
    assert all(torch.equal(one, pair[1][name]) for name, one in pair[0].items())


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_batches(made: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "foredraft", "train"]
    arguments = "--tokens 1500 --max-len 96 --feature-layers 2,3 --steps 4 --batch-tokens 512 --evaluate-every 2 --fp32"
    given = f"--method eagle --model {STORIES} --data {made}/stories.jsonl --set noise=0 {arguments}".split()
    alone = [sys.executable, "-m", "foredraft", "train", "--accumulate", "2"]
    for command_line, out in ((launch, "two"), (alone, "one")):
        subprocess.run(
            [*command_line, *given, "--out", str(made / out)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    pair = weights(made / "two"), weights(made / "one")
    assert all(torch.allclose(one, pair[1][name], atol=1e-2, rtol=1e-2) for name, one in pair[0].items())


def refused(given: TrainChoice, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        run(given)
    assert "\n" not in str(caught.value)


def test_other_settings_do_not_go_on(made: Path) -> None:
    run(choice(made, "eagle", "settled"))
    refused(choice(made, "eagle", "settled", lr=1e-4), "belongs to a run with another lr. Give the same settings")
    refused(choice(made, "fspad", "settled"), "another method and head_options")


def test_a_run_begins_with_another_head(made: Path) -> None:
    run(choice(made, "eagle", "longer"))
    given = dataclasses.replace(choice(made, "eagle", "further", steps=1, lr=1e-7), init=made / "first")
    run(given)
    old, new, other = weights(made / "first"), weights(given.out), weights(made / "longer")
    for name, one in old.items():
        assert torch.allclose(new[name], one, rtol=1e-2, atol=1e-5), name  # saved in bfloat16
    assert any(not torch.allclose(new[name], one, rtol=1e-2, atol=1e-5) for name, one in other.items())
    refused(dataclasses.replace(given, init=made / "longer"), "belongs to a run with another init")
    with pytest.raises(ValueError, match=r"has other sizes than the head to train\. Give the options of that head \(--set\)"):
        run(dataclasses.replace(given, options={"intermediate": 16}))
    with pytest.raises(ModelError, match="has method 'eagle', expected 'fspad'"):
        run(dataclasses.replace(choice(made, "fspad", "wrong"), init=made / "first"))


def test_a_damaged_checkpoint_is_said(made: Path) -> None:
    given = choice(made, "eagle", "damaged")
    run(given)
    (given.out / checkpoint.CHECKPOINT).write_bytes(b"PK" + bytes(100))
    refused(given, r"checkpoint.pt is damaged\. Delete it to start again")


def test_a_damaged_shard_is_found_before_it_is_learned_from(made: Path, tmp_path: Path) -> None:
    given = choice(made, "eagle", "shard")
    run(given)
    before = (given.out / checkpoint.CHECKPOINT).read_bytes()
    file = made / "shards" / "00000.safetensors"
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.unlink()  # others may have it mapped
        file.write_bytes(damaged)
        refused(given, r"is missing or damaged\. Delete the folder .* and run again")
    file.unlink()
    refused(given, "is missing or damaged")
    file.write_bytes(content)
    assert (given.out / checkpoint.CHECKPOINT).read_bytes() == before
    run(given)


def test_shards_of_another_target_or_plan_are_refused(made: Path) -> None:
    from dataclasses import replace

    given = choice(made, "eagle", "plan")
    refused(replace(given, model=str(OTHER_STORIES)), r"made with target .* \(now .*\)")
    refused(replace(given, max_len=80), r"made with max_len \d+ \(now 80\)\. Give another --shards folder, or delete this one")


def test_a_loss_that_is_no_number_stops_the_run(made: Path) -> None:
    given = choice(made, "eagle", "nan", steps=40, lr=1e30, clip=1e30, warmup=0.0, evaluate_every=1)
    refused(given, r"the loss became NaN or infinite at step \d+\. The last checkpoint is intact\. Lower --lr")
    kept = torch.load(given.out / checkpoint.CHECKPOINT, weights_only=True)
    assert all(torch.isfinite(one).all() for one in kept["head"].values())


def test_a_full_disk_leaves_the_last_checkpoint(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = choice(made, "eagle", "full", steps=4)
    run(choice(made, "eagle", "full", steps=4))
    before = (given.out / checkpoint.CHECKPOINT).read_bytes()
    real = torch.save

    def full(content: Any, file: Any) -> None:
        real(content, file)
        with Path(file).open("r+b") as part:
            part.truncate(100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    other = choice(made, "eagle", "full2", steps=4)
    refused(other, r"No space left on device.*\. Its old content is intact\. Free disk space and run the same command again")
    assert not (other.out / checkpoint.CHECKPOINT).exists()
    assert (given.out / checkpoint.CHECKPOINT).read_bytes() == before
    monkeypatch.setattr(checkpoint.torch, "save", real)
    run(other)


def test_a_batch_that_does_not_fit_says_what_to_do(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(lesson: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    from dataclasses import replace

    monkeypatch.setitem(RECIPES, "eagle", replace(RECIPES["eagle"], learn=too_much))
    refused(choice(made, "eagle", "memory"), "--batch-tokens 256 --accumulate 2, which learns the same")


def test_the_losses_are_plotted(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"train --method eagle --model {STORIES} --data {made}/stories.jsonl --out {made}/plotted --shards {made}/shards"
    given += " --tokens 1500 --max-len 96 --feature-layers 2,3 --steps 4 --batch-tokens 512 --evaluate-every 2 --lr 3e-3 --plot"
    for file, code in (("curves", 1), ("curves.svg", 0)):
        with pytest.raises(SystemExit) as ended:
            main([*given.split(), str(made / file)])
        assert ended.value.code == code
    assert "<svg" in (made / "curves.svg").read_text()
    assert f"must end in .png or .svg, got '{made}/curves'" in capsys.readouterr().err


def test_wrong_names_are_said(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown method 'egale'\. Did you mean 'eagle'"):
        run(choice(made, "egale", "x"))
    with pytest.raises(ValueError, match=r"option of method 'ctc': 'num_slot'\. Did you mean 'num_slots'"):
        run(choice(made, "ctc", "x", options={"num_slot": 4}))
    with pytest.raises(ValueError, match="anchors must be a share of the positions, above 0 and at most 1, got 64"):
        run(choice(made, "ctc", "x", options={"anchors": 64}))
    with pytest.raises(ValueError, match=r"soft_labels must be at least 0 \(0: the tokens of the text\), got -1"):
        run(choice(made, "medusa", "x", options={"soft_labels": -1}))
    with pytest.raises(ValueError, match=r"unknown schedule 'cosin'\. Did you mean 'cosine'"):
        run(choice(made, "eagle", "x", schedule="cosin"))
    with pytest.raises(ValueError, match="--set takes NAME=VALUE, got 'labels'"):
        typed.options(["labels"])
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "odd.jsonl").write_text('{"title": "x"}\n')
    for name, said in (
        ("bad", "is not a JSON Lines file"),
        ("odd", "and none of them is messages, "),
        ("none", "no data file"),
    ):
        with pytest.raises(ValueError, match=said):
            list(read_conversations(tmp_path / f"{name}.jsonl"))


def turns(tmp_path: Path, record: dict[str, Any]) -> list[list[str]]:
    """Texts of the conversations that a record gives, each up to what the target is to answer."""
    (tmp_path / "one.jsonl").write_text(json.dumps(record))
    found = read_conversations(tmp_path / "one.jsonl")
    return [[message["content"] for message in one.messages] for one in found if isinstance(one, Conversation)]


def test_records_of_every_shape(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    spoken = [{"speaker": "USER", "utterance": "a"}, {"speaker": "SYSTEM", "utterance": "b"}]
    assert turns(tmp_path, {"messages": chat}) == [["a", "b", "c"]]
    assert turns(tmp_path, {"messages": chat[:2]}) == [["a"]]
    assert turns(tmp_path, {"conversations": shared}) == [["a"]]
    assert turns(tmp_path, {"turns": ["a", "b"]}) == [["a"]]
    assert turns(tmp_path, {"turns": spoken}) == [["a"]]
    assert turns(tmp_path, {"instruction": "do", "input": "this"}) == [["do\n\nthis"]]
    assert turns(tmp_path, {"question": "q", "answer": "a"}) == [["q"]]
    tree = {"text": "a", "replies": [{"text": "b", "replies": [{"text": "c", "replies": [{"text": "d", "replies": []}]}]}]}
    assert sorted(turns(tmp_path, {"prompt": tree})) == [["a"], ["a", "b", "c"]]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"prompt": "x"}\n{"prompt": " "}\n')
    tokenizer = LLM(STORIES, {"method": "ar"}).tokenizer
    corpus = read_corpus([tmp_path / "a.jsonl.gz"], tokenizer, 0, max_len=96)
    assert [prompt.ids for prompt in corpus.prompts] == [tokenizer.encode("x")]
    assert corpus.usage.lines() == ["left out: 1 of 2 conversations: 1 with an empty user turn"]


def test_without_a_chat_template_the_last_words_are_the_prompt(tmp_path: Path) -> None:
    llm = LLM(STORIES, {"method": "ar"})
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "Tom"))]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    corpus = read_corpus([tmp_path / "chat.jsonl"], llm.tokenizer, 0, max_len=96)
    assert [prompt.ids for prompt in corpus.prompts] == [llm.tokenizer.encode("Tom")]


def _opened(made: Path, one: dict) -> list[shards.Text]:
    return shards.open_shard(made / "shards" / one["name"], one["sha256"], (2, 3, -1))


def test_a_layer_that_was_not_captured_is_refused(made: Path) -> None:
    refused(choice(made, "eagle3", "uncaptured", options={"feature_layers": [1, 2, 3]}), "lack the target's layers \\[1\\]")


def test_the_texts_are_the_targets_own(made: Path) -> None:
    """Greedy answers are what the target would write, and features are those of its forward."""
    manifest = json.loads((made / "shards" / "manifest.json").read_text())
    texts = [text for one in manifest["shards"] for text in _opened(made, one)]
    llm = LLM(STORIES, {"method": "ar"})
    ways = manifest["made_from"]["temperatures"]
    greedy = [text for i, text in enumerate(texts) if ways[i % len(ways)] == 0][:3]
    for text in greedy:
        prompt = text.ids[: text.prompt_len].tolist()
        [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=96 - len(prompt)))
        assert output.outputs[0].token_ids == text.ids[text.prompt_len :].tolist()
        pool = llm.target.new_pool(6)
        from foredraft.core.tree import TreeBatch

        scores = llm.target.forward(TreeBatch.chains([text.ids.tolist()]), [pool.allocate()], feature_layers=(2, 3, -1))
        features = torch.cat([text.features[layer] for layer in (2, 3, -1)], dim=1)
        torch.testing.assert_close(features.float(), scores.features, atol=0.02, rtol=0.02)


def test_rates() -> None:
    settings = Settings(steps=100, warmup=0.1)
    assert [round(rate(settings, step), 3) for step in (0, 4, 9, 10, 55, 99)] == [0.1, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert rate(Settings(steps=100, warmup=0.0, schedule="linear"), 99) == pytest.approx(0.0101, abs=1e-4)


def test_early_stop(made: Path) -> None:
    done = run(choice(made, "eagle", "early", steps=40, lr=0.0, evaluate_every=1, patience=3))
    assert done.step == 4


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_unrolled_attention_is_that_of_a_drafted_chain(runs: int) -> None:
    """Row r of run j is what a head behind a cache of r + 1 pairs would say in its j-th draft (EAGLE-3, training-time test)."""
    torch.manual_seed(0)
    for head in (FeatureHead(SHAPE, partial_alignment=True), Eagle3Head(SHAPE, feature_layers=[1, 2, 3])):
        length, tabs = 7, tables(CONFIG, torch.device("cpu"))
        embeddings, features = torch.randn(1, length + runs, 32), torch.randn(1, length, 32)
        attend, feature = unrolled(tabs), features
        for run_number in range(runs):
            out = head(embeddings[:, run_number : run_number + length], feature, attend)
            feature = out.carried
        for row in range(length):
            own = features[:, : row + 1]
            for more in range(runs):
                alone = head(embeddings[:, : row + 1 + more], own, unrolled(tabs))
                own = torch.cat([own, alone.carried[:, -1:]], dim=1)
            torch.testing.assert_close(out.scored[0, row], alone.scored[0, -1], atol=1e-5, rtol=1e-5)


def test_slots_of_a_text_are_those_behind_each_anchor_alone() -> None:
    torch.manual_seed(0)
    head = HEADS["ctc"].make(SHAPE, num_slots=3)
    tabs, entries, later = tables(CONFIG, torch.device("cpu")), torch.randn(1, 9, 32), torch.randn(1, 9, 2, 32)
    anchors = torch.tensor([[1, 4, 8]])

    def run_with(rows: Tensor, some: Tensor) -> Tensor:
        slots = later[:, some[0]].flatten(1, 2)
        return head(torch.cat([rows, slots], dim=1), with_slots(tabs, rows.shape[1], some, 2))[:, rows.shape[1] :]

    together = run_with(entries, anchors)
    for i, anchor in enumerate(anchors[0].tolist()):
        alone = run_with(entries[:, : anchor + 1], torch.tensor([[anchor]]))
        torch.testing.assert_close(together[:, 2 * i : 2 * i + 2], alone, atol=1e-5, rtol=1e-5)


def masked(rotary: Tables, positions: Int[Tensor, "b q"], visible: Bool[Tensor, "b q q"]) -> Attend:
    """Returns attention with an explicit mask; `visible[b, i, j]` says whether row i attends to row j."""
    cos, sin = (table[positions][:, :, None] for table in rotary)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rotation = cos.to(query.dtype), sin.to(query.dtype)
        query, key = rotate(query, rotation), rotate(key, rotation)
        heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = F.scaled_dot_product_attention(*heads, attn_mask=visible[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    return attend


def slot_rows(length: int, anchors: Int[Tensor, "b a"], num_slots: int) -> tuple[Int[Tensor, "b q"], Bool[Tensor, "b q q"]]:
    """Computes the positions and the attention mask of a text's pairs, followed by the slots of some of the pairs (anchors).

    A pair attends to the pairs up to itself. Slot k of an anchor attends to the pairs up to the anchor and to the slots of the
    same anchor up to k.

    Returns:
        The position of every row, and the mask: row i attends to row j where ``mask[b, i, j]`` is true.
    """
    batch, count = anchors.shape
    slots = torch.arange(num_slots, device=anchors.device)
    owner = torch.arange(count, device=anchors.device).repeat_interleave(num_slots)
    until = torch.cat([torch.arange(length, device=anchors.device).expand(batch, -1), anchors[:, owner]], dim=1)
    visible = torch.zeros(batch, until.shape[1], until.shape[1], dtype=torch.bool, device=anchors.device)
    visible[:, :, :length] = torch.arange(length, device=anchors.device) <= until[:, :, None]
    within = (owner[:, None] == owner) & (slots.repeat(count)[:, None] >= slots.repeat(count))
    visible[:, length:, length:] = within
    return torch.cat([until[:, :length], until[:, length:] + 1 + slots.repeat(count)], dim=1), visible


def test_attention_of_slots_is_that_of_the_whole_mask() -> None:
    tabs, generator = tables(CONFIG, torch.device("cpu")), torch.Generator().manual_seed(0)
    length, anchors = 12, torch.tensor([[0, 4, 11], [2, 3, 9]])
    query, key, value = (torch.randn(2, length + 12, heads, 8, generator=generator) for heads in (4, 2, 2))
    plain = masked(tabs, *slot_rows(length, anchors, 4))(query, key, value)
    torch.testing.assert_close(with_slots(tabs, length, anchors, 4)(query, key, value), plain, atol=1e-5, rtol=1e-5)


def test_products_are_in_the_dtype_that_is_faster_and_stay_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = torch.bfloat16

    def linear(rows: Tensor, weight: Tensor) -> None:
        time.sleep(0.002 if rows.dtype == slow else 0.001)

    monkeypatch.setattr(nn.functional, "linear", linear)
    assert course.faster_in_bf16(torch.device("cpu")) is False
    slow = torch.float32
    assert course.faster_in_bf16(torch.device("cpu")) is True
    torch.save({"facts": {"bf16": False}}, tmp_path / checkpoint.CHECKPOINT)
    assert course.by_processor(checkpoint.facts_in(tmp_path), torch.device("cpu"))["bf16"] is False


@pytest.mark.parametrize(("fast", "optimizer"), [(True, "muon"), (False, "adamw")])
def test_the_optimizer_follows_the_processor(made: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, optimizer: str) -> None:
    given = choice(made, "eagle", f"by-{optimizer}", steps=1)
    unset = {name: value for name, value in given.settings.items() if name != "optimizer"}
    for processor in (fast, not fast):  # a run that goes on keeps its settings, on another processor too
        monkeypatch.setattr(course, "faster_in_bf16", lambda _, answer=processor: answer)
        run(dataclasses.replace(given, settings=unset))
        facts = checkpoint.facts_in(given.out)
        assert (facts["bf16"], facts["optimizer"]) == (fast, optimizer)
    other = choice(made, "eagle", f"by-user-{fast}", steps=1, optimizer="adamw" if fast else "muon", bf16=fast)
    run(other)
    assert checkpoint.facts_in(other.out)["optimizer"] == other.settings["optimizer"]


class Echo(nn.Module):
    """A head of slots that gives back what enters."""

    num_slots = 2

    def __init__(self) -> None:
        super().__init__()
        self.added, self.blank = nn.Parameter(torch.randn(1, 4)), None

    def enter(self, embedding: Tensor, feature: Tensor) -> Tensor:
        return feature

    def enter_ahead(self, embedding: Tensor, feature: Tensor) -> Tensor:
        return feature[..., None, :] + self.added

    def forward(self, entries: Tensor, attend: Any) -> Tensor:
        return entries


def test_states_of_slots_and_pairs_regress_on_the_features_before_their_tokens() -> None:
    torch.manual_seed(0)
    final, begin, length = torch.randn(1, 9, 4), 4, 9
    batch = Batch(torch.arange(9)[None], final, final, torch.arange(9)[None] >= begin, 9 - begin)
    frozen: Any = SimpleNamespace(weight=torch.randn(50, 4), embed=lambda ids: torch.zeros(*ids.shape, 4))
    head, rotary = Echo(), tables(CONFIG, torch.device("cpu"))

    def part(**more: Any) -> Tensor:
        """What `regression` 2 adds to the loss."""
        several = [
            {"anchors": 1.0, "decay": 0.8, "prefixes": True, "soft_labels": 0} | {"regression": one, **more}
            for one in (0.0, 2.0)
        ]
        none, with_it = (RECIPES["ctc"].learn(Lesson(head, batch, frozen, rotary, one, torch.Generator())) for one in several)
        return with_it.loss - none.loss

    def apart(state: Tensor, at: int) -> Tensor:
        return nn.functional.smooth_l1_loss(state, final[0, at])

    pairs = [j for j in range(length - 1) if begin <= j + 2 < length]
    added = torch.cat([torch.zeros(1, 4), head.added])  # to the pair's own state: nothing for the first slot
    slots = [apart(final[0, j] + added[k], j + 1 + k) for j in pairs for k in range(2) if j + 2 + k < length]
    own = [apart(final[0, j], j + 1) for j in pairs]
    wanted = 2 * (torch.stack(slots).mean() + torch.stack(own).mean())
    torch.testing.assert_close(part(), wanted, atol=1e-4, rtol=1e-4)
    head.blank = nn.Linear(4, 1)
    for labels in (2, 3):  # as many as slots, and more
        torch.testing.assert_close(part(labels=labels), wanted, atol=1e-4, rtol=1e-4)


def test_soft_labels_are_the_likeliest_tokens_of_the_target_at_every_place() -> None:
    """Two slots, so that few paths begin with a token, or with the text's first and then any: they are spelled out."""
    torch.manual_seed(0)
    final, begin, length = torch.randn(1, 7, 4), 3, 7
    ids = torch.tensor([[0, 1, 2, 3, 5, 2, 4]])
    batch = Batch(ids, final, final, torch.arange(length)[None] >= begin, length - begin)
    frozen: Any = SimpleNamespace(weight=torch.randn(6, 4), embed=lambda ids: torch.zeros(*ids.shape, 4))
    head, rotary = Echo(), tables(CONFIG, torch.device("cpu"))
    options = {"anchors": 1.0, "decay": 0.8, "prefixes": True, "soft_labels": 3, "regression": 0.0}

    def loss() -> Tensor:
        return RECIPES["ctc"].learn(Lesson(head, batch, frozen, rotary, options, torch.Generator())).loss

    def shares(at: int) -> list[tuple[int, Tensor]]:
        """Tokens that may stand at a place of the text, and what each counts."""
        best = (final[0, at - 1] @ frozen.weight.T).topk(3)
        return list(zip(best.indices.tolist(), best.values.softmax(-1), strict=True))

    def frames(j: int) -> list[Tensor]:
        states = torch.stack([final[0, j], final[0, j] + head.added[0]])
        blank = states.new_zeros(2, 0) if head.blank is None else head.blank(states)
        return [*torch.cat([states @ frozen.weight.T, blank], dim=1).softmax(-1)]

    pairs = [j for j in range(length - 1) if begin <= j + 2 < length]
    spelled = [
        [sum(-share * frames(j)[k][token].log() for token, share in shares(j + 2 + k)) for j in pairs if j + 2 + k < length]
        for k in range(2)
    ]
    wanted = sum(0.8**k * sum(some) / len(some) for k, some in enumerate(spelled))
    torch.testing.assert_close(loss(), torch.as_tensor(wanted), atol=1e-5, rtol=1e-5)
    head.blank = nn.Linear(4, 1)
    total, count = torch.zeros(()), 0.0
    for j in pairs:
        one, two = frames(j)
        for token, share in shares(j + 2):
            total, count = total - share * (one[token] + one[-1] * two[token]).log(), count + float(share)
        for token, share in shares(j + 3) if j + 3 < length else []:
            if token != ids[0, j + 2]:  # two slots cannot say a token twice
                total, count = total - share * (one[ids[0, j + 2]] * two[token]).log(), count + float(share)
    torch.testing.assert_close(loss(), total / count, atol=1e-5, rtol=1e-5)
