"""The command line as a user meets it: output, colours, JSON, bad input, Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models

from foredraft import LLM, SamplingParams
from foredraft.__main__ import main
from foredraft.cli import show
from foredraft.core.folders import BUNDLED_TARGET
from foredraft.core.outputs import CompletionOutput
from foredraft.drafters import DRAFTERS
from foredraft.rules import RULES
from foredraft.trees import GROWERS

DATA = Path(__file__).parent / "data"
TARGET, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")
PAIR = ["--model", TARGET, "--draft-model", OTHER, "--temperature", "0", "--max-tokens", "40"]
STORY = "Once upon a time"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return call


def plain_text(prompt=STORY, **sampling):
    llm = LLM(TARGET, {"method": "ar"})
    return llm.generate(prompt, SamplingParams(temperature=0.0, **sampling))[0].outputs[0]


# --- what is printed


def test_generate_prints_the_text_and_nothing_else(run):
    code, out, err = run("generate", STORY, *PAIR)
    assert code == 0
    assert out == plain_text(max_tokens=40).text + "\n"
    assert "40 tokens" in err
    assert "acceptance_length" in err
    assert "\x1b" not in out + err


def test_prompt_from_standard_input(run):
    assert run("generate", "-", *PAIR, stdin=STORY)[1] == run("generate", STORY, *PAIR)[1]


def test_json_is_one_object(run):
    code, out, err = run("generate", STORY, *PAIR, "--json", "--show-tree", "--budget", 4, "--tree", "topk", "--seed", 7)
    found = json.loads(out)
    expected = plain_text(max_tokens=40)
    assert (code, err) == (0, "")
    assert found["prompt"] == STORY
    assert (found["text"], found["token_ids"]) == (expected.text, expected.token_ids)
    assert len(found["kinds"]) == 40
    assert set(found["kinds"]) <= {"accepted", "recovered", "bonus"}
    assert (found["finish_reason"], found["stop_reason"], found["seed"]) == ("length", None, 7)
    assert found["metrics"]["acceptance_length"] > 1
    config = found["config"]
    assert (config["method"], config["tree"], config["budget"], config["rule"]) == ("lm", "topk", 4, "deterministic")
    assert len(found["tree"]["token_ids"]) == len(found["tree"]["parents"]) <= 5


def test_show_tree_marks_the_accepted_path(run):
    given = ["--model", TARGET, "--draft-model", TARGET, "--temperature", 0, "--budget", 4, "--max-tokens", 6]
    _, out, _ = run("generate", STORY, *given, "--show-tree")  # at its last step there is no room to draft
    assert "(root)" in out
    assert "✓" in out
    assert "accepted" in out


def test_show_tree_without_a_tree(run):
    code, out, err = run("generate", STORY, "--model", TARGET, "--method", "ar", "--max-tokens", 3, "--show-tree")
    assert code == 0
    assert "nothing was drafted" in err
    assert "root" not in out


def test_speculative_config_as_json(run):
    extra = '{"tree": "branching", "num_chains": 2, "merge": true}'
    _, out, _ = run("generate", STORY, *PAIR, "--json", "--speculative-config", extra)
    config = json.loads(out)["config"]
    assert (config["tree"], config["num_chains"], config["merge"], config["rule"]) == ("branching", 2, True, "multiround-iid")


def test_stop_string_inside_an_accepted_path_cuts_exactly_there(run):
    whole = plain_text(max_tokens=80).text
    stop = whole[22:25]
    expected = plain_text(max_tokens=80, stop=stop)
    given = [
        "--model",
        TARGET,
        "--draft-model",
        TARGET,
        "--temperature",
        0,
        "--max-tokens",
        80,
        "--tree",
        "chain",
        "--budget",
        8,
    ]
    code, out, _ = run("generate", STORY, *given, "--stop", stop, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["kinds"][-1] == "accepted"  # the stop is within a path, not at its end
    assert found["text"] == expected.text == whole[: whole.index(stop)]
    assert (found["token_ids"], found["stop_reason"]) == (expected.token_ids, stop)
    assert run("generate", STORY, *given, "--stop", stop)[1] == found["text"] + "\n"  # nothing shown that is cut off later


def test_sampling_options_reach_the_sampler(run):
    given = ["generate", STORY, *LM, "--max-tokens", 20, "--json"]
    _, out, _ = run(*given, "--temperature", 0.8, "--top-p", 0.9, "--top-k", 20, "--min-p", 0.05, "--ignore-eos")
    sampling = json.loads(out)["config"]["sampling"]
    assert [sampling[name] for name in ("temperature", "top_p", "top_k", "min_p")] == [0.8, 0.9, 20, 0.05]
    assert sampling["ignore_eos"]
    assert json.loads(run(*given, "--top-k", 1)[1])["text"] == json.loads(run(*given, "--temperature", 0)[1])["text"]


def test_methods_lists_every_row(run):
    _, out, _ = run("methods", "--json")
    found = json.loads(out)
    for key, table in {"drafters": DRAFTERS, "trees": GROWERS, "rules": RULES}.items():
        assert [row["name"] for row in found[key]] == list(table)
        assert all(row["guarantee"] and row["source"] for row in found[key])
    assert [row["name"] for row in found["rules"] if "lossy" in row["guarantee"]] == ["typical", "tolerance", "uno"]
    code, out, _ = run("methods")
    assert code == 0
    assert all(name in out for name in (*DRAFTERS, *GROWERS, *RULES))


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["methods"]])
def test_help(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage" in out


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.match(r"\d+\.\d+", out)


# --- colours: pieces by kind of token


def completion_of(text, token_ids, kinds, finish_reason=None):
    return CompletionOutput(0, text, token_ids, finish_reason, None, None, None, kinds, [])


def byte_tokenizer():
    tokenizer = Tokenizer(models.BPE(vocab={f"<0x{i:02X}>": i for i in range(256)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.ByteFallback()
    return type("Fast", (), {"backend_tokenizer": tokenizer})()


def test_half_characters_belong_to_the_token_that_completes_them():
    tokens = list("aé€b".encode())
    kinds = ["accepted", "accepted", "recovered", "accepted", "accepted", "bonus", "plain"]
    pieces = show.Pieces(byte_tokenizer(), SamplingParams())
    got = pieces.take(completion_of("a", tokens[:2], kinds[:2]))
    got += pieces.take(completion_of("aé€", tokens[:6], kinds[:6]))
    got += pieces.take(completion_of("aé€b", tokens, kinds))
    assert got == [("accepted", "a"), ("recovered", "é"), ("bonus", "€"), ("plain", "b")]


def test_what_may_become_a_stop_string_is_held_back():
    """The engine holds it back: the text of a running output lacks it."""
    pieces = show.Pieces(byte_tokenizer(), SamplingParams(stop=["END"]))
    assert pieces.take(completion_of("x", list(b"xEN"), ["accepted"] * 3)) == [("accepted", "x")]
    assert pieces.take(completion_of("xENo", list(b"xENo"), ["accepted"] * 4)) == [
        ("accepted", "E"),
        ("accepted", "N"),
        ("accepted", "o"),
    ]
    assert pieces.take(completion_of("xENo", list(b"xENoE"), ["accepted"] * 5)) == []
    done = completion_of("xENo", list(b"xENoEND"), ["accepted"] * 7, "stop")
    assert pieces.take(done) == []


def test_pieces_of_a_run_are_its_text():
    llm = LLM(TARGET, {"model": OTHER})
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=120, stop=["th", "e "])
    pieces, shown = show.Pieces(llm.tokenizer, sampling), ""
    for output in llm.stream(STORY, sampling):
        shown += "".join(text for _, text in pieces.take(output.outputs[0]))
        assert output.outputs[0].text.startswith(shown)
    shown += "".join(text for _, text in pieces.take(output.outputs[0]))
    assert shown == output.outputs[0].text


def test_terminal_gets_colours_by_kind_and_no_control_characters(monkeypatch):
    out = StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", highlight=False, no_color=False)
    monkeypatch.setattr(show, "Console", lambda *args, **options: console)
    screen = show.Screen(byte_tokenizer(), SamplingParams(), legend=False)
    screen.finish(completion_of("a\x1bb\r", list(b"a\x1bb\r"), ["accepted", "plain", "bonus", "plain"], "length"))
    assert out.getvalue() == "\x1b[32ma\x1b[0m\x1b[36mb\x1b[0m\n"


# --- chat


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny model with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(TARGET, directory)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }} {% endfor %}")
    return str(directory)


def test_chat_keeps_history_and_forgets_on_reset(run, chat_model, monkeypatch):
    asked = []
    prompt_of = LLM.chat_prompt
    monkeypatch.setattr(LLM, "chat_prompt", lambda llm, messages: (asked.append(messages), prompt_of(llm, messages))[1])
    given = ["chat", "--model", chat_model, "--method", "suffix", "--max-tokens", 5, "--system", "Be brief"]
    code, out, err = run(*given, stdin="Hello\nAgain\n/reset\nNew\n/what\n/exit\nnever\n")
    assert code == 0
    assert len(out.splitlines()) >= 3
    roles = [[one["role"] for one in messages] for messages in asked[1:]]
    turn = ["system", "user"]
    assert roles == [turn, [*turn, "assistant", "user"], turn]
    assert asked[-1][-1]["content"] == "New"
    assert "unknown command /what" in err


def test_chat_survives_a_question_that_is_too_long(run, chat_model):
    given = ["chat", "--model", chat_model, "--method", "suffix", "--max-tokens", 5]
    code, out, err = run(*given, stdin="x" * 400 + "\nHi\n")
    assert code == 0
    assert "context" in err
    assert "/reset" in err
    assert out.strip()


def test_chat_without_template(run):
    code, _, err = run("chat", "--model", TARGET)
    assert code == 1
    assert err.startswith("error: this model has no chat template")


# --- bad input: one clear line, exit 1; usage: exit 2


@pytest.fixture
def broken(tmp_path):
    """Copies of the target that are damaged in a given way."""

    def damage(how):
        directory = tmp_path / how
        shutil.copytree(TARGET, directory)
        weights = directory / "model.safetensors"
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        elif how == "noise":
            weights.write_bytes(os.urandom(2000))
        elif how == "config":
            (directory / "config.json").write_text("{")
        elif how == "noconfig":
            (directory / "config.json").unlink()
        elif how == "pickle":
            weights.rename(directory / "pytorch_model.bin")
        elif how == "tokenizer":
            (directory / "tokenizer.json").write_text("{")
        elif how == "sampling":
            (directory / "generation_config.json").write_text('{"top_p": 0}')
        elif how == "permuted":
            tokenizer = json.loads((directory / "tokenizer.json").read_text())
            vocabulary = tokenizer["model"]["vocab"]
            vocabulary["C"], vocabulary["N"] = vocabulary["N"], vocabulary["C"]
            (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        elif how == "empty":
            shutil.rmtree(directory)
            directory.mkdir()
        return directory

    return damage


def without_choice(err):
    """Standard error without what is said of the automatic choice, which may come before an error."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(("drafting:", "timing drafters")))


