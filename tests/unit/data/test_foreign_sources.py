"""Foreign texts: pages of a manual, joined fortunes, this project's own prose; and packages of Debian."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_graft.data.debian import DebianPackage, fetch_debian_package, read_debian_members
from megatron_graft.data.foreign_sources import LARGEST_TEXT, foreign_source, text_of_page
from megatron_graft.errors import CorpusError
from megatron_graft.files import sha256_of_file

PAGE = """<HTML><HEAD><TITLE>Left out</TITLE></HEAD><BODY
><DIV CLASS="NAVHEADER"><TABLE><TR><TD>Prev</TD></TR></TABLE><HR></DIV
><H1>Here   documents</H1><P>A <B>code</B>
  block.</P><PRE>cat &#60;&#60;EOF
  two  spaces
EOF</PRE><DIV CLASS="NAVFOOTER"><A HREF="x">Next</A></DIV></BODY></HTML>"""

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")


def test_a_page_keeps_its_text_and_its_code_and_nothing_else() -> None:
    text = text_of_page(PAGE)
    assert [part.strip() for part in text.split("\n\n") if part.strip()] == [
        "Here documents", "A code block.", "cat <<EOF\n  two  spaces\nEOF",
    ]  # fmt: skip


def test_own_docs_are_prose_of_this_project_and_not_too_much() -> None:
    source = foreign_source("own_docs", Path("unused"))
    documents = list(source.documents())
    assert documents == list(source.documents())
    assert any("longest-suffix" in document.text for document in documents)
    assert sum(len(document.text) for document in documents[:-1]) < LARGEST_TEXT


def test_an_unknown_text_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="own_doc.*email, fortunes, bash_guide, own_docs"):
        foreign_source("own_doc", tmp_path)


def make_package(directory: Path) -> Path:
    """A real package with two texts."""
    root = directory / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: tiny\n"
    )
    (root / "usr" / "share").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "c.dat"):
        (root / "usr" / "share" / name).write_text(f"text of {name}")
    target = directory / "tiny_1.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(target)], check=True)
    return target


@needs_dpkg
def test_members_of_a_package_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    members = list(read_debian_members(make_package(tmp_path), r"usr/share/\w+\.txt"))
    assert members == [("usr/share/a.txt", b"text of a.txt"), ("usr/share/b.txt", b"text of b.txt")]


@needs_dpkg
def test_a_cached_package_must_be_the_pinned_one(tmp_path: Path) -> None:
    archive = make_package(tmp_path)
    pinned = DebianPackage(name="tiny", version="1", sha256=sha256_of_file(archive))
    assert fetch_debian_package(pinned, tmp_path) == archive
    with pytest.raises(CorpusError, match="is not the archive of tiny=1"):
        fetch_debian_package(DebianPackage(name="tiny", version="1", sha256="0" * 64), tmp_path)


@needs_dpkg
def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.deb").write_bytes(b"no archive")
    with pytest.raises(CorpusError, match="is no readable package"):
        list(read_debian_members(tmp_path / "broken.deb", ".*"))


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")
def test_a_version_that_is_not_there_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    missing = DebianPackage(name="no-such-package-here", version="1", sha256="0" * 64)
    with pytest.raises(CorpusError, match="no-such-package-here=1: could not be fetched"):
        fetch_debian_package(missing, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
