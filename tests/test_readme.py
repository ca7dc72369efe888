"""The README's examples are run as they stand, except those after a ``<!-- not tested: reason -->``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foredraft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGE = Path(foredraft.__file__).parent
BLOCK = re.compile(r"(?P<skip><!-- not tested: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


def blocks(language, skipped=False):
    return [one["text"] for one in BLOCK.finditer(README) if one["language"] == language and bool(one["skip"]) is skipped]


def run(command, directory):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


def test_there_is_something_to_run():
    assert len(blocks("python")) >= 3
    assert len(blocks("bash")) >= 1


def test_python_examples(tmp_path):
    done = run([sys.executable, "-c", "\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens per step" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", blocks("bash"), ids=lambda block: block.splitlines()[0][:30])
def test_commands(block, tmp_path):
    done = run(["bash", "-euo", "pipefail", "-c", block], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_untested_blocks_are_still_python():
    for block in blocks("python", skipped=True):
        compile(block, "README.md", "exec")


def test_first_example_is_the_file():
    text = (ROOT / "examples" / "generate.py").read_text()
    assert text.split('"""\n\n', 1)[1] == blocks("python")[0]


def test_batch_example(tmp_path):
    done = run([sys.executable, str(ROOT / "examples" / "batch.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {
        name for text in (README, (ROOT / "CONTRIBUTING.md").read_text()) for name in re.findall(r"\bmake ([a-z]+) ", text)
    }
    named &= set(re.findall(r"make (\w+)", "\n".join([*blocks("bash", skipped=True), makefile])))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in named)


def test_file_tree_names_every_module():
    tree = README[README.index("\nsrc/foredraft/\n") :]
    tree = tree[: tree.index("```")]
    modules = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")]
    missing = [str(one) for one in modules if one.name not in tree and one.name != "__init__.py"]
    assert not missing, f"the README's file tree lacks {missing}"
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {
        file.name for folder in ("src", "tests", "examples", "recipes", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    }
    assert named <= there, f"the README's file tree names files that do not exist: {named - there}"


def test_tables_name_every_method():
    from foredraft import DRAFTERS, GROWERS, RULES

    behind = [name for name, row in DRAFTERS.items() if row.asks]
    assert all(f"`{name}`" in README for name in behind)
    for name in {*DRAFTERS, *GROWERS, *RULES} - {*behind}:
        assert f"| `{name}` |" in README
    for name, row in GROWERS.items():
        [line] = [line for line in README.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 6]
        assert f"| `{row.rule}` |" in line