def assert_two_lines(err, said):
    assert said in err
    assert re.fullmatch(r"error: .+\nhint: .+\n", without_choice(err))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "corrupt or cut off"),
        ("noise", "corrupt or cut off"),
        ("config", "is not JSON"),
        ("noconfig", "config.json"),
        ("pickle", "pickled"),
        ("empty", "is empty"),
    ],
)
@pytest.mark.parametrize("option", ["--model", "--draft-model"])
def test_damaged_model(run, broken, how, said, option):
    others = ["--model", TARGET] if option == "--draft-model" else []
    code, out, err = run("generate", STORY, option, broken(how), *others)
    assert (code, out) == (1, "")
    assert_two_lines(err, said)


HEAD = str(DATA / "heads" / "eagle")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", HEAD], "holds a draft head, not a model"),
        (["--model", TARGET, "--draft-model", HEAD, "--method", "lm"], "holds a draft head, not a model"),
        (["--model", TARGET, "--draft-model", HEAD, "--method", "fspad"], "hint: give the method of the head, or none"),
        (["--model", TARGET, "--method", "fspad"], "needs a trained head"),
        (["--model", OTHER, "--draft-model", HEAD], "trained for 'babyllama-105', and this target has other weights"),
    ],
)
def test_a_head_in_the_wrong_place(run, arguments, said):
    code, out, err = run("generate", STORY, *arguments)
    assert (code, out) == (1, "")
    assert_two_lines(err, said)
    assert "`foredraft generate --help`" not in err


