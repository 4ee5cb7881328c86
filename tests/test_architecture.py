"""The direction of imports, read from the source: design rules that no single file shows."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparsity
from tests.processes import PATIENCE

pytestmark = pytest.mark.script

ROOT = Path(__file__).resolve().parent.parent
# Which of our packages each package may import.
ALLOWED = {
    "configs": {"configs"},
    "sparsity": {"sparsity"},
    "pruners": {"pruners", "sparsity"},
    "models": {"models", "sparsity"},
    "datasets": {"datasets", "configs"},
    "engine": {"engine", "configs", "datasets", "sparsity"},
}
# What everything may import: the one writer of files, and the errors that are the user's.
BOTTOM = {"sparsity.files", "sparsity.errors"}
FACADES = {"sparsity", "sparsity.maskllm", "sparsity.utils"}  # names of the public code
LIBRARIES_OF_SPARSITY = {"torch", "numpy", "safetensors"}
FILES = {path: package for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
CODE = [*FILES, *sorted(ROOT.glob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, inside_functions: bool = False) -> Iterator[str]:
    """The modules that a file imports at run time: at its top level, or inside its functions."""
    yield from _imports(ast.parse(path.read_text()), path, inside_functions, False)


def _imports(node: ast.AST, path: Path, wanted: bool, inside: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import) and inside == wanted:
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and inside == wanted:
            assert child.level == 0, f"{path}: relative import"
            for alias in child.names:
                module = f"{child.module}.{alias.name}"
                is_module = (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
                yield module if is_module else child.module
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, path, wanted, inside or function)


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_import_only_what_is_below_them(path):
    for inside_functions in (False, True):
        for module in imports(path, inside_functions):
            allowed = top(module) not in ALLOWED or top(module) in ALLOWED[FILES[path]] or module in BOTTOM
            assert allowed, f"imports {module}"
            assert top(module) not in SCRIPTS, f"imports the script {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_our_own_packages_are_imported_at_the_top(path):
    inside = [module for module in imports(path, inside_functions=True) if top(module) in ALLOWED]
    assert not inside, "only optional heavy packages are imported inside functions"


@pytest.mark.parametrize("path", [path for path, package in FILES.items() if package == "sparsity"], ids=name_of)
def test_sparsity_needs_torch_numpy_and_safetensors_only(path):
    for inside_functions in (False, True):
        for module in imports(path, inside_functions):
            assert top(module) in sys.stdlib_module_names | LIBRARIES_OF_SPARSITY | {"sparsity"}, f"imports {module}"


def test_there_are_no_cycles():
    graph = {name_of(path): set(imports(path)) for path in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the cycle


def test_there_are_no_cycles_between_folders():
    """A folder's own files and those of the folders inside it are different nodes."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if name_of(path) not in FACADES:
            folder = ".".join(path.relative_to(ROOT).parts[:-1])
            modules = {module for module in imports(path) if top(module) in ALLOWED} - BOTTOM
            graph.setdefault(folder, set()).update({_folder(module) for module in modules} - {folder})
    TopologicalSorter(graph).prepare()


def _folder(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return module if path.is_dir() else module.rpartition(".")[0]


def test_nothing_imports_a_facade():
    """Facades keep names that the public code has; they gather from the rooms below them."""
    for path in CODE:
        if name_of(path) not in FACADES:
            assert not FACADES & set(imports(path)), name_of(path)


def test_rooms_are_small():
    for folder in {path.parent for path in FILES if path.parent.name != "pruners"}:
        assert len(list(folder.glob("*.py"))) - 1 <= 12, f"{folder.relative_to(ROOT)}: more than 12 files"
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, f"{name_of(path)}: more than 400 lines"
    for path in ROOT.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 130, f"{path.name}: more than 130 lines"


def test_functions_live_with_the_noun_that_they_serve():
    assert {name_of(path) for path in FILES if path.stem in ("utils", "helpers", "common")} <= {"sparsity.utils"}


def test_python_entry_points_live_at_the_root():
    for folder in ("scripts", "data", "images"):
        assert not list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_the_import_system_is_left_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            assert node.attr not in ("path", "modules"), f"line {node.lineno} touches sys.{node.attr}"


@pytest.mark.parametrize("path", [*CODE, *sorted((ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_docstrings_say_what_a_thing_does(path):
    """They begin with a verb or a noun, not with a clause that leaves both to the reader."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").split()[:1]
            assert first not in (["What"], ["Of"]), f"line {node.body[0].lineno} begins with {first[0]}"


@pytest.mark.parametrize("ours_first", [True, False])
def test_our_names_and_the_libraries_live_together(ours_first):
    """`datasets` and `models` are names that others use too: importing either side first breaks neither."""
    ours = ["datasets.bundled.scenes", "models.xvlm.model", "engine.pruning.run", "pruners.multiflow", "sparsity.masks"]
    theirs = ["transformers.models.clip.modeling_clip", "timm", "lightning", "torchvision"]
    order = ours + theirs if ours_first else theirs + ours
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "import datasets; assert hasattr(datasets.bundled.scenes, 'draw_scene')"
    subprocess.run([sys.executable, "-c", code, *order], check=True, timeout=PATIENCE)


def test_every_public_name_of_sparsity_loads():
    assert sorted(sparsity.__all__) == sparsity.__all__
    for name in sparsity.__all__:
        assert getattr(sparsity, name) is not None
    assert {*sparsity._HOMES, *sparsity._MODULES} == set(sparsity.__all__)
