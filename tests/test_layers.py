"""The import order of design and CONTRIBUTING.md, and the budgets of "Style"."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import foredraft

ROOT = Path(foredraft.__file__).parent

LAYERS = [  # lowest first; rooms of one line may import each other, without a cycle
    {"kernels"},
    {"core"},
    {"cache"},
    {"models", "trees", "rules", "heads"},
    {"drafters"},
    {"engine"},
    {"plan"},
    {"llm", "async_llm"},
    {"train", "theory", "bench", "audit", "importers", "exporters"},
    {"server"},
    {"hosts", "scale"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"]
TREES = {file: ast.parse(file.read_text()) for file in FILES}
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}

MAX_FUNCTION_LINES, MAX_MODULE_LINES, MAX_POSITIONAL = 60, 300, 6


def imported(tree: ast.AST) -> list[str]:
    """What is imported from foredraft, also inside functions, without "foredraft."; the name that is taken included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point to"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    taken = [name.removeprefix("foredraft.") for name in found if name.startswith("foredraft.")]
    return [name for name in taken if not name.startswith("__")]  # the version


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} is in no layer: add it to LAYERS here and to CONTRIBUTING.md"
    for name in (name.split(".")[0] for name in imported(TREES[file])):
        assert name in LEVEL, f"{file.name} imports foredraft.{name}, which is in no layer"
        assert name == part or LEVEL[name] <= LEVEL[part], f"{file.name} imports upwards: foredraft.{name}"


def cycle_of(graph: dict[str, set[str]]) -> list[str] | None:
    """A cycle of a graph; None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def modules_of(names: list[str]) -> set[str]:
    """The modules of imported names: a name is a module, or stands in one."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & MODULES.keys()


def test_imports_have_no_cycle():
    modules = {name: modules_of(imported(TREES[file])) - {name} for name, file in MODULES.items()}
    assert cycle_of(modules) is None
    rooms: dict[str, set[str]] = {}
    for name, others in modules.items():
        room = name.split(".")[0]
        rooms.setdefault(room, set()).update({other.split(".")[0] for other in others} - {room})
    assert cycle_of(rooms) is None


def test__walk_sees_an_import_upwards_and_a_cycle():
    code = "def f():\n    from foredraft.llm import LLM\n    from foredraft import cli"
    assert imported(ast.parse(code)) == ["llm.LLM", "cli"]
    assert modules_of(["llm.LLM", "core.names", "core.names.NAMES", "drafters.DRAFTERS"]) == {"llm", "core.names", "drafters"}
    assert cycle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.AST, inside: ast.AST | None = None) -> Iterator[tuple[Definition, ast.AST | None]]:
    """Every function and class of a module, with what it stands in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            yield node, inside
        yield from definitions(node, node if isinstance(node, Definition) else inside)


def num_positional(function: ast.FunctionDef | ast.AsyncFunctionDef, inside: ast.AST | None) -> int:
    names = [one.arg for one in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (isinstance(inside, ast.ClassDef) and names[:1] in (["self"], ["cls"], ["ctx"]))


def over_budget(tree: ast.AST) -> list[str]:
    """The functions of a module that are too long or take too many parameters."""
    found = []
    for node, inside in definitions(tree):
        if not isinstance(node, ast.ClassDef):
            lines, count = node.end_lineno - node.lineno + 1, num_positional(node, inside)
            found += [f"{node.name}: {lines} lines"] * (lines > MAX_FUNCTION_LINES)
            found += [f"{node.name}: {count} positional parameters"] * (count > MAX_POSITIONAL)
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """The public names of a module that have no docstring; what stands in a function or in a private class is not public."""
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node, inside in definitions(tree):
        hidden = inside is not None and (not isinstance(inside, ast.ClassDef) or inside.name.startswith("_"))
        if not hidden and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(node.name)
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_modules_keep_the_budgets(file):
    assert over_budget(TREES[file]) == []
    assert undocumented(TREES[file]) == []
    length = len(file.read_text().splitlines())
    assert length <= MAX_MODULE_LINES, f"{name_of(file)} has {length} lines: split it by subject"


def test__budgets_see_what_is_over():
    lines = "\n    ".join(["x = 1"] * MAX_FUNCTION_LINES)
    code = '"""m"""\nclass A:\n    def b(self, c, d, e, f, g, h, *, i): ...\nclass _K:\n    def l(self): ...\n'
    code += f"def j(a, b, c, d, e, f, g):\n    {lines}"
    assert over_budget(ast.parse(code)) == ["j: 61 lines", "j: 7 positional parameters"]
    assert undocumented(ast.parse(code)) == ["A", "b", "j"]


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