@pytest.mark.parametrize(
    ("option", "how", "said"),
    [
        ("--model", "tokenizer", "cannot read the tokenizer"),
        ("--model", "sampling", "generation_config.json cannot be used: top_p must be above 0 and at most 1, got 0"),
        ("--draft-model", "permuted", "vocabulary mismatch: 2 token ids stand for other tokens"),
    ],
)
def test_damaged_files_beside_the_weights(run, broken, option, how, said):
    others = ["--model", TARGET] if option == "--draft-model" else []
    code, out, err = run("generate", STORY, option, broken(how), *others)
    assert (code, out) == (1, "")
    assert_two_lines(err, said)


MODEL = ["--model", TARGET]
LM = [*MODEL, "--draft-model", OTHER]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([STORY, "--model", "/no/such/directory"], "no directory '/no/such/directory'"),
        ([STORY, "--model", __file__], "is a file"),
        (["", *MODEL], "the prompt is empty"),
        (["x" * 300, *MODEL], "the context of 256"),
        ([STORY, *MODEL, "--max-tokens", 0], "max_tokens must be a whole number, at least 1"),
        ([STORY, *MODEL, "--temperature", -0.5], "temperature must be 0 (greedy) or above, got -0.5"),
        ([STORY, *MODEL, "--temperature", "nan"], "temperature must be"),
        ([STORY, *MODEL, "--top-p", 0], "top_p must be above 0 and at most 1"),
        ([STORY, *MODEL, "--top-p", 1.5], "top_p must be above 0 and at most 1"),
        ([STORY, *MODEL, "--min-p", 2], "min_p must be between 0 and 1"),
        ([STORY, *MODEL, "--stop", ""], "stop must not contain an empty string"),
        ([STORY, *MODEL, "--method", "ngrm"], "unknown method 'ngrm'\nhint: Did you mean 'ngram'?"),
        ([STORY, *LM, "--tree", "dyspek"], "unknown tree 'dyspek'\nhint: Did you mean 'dyspec'?"),
        ([STORY, *LM, "--tree", "dyspec", "--rule", "multiroud"], "unknown rule 'multiroud'\nhint: Did you mean 'multiround'?"),
        ([STORY, *LM, "--tree", "dyspec", "--rule", "multiround-iid"], "rule 'multiround-iid' is not exact for tree 'dyspec'"),
        ([STORY, *LM, "--tree", "topk", "--rule", "block"], "rule 'block' is not exact for tree 'topk'"),
        ([STORY, *MODEL, "--method", "suffix", "--tree", "topk"], "method 'suffix' cannot grow tree 'topk'"),
        ([STORY, *MODEL, "--method", "lm"], "needs a draft model"),
        ([STORY, *LM, "--tree", "sequoia"], "acceptance"),
        ([STORY, *LM, "--budget", 0], "between 1 and 1024, got 0"),
        ([STORY, *LM, "--budget", 1025], "between 1 and 1024, got 1025"),
        ([STORY, *MODEL, "--draft-model", BUNDLED_TARGET], "vocabulary mismatch"),
        ([STORY, *MODEL, "--dtype", "bfloat61"], "unknown dtype 'bfloat61'"),
        ([STORY, *MODEL, "--device", "quantum"], "device 'quantum' cannot be used"),
        ([STORY, *LM, "--speculative-config", "{"], "--speculative-config is not JSON"),
        ([STORY, *LM, "--tree", "dyspec", "--speculative-config", '{"wdth": 2}'], "Did you mean 'width'?"),
        ([STORY, *MODEL, "--chat"], "no chat template"),
        (["-", *MODEL], "the prompt is empty"),
        ([STORY, *MODEL, "--max-tokens", -1], "max_tokens must be a whole number, at least 1"),
        ([STORY, *MODEL, "--top-k", -2], "top_k must be a whole number"),
        ([STORY, *MODEL, "--method", "zzz"], "unknown method 'zzz'\nhint: Allowed: lm, ngram, suffix, eagle, "),
        ([STORY, *MODEL, "--method", "ar", "--tree", "dyspek"], "unknown tree 'dyspek'\nhint: Did you mean 'dyspec'?"),
        ([STORY, *LM, "--tree", "chain", "--rule", "deterministic"], "hint: rules that can be used with it: chain, multiround"),
        ([STORY, *MODEL, "--method", "suffix", "--rule", "chain"], "not exact for the tree of method 'suffix'"),
        ([STORY, *LM, "--budget", "many"], "--budget must be a whole number or auto, got 'many'"),
        ([STORY, *LM, "--budget", -1], "between 1 and 1024, got -1\nhint: To draft nothing use method 'ar'"),
        ([STORY, *LM, "--speculative-config", "[1]"], "must be a JSON object"),
        ([STORY, *LM, "--speculative-config", '{"method": ["lm"]}'], "method must be a name, got ['lm']"),
        (
            [STORY, *LM, "--speculative-config", '{"num_speculative_tokens": "4"}'],
            "num_speculative_tokens must be a whole number",
        ),
        ([STORY, *LM, "--tree", "topk", "--speculative-config", '{"draft_depth": 65}'], "draft_depth must be at most 64 deep"),
        ([STORY, *LM, "--tree", "branching", "--speculative-config", '{"expansion": 3}'], "expansion must be a list"),
    ],
)
def test_bad_input(run, arguments, said):
    code, out, err = run("generate", *arguments)
    assert (code, out) == (1, "")
    assert_two_lines(err, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", STORY, "--metod", "lm"], "--method"),
        (["generate", STORY, "--seed", "many"], "valid int"),
        (["generate", STORY, "more"], "unexpected extra argument"),
        (["generat", STORY], "generat"),
    ],
)
def test_usage_errors(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert "--help" in err


def test_a_bug_is_one_line_too(run, monkeypatch):
    monkeypatch.setattr(LLM, "stream", lambda *args: torch.zeros(2) @ torch.zeros(3))
    code, _, err = run("generate", STORY, *MODEL)
    assert code == 1
    assert err.startswith("error: RuntimeError: ")
    assert "FOREDRAFT_TRACEBACK=1" in err


# --- as a process: pipes, other people's warnings, and Ctrl-C


def _interruptible():
    """A process that a shell starts in the background ignores SIGINT, and hands that on to what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, **options):
    """The command line as a process; pipes carry bytes, so that none are left in a decoder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "foredraft", *map(str, arguments)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, "bufsize": 0}
    return subprocess.Popen(command, preexec_fn=_interruptible, **options)


