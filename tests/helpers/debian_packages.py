"""Tiny Debian packages, built with the real ``dpkg-deb``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_graft.data.debian import DebianPackage
from megatron_graft.files import sha256_of_file

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")


def make_package(directory: Path, files: Mapping[str, str]) -> DebianPackage:
    """Build package ``tiny`` of the given files (path inside the package to text); it lies in ``directory``."""
    root = directory / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: tiny\n"
    )
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    archive = directory / "tiny_1.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(archive)], check=True)
    package = DebianPackage(name="tiny", version="1", sha256=sha256_of_file(archive))
    assert package.archive_name == archive.name
    return package
