"""Files of prompts: what is none is refused by every command that takes one, with what such a file looks like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from foredraft.bench.tasks import read_prompts

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
MODEL, OTHER = str(DATA / "babyllama-105"), str(DATA / "babyllama-105-b")

COMMANDS = {
    "bench": ["bench", "--methods", "suffix::4"],
    "audit": ["audit", "--method", "suffix", "--budget", "4"],
    "calibrate": ["calibrate", "--method", "suffix"],
    "predict": ["theory", "predict"],
    "estimate": ["theory", "estimate", "--output", "laws.json"],
}
LOOKS = 'hint: Give a .jsonl file with one object a line, such as {"prompt": "..."} or {"messages": [...]}, or a .txt file'


@pytest.mark.parametrize("command", COMMANDS)
def test_a_readme_is_no_file_of_prompts(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to find out."""
    monkeypatch.setattr("foredraft.models.parts.load_target", lambda *given, **more: pytest.fail("it was loaded"))
    code, out, err = run(*COMMANDS[command], "--prompts", ROOT / "README.md", "--model", MODEL)
    assert (code, out) == (1, "")
    assert "README.md' is neither a .jsonl nor a .txt file\n" in err and LOOKS in err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("prompts.json", b'[{"prompt": "a"}]', "is neither a .jsonl nor a .txt file"),
        ("prompts", b"a\n", "is neither a .jsonl nor a .txt file"),
        ("prompts.csv", b"prompt\na\n", "is neither a .jsonl nor a .txt file"),
        ("model.txt", b"\x80\x81\xff\xfe", "is not text in UTF-8"),
        ("model.jsonl", b"\x93NUMPY\x01\x00", "is not text in UTF-8"),
        ("zeros.txt", b"\0\0\0\0", "is not text, since it contains null bytes"),
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n \n\n", "is empty"),
    ],
)
def test_files_that_hold_no_prompts(name: str, content: bytes, said: str, tmp_path: Path, run: Run) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    code, out, err = run(*COMMANDS["bench"], "--prompts", file, "--model", MODEL)
    assert (code, out) == (1, "")
    assert said in err and LOOKS in err


@pytest.mark.parametrize("path", [".", "missing.txt"])
def test_what_is_no_file(path: str, run: Run) -> None:
    code, _, err = run(*COMMANDS["audit"], "--prompts", path, "--model", MODEL)
    assert code == 1 and "is not a file" in err and LOOKS in err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 5}, "prompt must be a text, got 5"),
        ({"prompt": ["a"]}, "prompt must be a text, got ['a']"),
        ({"prompt": " "}, "prompt must be a text, got ' '"),
        ({"question": {"text": "a"}}, "question must be a text, got {'text': 'a'}"),
        ({"turns": "abc"}, "turns must be a list of texts, got 'abc'"),
        ({"turns": [{"role": "user"}]}, "turns must be a list of texts, got [{'role': 'user'}]"),
        (
            {"messages": "hello"},
            "a conversation is a list of messages such as [{'role': 'user', 'content': 'Hello'}], got 'hello'",
        ),
        ({"messages": ["hello"]}, "message 1 must be a dict such as"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"prompt": "a\ud800"}, "prompt is not valid text: character 2 is the lone surrogate U+D800"),
        ({"answer": "a"}, "no prompt. Each line needs one of the keys messages, turns, question, prompt, text"),
        ([1], "no prompt. Each line needs one of the keys"),
    ],
)
def test_records_that_are_none(row: Any, said: str, tmp_path: Path) -> None:
    """The line is that of the file, also where only some of its lines are read."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n" + json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    for limit in (None, 2):
        with pytest.raises(ValueError) as caught:
            read_prompts(file, limit)
        assert str(caught.value).startswith(f"{file}, line 3: {said}")


@pytest.mark.parametrize("text", ["{", "prompt", "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_lines_that_are_no_json(text: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"line 1: not JSON \(.*Each line of a .jsonl file is one JSON object"):
        read_prompts(file)


def test_what_is_read(tmp_path: Path) -> None:
    """With the byte order mark and the line ends of Windows, an unusual ending, and a line separator within a text."""
    text = tmp_path / "PROMPTS.TXT"
    text.write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\r\n".encode())
    assert read_prompts(text) == ["one", "two\u2028still two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_bytes(('\ufeff{"prompt": "one"}\r\n' + json.dumps({"text": "two\u2028still"}, ensure_ascii=False)).encode())
    assert read_prompts(lines) == ["one", "two\u2028still"]