@pytest.mark.parametrize("arguments", [["x" * 300], ["", "--method", "suffix"]])
def test_a_process_says_nothing_else(arguments):
    """Neither Transformers' warning about a long text nor anything at exit."""
    out, err = (process := start("generate", *arguments, *MODEL, "--budget", 4)).communicate(timeout=120)
    assert (process.returncode, out) == (1, b"")
    assert_two_lines(err.decode(), "the prompt ")


DRAFTING = {"method": "suffix", "num_speculative_tokens": 4}
SUFFIX = ["--model", BUNDLED_TARGET, "--method", "suffix", "--budget", 4]
LONG = [*SUFFIX, "--temperature", 1, "--max-tokens", 2000, "--ignore-eos"]


def stop_when_it_writes(process, num_chars):
    """Sends Ctrl-C once `num_chars` came; returns everything that was written."""
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    begun = b"".join(process.stdout.read(1) for _ in range(num_chars))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    watchdog.cancel()
    return (begun + out).decode(), err.decode()


def test_interrupt_keeps_the_text_and_exits_with_130():
    process = start("generate", STORY, *LONG)
    out, err = stop_when_it_writes(process, 20)
    assert process.returncode == 130
    assert len(out) >= 20
    assert "(interrupted)" in err
    assert "Traceback" not in err
    llm = LLM(str(BUNDLED_TARGET), DRAFTING)
    sampling = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=len(out))
    assert llm.generate(STORY, sampling)[0].outputs[0].text.startswith(out.removesuffix("\n"))


