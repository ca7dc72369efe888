"""What answers at once: help, tables and every mistake in the options alone load neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
from foredraft.__main__ import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as ended:
    heavy = [name for name in ("torch", "transformers", "scipy") if name in sys.modules]
    print(json.dumps({"code": ended.code, "heavy": heavy}), file=sys.stderr)
"""

QUICK = [
    (0, ["--help"]),
    (0, ["--version"]),
    (0, ["generate", "--help"]),
    (0, ["theory", "--help"]),
    (0, ["methods"]),
    (0, ["methods", "--json"]),
    (2, ["generate", "x", "--nonsense", "3"]),
    (2, ["generate", "x", "--max-tokens", "many"]),
    (2, ["nonsense"]),
    (1, ["generate", "x", "--tree", "dyspek"]),
    (1, ["generate", "x", "--method", "eagel"]),
    (1, ["generate", "x", "--rule", "block", "--tree", "topk"]),
    (1, ["generate", "x", "--budget", "0"]),
    (1, ["generate", "x", "--temperature", "-1"]),
    (1, ["generate", "x", "--speculative-config", "{"]),
    (1, ["generate", "x", "--speculative-config", '{"no_such_key": 1}']),
    (1, ["generate", "x", "--method", "lm", "--tree", "topk", "--speculative-config", '{"topk": 0}']),
    (1, ["generate", "x", "--method", "ngram", "--speculative-config", '{"prompt_lookup_max": 0}']),
    (1, ["generate", "x", "--method", "fspad", "--speculative-config", '{"weight_bits": 5}']),
    (1, ["chat", "--top-p", "2"]),
    (1, ["generate", "x", "--device", "meta"]),
    (1, ["generate", "x", "--generation-config", "nope"]),
    (2, ["generate", "x", "--num-speculative-tokens", "3"]),
    (2, ["generate", "x", "--logprobs", "3"]),
    (1, ["bench", "--methods", "lm:dyspek", "--prompts", "x.jsonl"]),
    (1, ["bench", "--methods", "vllm", "--prompts", "x.jsonl"]),
    (1, ["calibrate", "--method", "eagel"]),
    (1, ["train", "--method", "eagel", "--data", "x.jsonl", "--out", "x"]),
    (1, ["train", "--method", "eagle", "--data", "x.jsonl", "--out", "x", "--temperatures", "a,b"]),
    (1, ["audit", "--tree", "dyspek"]),
]


def probed(arguments: list[str]) -> dict[str, object]:
    command = [sys.executable, "-c", PROBE, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize(("code", "arguments"), QUICK, ids=lambda one: " ".join(one) if isinstance(one, list) else str(one))
def test_answers_without_torch(code: int, arguments: list[str]) -> None:
    assert probed(arguments) == {"code": code, "heavy": []}


def test_the_probe_sees_torch() -> None:
    found = probed(["generate", "x", "--model", "/no/such/directory"])
    assert found["code"] == 1
    assert "torch" in str(found["heavy"])
