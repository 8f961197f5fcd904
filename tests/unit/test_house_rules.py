"""Rules about the repository's files as a whole: what no file may name, and which files must agree."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MAX_BYTES = 500_000
LARGER = {
    "docs/results/matched-arms/runs.jsonl": 2_250_000,  # a line a run, from which its report can be made again
    "docs/results/matched-arms/summary.json": 1_650_000,  # every figure of the report, by an address
}
# Spelled in pieces, so that this file passes its own rules.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.])/(?:" + "|".join(("work", "farm", "root", "home")) + ")/",
    "a package registry's host": r"pypi\." + r"org|pythonhosted\." + r"org|registry\.npmjs|deb\.debian\." + "org",
    "a registry option": r"index[-_]" + r"url|--registry[ =]|trusted-" + "host|find-" + "links",
    "work left for later": r"\b(?:"
    + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    + r")\b|NotImplemented"
    + "Error",
}


def repository_files() -> list[Path]:
    """Every file that is or could be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    assert len(files) > 20
    return [file for file in files if file.is_file()]


def text_of(path: Path) -> str | None:
    """A file's text; None for binary files."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def forbidden_in(text: str, rule: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.search(FORBIDDEN[rule], line)]


def lock() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def setup_strings() -> list[str]:
    """Every string constant of setup.py: its requirements are among them."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_no_file_holds(rule: str) -> None:
    found = [
        f"{file.relative_to(REPOSITORY)}: {line[:120]}"
        for file in repository_files()
        if file.name != "LICENSE" and (text := text_of(file)) is not None
        for line in forbidden_in(text, rule)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("a path of one machine", "data = '/" + "root/corpus'"),
        ("a package registry's host", "fetch https://pypi." + "org/simple"),
        ("a registry option", "pip install --extra-index-" + "url x"),
        ("work left for later", "# TO" + "DO: write"),
    ],
)
def test_a_planted_fault_is_found(rule: str, text: str) -> None:
    assert forbidden_in(text, rule)


@pytest.mark.parametrize("text", ["https://docs/work/x", "./root/x", "the work / home page", "chown graft /workspace"])
def test_ordinary_text_is_no_machine_path(text: str) -> None:
    assert not forbidden_in(text, "a path of one machine")


def test_no_large_file() -> None:
    sizes = {str(file.relative_to(REPOSITORY)): file.stat().st_size for file in repository_files()}
    assert not [file for file, size in sizes.items() if size > LARGER.get(file, MAX_BYTES)]


def test_the_package_called_apex_is_never_required() -> None:
    # The registry's package of that name is another project; NVIDIA's is probed by symbol.
    assert "apex" not in lock()
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    declared = [*setup_strings(), *pyproject["build-system"]["requires"]]
    declared += [text for group in pyproject["dependency-groups"].values() for text in group]
    assert "psutil" in declared
    assert not [text for text in declared if re.match(r"apex\b", text)]
    for name in ("Dockerfile", "Makefile"):
        assert not re.search(r"\binstall\b.*\bapex\b", (REPOSITORY / name).read_text()), name


def test_the_lock_pins_exact_versions_only() -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {"torch", "megatron-core", "pybind11", "transformers", "pytest"} <= lock().keys()
    assert not [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line)]
    assert len(pins) == len(lock()), "a package is pinned twice"


def test_the_licence_is_apache_2() -> None:
    assert "Apache License\n                           Version 2.0" in (REPOSITORY / "LICENSE").read_text()
    assert "Apache-2.0" in setup_strings()


def test_versions_agree() -> None:
    source = (REPOSITORY / "megatron_graft/__init__.py").read_text()
    version = re.search(r'__version__ = "(\d+\.\d+\.\d+)"', source)
    assert version, "no __version__"
    headings = re.findall(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == version[1], "the newest release in CHANGELOG.md is not the package's version"


def test_python_versions_agree() -> None:
    tools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]
    assert ">=3.12" in setup_strings()
    assert tools["ruff"]["target-version"] == "py312"
    assert tools["mypy"]["python_version"] == "3.12"
    assert "(3, 12) <= sys.version_info[:2]" in (REPOSITORY / "scripts/find_python.sh").read_text()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("README.md", ["make pretrain", "make test", "GPU"]),
        ("CONTRIBUTING.md", ["make test", "make check", "VENV"]),
        ("CHANGELOG.md", ["Keep a Changelog", "### Added"]),
        ("docs/architecture.md", ["SuffixIndex", "MicroBatchMemory"]),
    ],
)
def test_the_documents_are_there(name: str, parts: list[str]) -> None:
    text = (REPOSITORY / name).read_text()
    assert not [part for part in parts if part not in text]


def test_documents_name_only_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    faults = []
    for document in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("**/*.md")]:
        text = document.read_text()
        named = re.findall(r"`make ([a-z-]+)|^\s*make ([a-z-]+)", text, re.MULTILINE)
        faults += [f"{document.name}: make {a or b}" for a, b in named if (a or b) not in targets]
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
            if not (document.parent / link).exists():
                faults.append(f"{document.name}: link to {link}")
    assert not faults, "\n".join(faults)


def test_every_make_target_is_documented_or_internal() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in (
        "pretrain",
        "pretrain-baseline",
        "test",
        "check",
        "format",
        "native",
        "wheel",
        "clean",
        "lock",
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"make {target} " in shown


def test_scripts_can_be_executed() -> None:
    for name in (".ci/run", "scripts/find_python.sh", "scripts/require_compiler.sh"):
        assert (REPOSITORY / name).stat().st_mode & 0o111, name