DROPPED = """
import signal, sys
from foredraft import __main__, llm

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def stream(self, *arguments, begin=llm.LLM.stream):
    for number, output in enumerate(begin(self, *arguments)):
        yield output
        if number == 5:
            Interrupted()

llm.LLM.stream = stream
__main__.main(sys.argv[1:])
"""


def test_an_interrupt_while_an_object_is_destroyed_is_not_lost():
    """Python reports an exception in ``__del__`` and goes on; Ctrl-C must end the run all the same, and say nothing else."""
    command = [sys.executable, "-c", DROPPED, "generate", STORY, "--chat", *map(str, LONG)]
    options = {"capture_output": True, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 120}
    done = subprocess.run(command, preexec_fn=_interruptible, **options)
    assert done.returncode == 130
    assert done.stdout.strip()
    assert re.fullmatch(r".+\(interrupted\)\n", without_choice(done.stderr))


def test_interrupt_in_a_chat_stops_the_answer_only():
    process = start("chat", *LONG, stdin=subprocess.PIPE)
    process.stdin.write(b"Tell me a story.\n")
    process.stdin.flush()
    out, err = stop_when_it_writes(process, 20)  # communicate() then closes the input
    assert process.returncode == 0
    assert len(out) >= 20
    assert "(interrupted)" in err


