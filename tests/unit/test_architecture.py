"""The package's structure, read from its syntax trees: who may import whom, and how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "megatron_graft"

# Room -> rooms below it. Single files at the package's top count as the room "base".
BASE = {"base"}
BELOW = {
    "base": set(),
    "ngram": BASE,
    "bank": BASE | {"ngram"},
    "lookup": BASE | {"ngram", "bank"},
    "building": BASE | {"ngram", "bank", "lookup"},
    "compat": BASE,
    "data": BASE | {"ngram", "bank", "lookup", "compat"},
    "memory": BASE | {"ngram", "bank", "lookup", "compat", "data"},
    "models": BASE | {"ngram", "bank", "lookup", "compat", "data", "memory"},
    "reporting": BASE | {"ngram", "bank"},
    "experiments": BASE | {"ngram", "bank", "lookup", "building", "compat", "data", "reporting"},
    "jobs": BASE | {"ngram", "bank", "lookup", "building", "compat", "data", "reporting"},
    "training": BASE | {"ngram", "bank", "lookup", "compat", "data", "memory", "models"},
}
NATIVE_USERS = {"lookup", "building", "bank"}  # the rooms that may call the compiled extension
HEAVY = {"torch", "megatron", "transformers", "gguf", "transformer_engine", "apex"}
# The modules of building that meet a model or a Megatron data set, each inside functions only.
LAZY_IN_BUILDING = {
    "donor": {"torch", "transformers"},
    "donor_model": {"torch", "transformers"},
    "gguf_donor": {"torch", "transformers", "gguf"},
    "random_donor": {"torch", "transformers"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def python_files(*directories: str) -> list[Path]:
    return [file for directory in directories for file in sorted((REPOSITORY / directory).rglob("*.py"))]


def room_of(module: str) -> str:
    """``megatron_graft.bank.reader`` -> ``bank``; ``megatron_graft.errors`` -> ``base``."""
    parts = module.split(".")
    if len(parts) > 1 and (parts[1] in BELOW or parts[1] in ("tools", "examples", "_native")):
        return parts[1]
    return "base"


def imports_of(source: str, module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that ``source`` imports, at any depth, as an absolute dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            base = f"{package}{node.module or ''}".rstrip(".")
            yield from ((f"{base}.{name.name}", node) for name in node.names)


def module_of(path: Path) -> str:
    """Dotted name; a package's own file keeps ``.__init__``, so relative imports count from the package."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


def import_faults(source: str, module: str) -> list[str]:
    """What of the import rule ``source``, standing as ``module``, breaks."""
    room, faults = room_of(module), []
    eager_lines = {statement.lineno for statement in _top_level(ast.parse(source))}
    for name, node in imports_of(source, module):
        top = name.split(".")[0]
        where = f"{module}:{node.lineno} imports {name}"
        if top == "megatron_graft":
            target = room_of(name)
            if target == "_native" and room not in NATIVE_USERS:
                faults.append(f"{where}: only {sorted(NATIVE_USERS)} may use the extension")
            elif target not in {"_native", room, *BELOW[room]}:
                faults.append(f"{where}: {room} may import only {sorted(BELOW[room])}")
        elif top in ("tools", "examples", "tests", "scripts"):
            faults.append(f"{where}: nothing in the package imports {top}")
        elif top in HEAVY:
            eager = node.lineno in eager_lines
            faults += [f"{where}: {why}" for why in _heavy_faults(room, module, top, eager)]
    return faults


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported (``if TYPE_CHECKING:`` does not)."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def _heavy_faults(room: str, module: str, top: str, eager: bool) -> Iterator[str]:
    if room in ("base", "ngram", "bank", "lookup", "reporting", "experiments"):
        yield f"{room} runs without {top}"
    if room == "building":
        if top not in LAZY_IN_BUILDING.get(module.split(".")[-1], ()):
            yield f"in building only {sorted(LAZY_IN_BUILDING)} know such libraries"
        elif eager:
            yield "building imports such libraries inside functions only"
    if top in ("apex", "transformer_engine") and room not in ("compat", "models"):
        yield "optional GPU libraries are probed by compat and placed by models"


