"""Packages of Debian: the pinned archive or none, and files read out of it without installing anything."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from megatron_graft.data.debian import DebianPackage, fetch_debian_package, read_debian_members
from megatron_graft.errors import CorpusError, PlatformError
from tests.helpers.debian_packages import make_package, needs_dpkg

FILES = {f"usr/share/{name}": f"text of {name}" for name in ("b.txt", "a.txt", "c.dat")}


@needs_dpkg
def test_members_of_a_package_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    archive = fetch_debian_package(make_package(tmp_path, FILES), tmp_path)
    members = list(read_debian_members(archive, r"usr/share/\w+\.txt"))
    assert members == [("usr/share/a.txt", b"text of a.txt"), ("usr/share/b.txt", b"text of b.txt")]


@needs_dpkg
def test_a_cached_package_must_be_the_pinned_one(tmp_path: Path) -> None:
    package = make_package(tmp_path, FILES)
    with pytest.raises(CorpusError, match="is not the archive of tiny=1"):
        fetch_debian_package(dataclasses.replace(package, sha256="0" * 64), tmp_path)


@needs_dpkg
def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.deb").write_bytes(b"no archive")
    with pytest.raises(CorpusError, match="is no readable package"):
        list(read_debian_members(tmp_path / "broken.deb", ".*"))


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")
@needs_dpkg
def test_a_version_that_is_not_there_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    missing = DebianPackage(name="no-such-package-here", version="1", sha256="0" * 64)
    with pytest.raises(CorpusError, match=r"no-such-package-here=1: could not be fetched[\s\S]*Leave this text out"):
        fetch_debian_package(missing, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@needs_dpkg
def test_only_a_download_needs_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path, FILES)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "dpkg-deb").symlink_to(str(shutil.which("dpkg-deb")))
    monkeypatch.setenv("PATH", str(programs))
    assert fetch_debian_package(package, tmp_path).is_file()
    with pytest.raises(PlatformError, match="apt-get.*tiny=1"):
        fetch_debian_package(package, tmp_path / "empty")
