"""Imports point to lower groups only, or stay inside a package; the groups are those of CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

import foredraft

ROOT = Path(foredraft.__file__).parent

LAYERS = [  # lowest first; rooms of one line may import each other
    {"kernels", "core"},
    {"cache"},
    {"models", "trees", "rules", "heads"},
    {"drafters"},
    {"engine"},
    {"plan"},
    {"llm"},
    {"train", "theory", "bench", "audit", "importers"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]


def imported(tree: ast.AST) -> list[str]:
    """First parts of what is imported from foredraft, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point to"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "foredraft" else [module]
    return [name.split(".")[1] for name in found if name.startswith("foredraft.")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} is in no layer: add it to LAYERS here and to CONTRIBUTING.md"
    for name in imported(ast.parse(file.read_text())):
        assert name in LEVEL, f"{file.name} imports foredraft.{name}, which is in no layer"
        assert name == part or LEVEL[name] <= LEVEL[part], f"{file.name} imports upwards: foredraft.{name}"


def test__walk_sees_an_import_upwards():
    assert imported(ast.parse("def f():\n    from foredraft.llm import LLM\n    from foredraft import cli")) == ["llm", "cli"]


RESULTS = ("train", "bench", "audit", "theory", "importers")


@pytest.mark.parametrize(
    "file", [file for room in RESULTS for file in sorted((ROOT / room).glob("*.py"))], ids=lambda file: file.name
)
def test_these_rooms_neither_read_a_command_line_nor_draw(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"rich", "typer", "argparse", "click"}, file.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert any(word.arg == "file" for word in node.keywords), f"{file.name} prints; `foredraft.cli` does that"
