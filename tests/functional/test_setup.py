"""Setting up: which Python is chosen, an environment shared by checkouts, and what is said on failure."""

from __future__ import annotations

import ensurepip
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAMP = ".megatron-graft-requirements"


def make_checkout(directory: Path, lock: str) -> Path:
    """A checkout with nothing but the setup scripts and a lock."""
    shutil.copytree(REPOSITORY / "scripts", directory / "scripts")
    (directory / "requirements.lock").write_text(lock)
    return directory


@pytest.fixture
def lock() -> str:
    """A lock that a fresh environment already satisfies: nothing is fetched."""
    return f"# build\npip=={ensurepip.version()}\n"


def start_setup(checkout: Path, environment: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "scripts/setup_environment.py", str(environment)],
        cwd=checkout,
        env=os.environ | {"PIP_NO_INDEX": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def set_up(checkout: Path, environment: Path) -> tuple[int, str]:
    process = start_setup(checkout, environment)
    output = process.communicate(timeout=120)[0]
    return process.returncode, output


def find_python(path: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the search where ``path`` holds the only Pythons on PATH, and nobody's home any other."""
    for name in ("bash", "cat", "env", "find", "sed", "sort"):
        (path / name).symlink_to(shutil.which(name) or name)
    variables = {"PATH": str(path), "HOME": str(home)} | environment
    return subprocess.run([str(REPOSITORY / "scripts/find_python.sh")], env=variables, capture_output=True, text=True)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_two_checkouts_may_set_up_one_environment_at_once(tmp_path: Path, lock: str) -> None:
    checkouts = [make_checkout(tmp_path / name, lock) for name in ("first", "second")]
    environment = tmp_path / "shared" / "venv"
    processes = [start_setup(checkout, environment) for checkout in checkouts]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "".join(outputs).count("setup: creating") == 1
    assert "".join(outputs).count("setup: installing") == 1
    assert (environment / STAMP).read_text().strip() == hashlib.sha256(lock.encode()).hexdigest()
    assert set_up(checkouts[0], environment) == (0, "")  # nothing left to do, nothing said


def test_a_changed_lock_is_installed_and_a_failed_install_leaves_no_stamp(tmp_path: Path, lock: str) -> None:
    checkout = make_checkout(tmp_path / "checkout", lock)
    environment = tmp_path / "venv"
    assert set_up(checkout, environment)[0] == 0
    (checkout / "requirements.lock").write_text(lock + "no-such-package-anywhere==1.0\n")
    status, output = set_up(checkout, environment)
    assert status == 1
    assert "error: pip could not install requirements.lock" in output
    assert "no-such-package-anywhere" in output.split("error:")[1]
    assert not (environment / STAMP).exists()


def test_an_environment_whose_creation_was_cut_short_is_completed(tmp_path: Path, lock: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    status, output = set_up(make_checkout(tmp_path / "checkout", lock), tmp_path / "venv")
    assert status == 0, output
    assert (tmp_path / "venv" / STAMP).exists()


def test_an_environment_whose_python_is_gone_is_named(tmp_path: Path, lock: str) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "removed")
    status, output = set_up(make_checkout(tmp_path / "checkout", lock), tmp_path / "venv")
    assert status == 1
    assert f"{tmp_path / 'venv'}: its Python ({tmp_path / 'removed'}) is gone" in output


def test_an_environment_of_another_python_is_refused(tmp_path: Path, lock: str) -> None:
    executable(tmp_path / "venv/bin/python", "#!/bin/sh\necho 3 9\n")
    status, output = set_up(make_checkout(tmp_path / "checkout", lock), tmp_path / "venv")
    assert status == 1
    assert "made with Python 3.9, but 3.12 or 3.13 is needed" in output


def test_an_unusable_python_is_passed_over_for_one_under_pyenv(tmp_path: Path) -> None:
    for name in ("python3", "python3.12", "python3.13"):  # like pyenv's shims of versions not selected
        executable(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    under_pyenv = tmp_path / "pyenv/versions/3.12.9/bin/python3"
    under_pyenv.parent.mkdir(parents=True)
    under_pyenv.symlink_to(Path(sys.executable).resolve())
    found = find_python(tmp_path / "bin", tmp_path / "nobody", PYENV_ROOT=str(tmp_path / "pyenv"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(under_pyenv)


def test_no_python_at_all_says_what_to_install(tmp_path: Path) -> None:
    for name in ("python3", "python3.12", "python3.13"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\nexit 1\n")
    found = find_python(tmp_path / "bin", tmp_path / "nobody")
    assert found.returncode == 1
    assert found.stdout == ""
    for part in ("Python 3.12 or 3.13", "apt-get install", "pyenv install 3.12", "PYTHON=<path>"):
        assert part in found.stderr


def test_a_missing_compiler_says_what_to_install(tmp_path: Path) -> None:
    for name in ("bash", "cat"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    script = str(REPOSITORY / "scripts/require_compiler.sh")
    finished = subprocess.run(
        ["bash", script], env={"PATH": str(tmp_path), "CXX": "absent"}, capture_output=True, text=True
    )
    assert finished.returncode == 1
    assert "no C++ compiler found" in finished.stderr and "apt-get install g++" in finished.stderr


def test_the_environment_satisfies_the_lock_and_the_lock_the_declarations() -> None:
    """`make lock` would change nothing: all requirements and what they need are pinned, as tested here."""
    command = [sys.executable, "scripts/lock_requirements.py", "check"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
