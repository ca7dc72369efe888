"""The README and the pages of docs: their examples run as they stand, except those after a ``<!-- not tested: reason -->``;
their links resolve; they stay short; and the map of files names every module."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foredraft

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted(DOCS.rglob("*.md"))]
OTHERS = [ROOT / "src/foredraft/bundled/README.md", ROOT / "tests/data/README.md"]
PACKAGE = Path(foredraft.__file__).parent
BLOCK = re.compile(r"(?P<skip><!-- not tested: [^\n]+ -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MAX_LINES, MAX_WIDTH, MAX_WORDS = 150, 130, 1800


def blocks(language, skipped=False, page=README):
    found = BLOCK.finditer(page.read_text())
    return [block["text"] for block in found if block["language"] == language and bool(block["skip"]) is skipped]


def said(page):
    return str(page.relative_to(ROOT))


def prose(page):
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text())


def with_blocks(language):
    return [page for page in PAGES if blocks(language, page=page)]


def run(command, directory):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


def test_there_is_something_to_run():
    assert blocks("python") and blocks("bash")
    assert sum(len(blocks("python", page=page)) for page in PAGES) >= 7
    assert sum(len(blocks("bash", page=page)) for page in PAGES) >= 5


@pytest.mark.parametrize("page", with_blocks("python"), ids=said)
def test_python_examples(page, tmp_path):
    done = run([sys.executable, "-c", "\n".join(blocks("python", page=page))], tmp_path)
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout) is ("print(" in page.read_text())
    assert not list(tmp_path.iterdir())
    if page is README:
        *shown, figures = next(block for block in blocks("text") if "tokens in" in block).splitlines()
        *printed, last = done.stdout.splitlines()
        assert printed == shown
        assert all(re.fullmatch(r"\d+ tokens in \d+ steps", line) for line in (figures, last))


@pytest.mark.parametrize("page", with_blocks("bash"), ids=said)
def test_commands(page, tmp_path):
    for block in blocks("bash", page=page):
        done = run(["bash", "-euo", "pipefail", "-c", block], tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=said)
def test_untested_blocks_are_still_python(page):
    for block in blocks("python", skipped=True, page=page):
        compile(block, str(page), "exec")


def test_first_example_is_the_file():
    text = (ROOT / "examples" / "generate.py").read_text()
    assert text.split('"""\n\n', 1)[1] == blocks("python")[0]


def test_batch_example(tmp_path):
    done = run([sys.executable, str(ROOT / "examples" / "batch.py")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b", page.read_text())}
    named &= set(re.findall(r"make (\w+)", "\n".join([*blocks("bash", skipped=True), makefile])))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in named)


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert max(map(len, text.splitlines())) <= MAX_WIDTH
    assert len(text.split()) <= MAX_WORDS


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=said)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) <= MAX_LINES


def anchors(page):
    """What GitHub makes of the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page):
    """Relative links of a page: the file, and the anchor in it."""
    for target in LINK.findall(prose(page)):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            yield (page.parent / file).resolve() if file else page, anchor


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=said)
def test_links_resolve(page):
    for file, anchor in links(page):
        assert file.exists(), f"{said(page)} links to {file}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{said(page)} links to #{anchor}, which is no heading of {said(file)}"


def test_every_page_can_be_reached_from_the_index():
    reached, waiting = set(), [DOCS / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [file for file, _ in links(page) if file.suffix == ".md" and file.is_relative_to(DOCS)]
    missing = {said(page) for page in set(DOCS.rglob("*.md")) - reached}
    assert not missing, f"docs/README.md does not lead to {missing}"


def test_the_page_on_slow_tests_names_every_file_that_has_some():
    marked = {said(file) for file in (ROOT / "tests").glob("test_*.py") if re.search(r"\bmark\.slow\b", file.read_text())}
    assert marked == set(re.findall(r"^\| `(tests/\w+\.py)` \|", (DOCS / "slow-tests.md").read_text(), re.M))


NAMED = re.compile(r"\b(?:benchmarks|docs|examples|recipes|src|tests)/[\w./-]+\.(?:c|jsonl?|md|png|py|svg)\b")


def files_that_name_others():
    written = [
        file for folder in ("src", "tests", "benchmarks", "recipes", "examples") for file in (ROOT / folder).rglob("*.py")
    ]
    return [*PAGES, *OTHERS, *written]


def test_files_that_are_named_exist():
    for file in files_that_name_others():
        missing = {name for name in NAMED.findall(file.read_text()) if not (ROOT / name).exists()}
        assert not missing, f"{said(file)} names {missing}"


def file_tree(page):
    text = page.read_text()
    text = text[text.index("\nsrc/foredraft/") :]
    return text[: text.index("```")]


def test_file_tree_names_every_module():
    tree = file_tree(CONTRIBUTING)
    modules = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    missing = [str(module) for module in modules if module.name not in named and module.name != "__init__.py"]
    assert not missing, f"the file tree of CONTRIBUTING.md lacks {missing}"
    there = {
        file.name for folder in ("src", "tests", "examples", "recipes", "benchmarks") for file in (ROOT / folder).rglob("*.py")
    }
    assert named <= there, f"the file tree of CONTRIBUTING.md names files that do not exist: {named - there}"


def test_folder_map_names_every_folder():
    tree = file_tree(README)
    inner = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name != "__pycache__"}
    outer = {folder.name for folder in ROOT.iterdir() if (folder / ".").is_dir() and list(folder.glob("*.py"))} | {"docs"}
    missing = {name for name in inner | outer if not re.search(rf"\b{name}/", tree)}
    assert not missing, f"the README's map of folders lacks {missing}"


def test_tables_name_every_method():
    from foredraft import DRAFTERS, GROWERS, RULES

    text = (DOCS / "methods.md").read_text()
    behind = [name for name, row in DRAFTERS.items() if row.asks]
    assert all(f"`{name}`" in text for name in behind)
    for name in {*DRAFTERS, *GROWERS, *RULES} - {*behind}:
        assert f"| `{name}` |" in text
    for name, row in GROWERS.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 6]
        assert f"| `{row.rule}` |" in line
    assert all(f"`{name}`" in README.read_text() for name in {*DRAFTERS} - {*behind})
