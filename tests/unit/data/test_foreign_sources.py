"""Foreign texts: pages of a manual, joined fortunes, this project's own prose."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_graft.data import foreign_sources
from megatron_graft.data.foreign_sources import LARGEST_TEXT, foreign_source, text_of_page
from megatron_graft.errors import CorpusError
from tests.helpers.debian_packages import make_package, needs_dpkg

PAGE = """<HTML><HEAD><TITLE>Left out</TITLE></HEAD><BODY
><DIV CLASS="NAVHEADER"><TABLE><TR><TD>Prev</TD></TR></TABLE><HR></DIV
><H1>Here   documents</H1><P>A <B>code</B>
  block.</P><PRE>cat &#60;&#60;EOF
  two  spaces
EOF</PRE><DIV CLASS="NAVFOOTER"><A HREF="x">Next</A></DIV></BODY></HTML>"""


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


@needs_dpkg
def test_fortunes_of_one_file_are_joined_to_documents_of_some_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sayings = [f"Saying {number}: " + "so it goes, " * 20 for number in range(30)]
    there = "usr/share/games/fortunes/"
    texts = "\n%\n".join(sayings)
    files = {there + "wise": texts, there + "wise.dat": texts, there + "wise.u8": texts, there + "off/rude": texts}
    monkeypatch.setattr(foreign_sources, "FORTUNES", make_package(tmp_path, files))
    documents = sorted(foreign_source("fortunes", tmp_path).documents(), key=lambda document: document.id)
    assert [document.id for document in documents] == ["wise-0", "wise-1", "wise-2", "wise-3"]
    assert "\n\n".join(document.text for document in documents) == "\n\n".join(map(str.strip, sayings))
    assert all(2000 <= len(document.text) < 2500 for document in documents[:-1])


@needs_dpkg
def test_every_page_of_the_guide_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {f"usr/share/doc/abs-guide/html/{name}.html": PAGE.replace("block", f"{name} " * 80) for name in "ab"}
    pages["usr/share/doc/abs-guide/html/links.html"] = PAGE  # too short to be worth reading
    monkeypatch.setattr(foreign_sources, "BASH_GUIDE", make_package(tmp_path, pages))
    assert sorted(document.id for document in foreign_source("bash_guide", tmp_path).documents()) == ["a", "b"]


def test_a_package_without_the_text_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_sources, "OWN_DOCS", tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match="own_docs.*leave this text out"):
        foreign_source("own_docs", tmp_path)
