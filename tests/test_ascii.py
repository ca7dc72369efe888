"""Terminals that know ASCII alone: output is written with escapes, and nothing breaks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foredraft import LLM
from foredraft.__main__ import main
from foredraft.cli import show

DATA = Path(__file__).parent / "data"
MODEL = str(DATA / "babyllama-105")
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process on streams of an encoding: exit code, standard output, standard error."""

    def call(*arguments: Any, encoding: str = "ascii", stdin: bytes = b"") -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding, errors="strict"))
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)  # type: ignore[attr-defined]
        assert "Traceback" not in err and "UnicodeEncodeError" not in err
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def accents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes nothing but accents."""
    load = LLM.__init__

    def loaded(self: Any, *given: Any, **more: Any) -> None:
        load(self, *given, **more)
        monkeypatch.setattr(self.tokenizer, "decode", lambda ids, **options: "é" * len(ids))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)

        class Writes:
            def decode(self, ids: Any, **options: Any) -> str:
                return "é" * len(ids)

            def __getattr__(self, name: str) -> Any:
                return getattr(backend, name)

        if "backend_tokenizer" in vars(self.tokenizer):
            monkeypatch.setattr(self.tokenizer, "backend_tokenizer", Writes())
        elif backend is not None:
            monkeypatch.setattr(type(self.tokenizer), "backend_tokenizer", Writes(), raising=False)

    monkeypatch.setattr(LLM, "__init__", loaded)


GENERATE = ["generate", "Once", "--model", MODEL, "--draft-model", MODEL, "--tree", "topk", "--budget", "4"]
SHORT = ["--max-tokens", "12", "--temperature", "0", "--ignore-eos"]


@pytest.mark.parametrize(("encoding", "letter"), [("ascii", "\\xe9"), ("latin-1", "é"), ("utf-8", "é"), ("cp437", "é")])
def test_text_that_cannot_be_shown_is_escaped(run: Run, accents: None, encoding: str, letter: str) -> None:
    code, out, err = run(*GENERATE, *SHORT, "--show-tree", encoding=encoding)
    assert code == 0 and "12 tokens" in err
    assert letter * 12 in out
    assert "(root)" in out
    assert ("✓" in out) == (encoding == "utf-8")
    assert encoding == "utf-8" or "* " in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_stays_json(run: Run, accents: None, encoding: str) -> None:
    code, out, err = run(*GENERATE, *SHORT, "--json", encoding=encoding)
    assert (code, err) == (0, "")
    assert json.loads(out)["text"] == "é" * 12


@pytest.mark.parametrize(
    "arguments",
    [
        ["methods"],
        ["methods", "--json"],
        ["--help"],
        ["generate", "--help"],
        ["theory", "batch", "--p", "0.5,0.5", "--q", "0.8,0.2", "--horizon", "3", "--drafts", "2"],
        ["theory", "tradeoff", "--p", "0.5,0.5", "--q", "0.8,0.2"],
    ],
)
def test_tables_and_help(run: Run, arguments: list[str]) -> None:
    code, out, _ = run(*arguments)
    assert code == 0 and out


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "Once", "--model", "modèle-é"],
        ["doctor", "tête"],
        ["generate", "Once", "--method", "méthode"],
        ["bench", "--methods", "suffix", "--prompts", "été.md"],
        ["généré"],
        ["generate", "Once", "--model", "caf\udce9"],
    ],
)
def test_errors_that_name_what_was_given(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code in (1, 2) and out == ""
    assert ("error: " in err and "\\x" in err) or "\\ud" in err


def test_a_conversation(run: Run) -> None:
    """A question that is no ASCII is not understood there, which is said; the answers are written."""
    code, _, err = run("chat", "--method", "ar", *SHORT, stdin=b"Hello\n/exit\n")
    assert code == 0 and "12 tokens" in err
    code, _, err = run("chat", "--method", "ar", *SHORT, stdin="é\n/exit\n".encode())
    assert code == 1 and "error: standard input is not text in ascii" in err and "hint: " in err
    code, _, err = run("generate", "-", "--model", MODEL, "--method", "ar", stdin="é".encode())
    assert code == 1 and "error: standard input is not text in ascii" in err


def test_a_process_of_its_own() -> None:
    """As a terminal without a locale starts it; the argument comes as bytes that no encoding was found for."""
    command = [sys.executable, "-m", "foredraft", "generate", b"caf\xc3\xa9", "--model", MODEL, "--method", "ar"]
    done = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, check=False)
    assert done.returncode == 1 and done.stdout == b""
    assert b"error: the prompt is not valid text: character 4 is the lone surrogate U+DCC3" in done.stderr
    assert b"hint: Give the text in UTF-8; on the command line, set a UTF-8 locale" in done.stderr


ENCODINGS = [("utf-8", True), ("UTF-16", True), ("ascii", False), ("cp437", False), (None, False)]


@pytest.mark.parametrize(("encoding", "speaks"), ENCODINGS)
def test_speaks_unicode(encoding: str | None, speaks: bool) -> None:
    class Stream:
        pass

    stream = Stream()
    stream.encoding = encoding  # type: ignore[attr-defined]
    assert show.speaks_unicode(stream) is speaks
