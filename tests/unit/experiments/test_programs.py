"""What a record says of the code that a run was trained by."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_graft.experiments import programs


def test_the_commit_is_that_of_the_checkout_that_the_package_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed below another repository has none."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--allow-empty", "-m", "one"], cwd=tmp_path, check=True)
    for package, known in ((tmp_path / "package", True), (tmp_path / "venv" / "lib" / "package", False)):
        package.mkdir(parents=True)
        monkeypatch.setattr(programs, "PACKAGE", package)
        version = programs.code_version()
        assert (version["commit"] is not None, version["changed"]) == (known, False if known else None)


def test_changed_is_what_differs_in_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    monkeypatch.setattr(programs, "PACKAGE", tmp_path / "megatron_graft")
    (tmp_path / "megatron_graft").mkdir()
    (tmp_path / ".venv").symlink_to("elsewhere")
    assert programs.code_version()["changed"] is False
    (tmp_path / "megatron_graft" / "more.py").touch()
    assert programs.code_version()["changed"] is True