def test_interrupt_at_the_prompt_of_a_chat_exits_with_130():
    process = start("chat", *SUFFIX, "--max-tokens", 3, stdin=subprocess.PIPE)
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    while b"tokens per step" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.3)  # from the summary back to the prompt
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_closed_pipe_is_no_traceback():
    process = start("generate", STORY, *LONG)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) != 0
    assert b"Traceback" not in err
    assert b"Exception" not in err


def test_a_head_of_another_target_needs_force(run):
    head = DATA / "heads" / "eagle"
    given = ("generate", "Tom", "--model", OTHER, "--method", "eagle", "--draft-model", head, "--max-tokens", 8, "--budget", 4)
    code, _, err = run(*given, "--tree", "chain")
    assert code == 1
    assert "trained for 'babyllama-105', and this target has other weights" in err
    assert "hint: give that target, or accept the head with --force" in err
    assert run(*given, "--tree", "chain", "--force")[0] == 0


def test_a_head_names_its_method(run):
    given = ("--model", TARGET, "--draft-model", DATA / "heads" / "hydra", "--max-tokens", 8, "--budget", 4)
    code, out, _ = run("generate", "Tom", *given, "--tree", "topk", "--json")
    assert (code, json.loads(out)["config"]["method"]) == (0, "hydra")
    code, out, err = run("chat", *given, "--method", "hydra-lookup", "--tree", "topk")
    assert (code, out) == (1, "")
    assert "no chat template" in err  # whatever the drafter


@pytest.mark.parametrize("method", ["medusa", "medusa-lookup"])
@pytest.mark.parametrize("given", [(), ("--tree", "chain", "--budget", 2)])
def test_a_head_that_is_not_there(run, monkeypatch, method, given):
    monkeypatch.setattr("foredraft.plan.build.bundled_drafter", lambda name: None)
    code, out, err = run("generate", "Tom", "--method", method, *given)
    assert (code, out) == (1, "")
    assert err.startswith("error: method 'medusa' needs a trained head\nhint: give its directory")