def size_faults(source: str, name: str) -> list[str]:
    """Files over MAX_FILE_LINES, functions over MAX_FUNCTION_LINES (their docstrings do not count)."""
    lines = source.count("\n")
    faults = [f"{name}: {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{name}:{node.lineno} {node.name}: {length} lines")
    return faults


def test_every_room_is_known() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert rooms <= BELOW.keys(), "a new room needs a place in BELOW"


def test_imports_point_one_way() -> None:
    files = python_files("megatron_graft")
    assert len(files) > 5
    assert not [fault for file in files for fault in import_faults(file.read_text(), module_of(file))]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_graft.ngram.windows", "import torch"),
        ("megatron_graft.bank.reader", "def f():\n    from megatron.core import x"),
        ("megatron_graft.bank.reader", "from megatron_graft.lookup.index import open_index"),
        ("megatron_graft.bank.reader", "from ..lookup import index"),
        ("megatron_graft.lookup.__init__", "from ..building import counting"),
        ("megatron_graft.building.counting", "from megatron_graft import data"),
        ("megatron_graft.building.counting", "def f():\n    import torch"),
        ("megatron_graft.building.donor", "import torch"),
        ("megatron_graft.building.donor", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("megatron_graft.data.tokenizer", "from megatron_graft.training import arguments"),
        ("megatron_graft.models.builder", "from tools import evaluate"),
        ("megatron_graft.models.builder", "from megatron_graft.tools import evaluate"),
        ("megatron_graft.memory.site", "from megatron_graft import _native"),
        ("megatron_graft.memory.site", "import apex"),
        ("megatron_graft.errors", "from megatron_graft.ngram import windows"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert import_faults(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_graft.building.donor", "def f():\n    import torch"),
        ("megatron_graft.building.donor", "if TYPE_CHECKING:\n    import torch"),
        ("megatron_graft.lookup.native", "from megatron_graft import _native"),
        ("megatron_graft.lookup.native", "from . import index\nfrom ..errors import BankError"),
        (
            "megatron_graft.training.arguments",
            "from megatron_graft.models import builder\nimport megatron.core",
        ),
    ],
)
def test_an_allowed_import_is_not_a_fault(module: str, source: str) -> None:
    assert not import_faults(source, module)


def test_the_core_runs_without_torch_and_megatron() -> None:
    program = f"""
import importlib, pkgutil, sys
for room in ("ngram", "bank", "lookup", "building", "reporting"):
    package = importlib.import_module(f"megatron_graft.{{room}}")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
print(*sorted({HEAVY!r} & sys.modules.keys()))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_one_file_names_the_deprecated_model_class() -> None:
    users = {
        module_of(file)
        for file in python_files("megatron_graft")
        for name, _ in imports_of(file.read_text(), module_of(file))
        if name.endswith(".GPTModel")
    }
    assert len(users) <= 1 and all(room_of(module) == "models" for module in users), users


def test_files_and_functions_stay_small() -> None:
    faults = []
    for file in [*python_files("megatron_graft", "tools", "scripts", "tests"), REPOSITORY / "setup.py"]:
        faults += size_faults(file.read_text(), str(file.relative_to(REPOSITORY)))
    for file in sorted((REPOSITORY / "csrc").rglob("*.[ch]*")):
        lines = file.read_text().count("\n")
        if lines > MAX_FILE_LINES:
            faults.append(f"{file.relative_to(REPOSITORY)}: {lines} lines")
    assert not faults, "\n".join(faults)


def test_a_long_file_and_a_long_function_are_found() -> None:
    assert size_faults("x = 1\n" * (MAX_FILE_LINES + 1), "a.py") == [f"a.py: {MAX_FILE_LINES + 1} lines"]
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert not size_faults(f'def f():\n    """One\n    two."""\n{body}', "a.py")
    assert size_faults(f"def f():\n{body}    y = 2\n", "a.py") == [f"a.py:1 f: {MAX_FUNCTION_LINES + 1} lines"]
