"""The source archive and the wheel: built, installed elsewhere, and used from an empty directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache"
)


def run(command: list[str], directory: Path, **environment: str) -> str:
    finished = subprocess.run(
        command,
        cwd=directory,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
    return finished.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source archive, and the wheel built from it: so the archive is known to be complete."""
    scratch = tmp_path_factory.mktemp("packaging")
    shutil.copytree(REPOSITORY, scratch / "checkout", ignore=NOT_SOURCE)
    run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(scratch / "dist")],
        scratch / "checkout",
    )
    (source,) = (scratch / "dist").glob("*.tar.gz")
    (wheel,) = (scratch / "dist").glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel installed into it and nothing else."""
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    run([*pip, "--no-index", "--target", str(target), str(archives[1])], target)
    return target


def test_the_wheel_holds_the_package_and_nothing_beside_it(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"megatron_graft"}
    assert any(name.startswith("megatron_graft/_native.") and name.endswith(".so") for name in names)
    assert "megatron_graft/examples/pretrain_graft_moe.sh" in names
    assert "megatron_graft/examples/slurm/pretrain.sbatch" in names
    assert "megatron_graft/examples/arms/matched_arms.yaml" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    tools = {f"megatron_graft/tools/{file.name}" for file in (REPOSITORY / "tools").glob("*.py")}
    assert tools and tools <= set(names)
    rooms = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "megatron_graft").rglob("*.py")}
    assert rooms <= set(names)


def test_the_source_archive_can_be_tested(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("Makefile", "requirements.lock", "tests/conftest.py", "scripts/find_python.sh", "LICENSE"):
        assert name in names


def test_the_metadata_says_what_the_project_is(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode()
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)
    assert "Requires-Python: >=3.12" in metadata
    assert "Requires-Dist: megatron-core<0.20,>=0.19.2" in metadata


def test_the_installed_extension_loads(installed: Path, tmp_path: Path) -> None:
    program = "import megatron_graft._native as native; print(native.__file__)"
    printed = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(installed))
    assert Path(printed.strip()).is_relative_to(installed)


@pytest.mark.parametrize("tool", ["verify_bank", "build_bank", "preprocess_data", "evaluate"])
def test_an_installed_tool_answers_help(installed: Path, tmp_path: Path, tool: str) -> None:
    command = [sys.executable, "-m", f"megatron_graft.tools.{tool}", "--help"]
    assert "usage:" in run(command, tmp_path, PYTHONPATH=str(installed))


def test_no_installed_file_is_needed_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Import every module of the package with the checkout out of reach."""
    program = """
import importlib, pkgutil, megatron_graft
for found in pkgutil.walk_packages(megatron_graft.__path__, "megatron_graft."):
    if ".tools." not in found.name:
        importlib.import_module(found.name)
import sys
ours = [module.__file__ for name, module in sys.modules.items() if name.startswith("megatron_graft")]
print(*filter(None, ours), sep="\\n")
"""
    files = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(installed)).split()
    assert len(files) > 10
    assert not [file for file in files if not Path(file).is_relative_to(installed)]
