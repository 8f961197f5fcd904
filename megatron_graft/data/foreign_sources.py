"""Texts of other domains, for evaluation only: e-mail, fortunes, a guide to the shell, and this project's own prose."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from megatron_graft.data import cleaning
from megatron_graft.data.debian import DebianPackage, fetch_debian_package, read_debian_members
from megatron_graft.data.sources import Document, Source, default_foreign_sources, stable_hash
from megatron_graft.errors import CorpusError

FORTUNES = DebianPackage(
    name="fortunes",
    version="1:1.99.1-7.3",
    sha256="41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
)
BASH_GUIDE = DebianPackage(
    name="abs-guide",
    version="10-4",
    sha256="2432950da65e559b986f593c09a6d0dd6bc9f3bea83fa115774791066108ecd9",
)
LARGEST_TEXT = 150_000  # bytes of a foreign text
_JOINED = 2000  # characters of a document of joined fortunes
_SHORTEST = 200  # characters; a page that has fewer is a list of links
OWN_DOCS = Path(__file__).resolve().parents[2] / "docs" / "results" / "matched-arms" / "own_docs.jsonl"


def _fortunes(cache: Path) -> Source:
    """Fortunes of one file joined to documents of some length: one alone is a line or two."""
    archive = fetch_debian_package(FORTUNES, cache)

    def documents() -> Iterator[Document]:
        for path, data in read_debian_members(archive, r"usr/share/games/fortunes/[\w-]+"):
            fortunes = [part.strip() for part in data.decode("utf-8", "replace").split("\n%\n")]
            for number, text in enumerate(_joined(fortunes)):
                yield Document(f"{Path(path).name}-{number}", text)

    return _sampled("fortunes", f"deb:{FORTUNES.spec}, version 1", documents)


def _joined(parts: Iterable[str]) -> Iterator[str]:
    waiting: list[str] = []
    for part in parts:
        waiting += [part] if part else []
        if sum(map(len, waiting)) >= _JOINED:
            yield "\n\n".join(waiting)
            waiting = []
    if waiting:
        yield "\n\n".join(waiting)


def _bash_guide(cache: Path) -> Source:
    archive = fetch_debian_package(BASH_GUIDE, cache)

    def documents() -> Iterator[Document]:
        for path, data in read_debian_members(archive, r"usr/share/doc/abs-guide/html/[\w-]+\.html"):
            yield Document(Path(path).stem, text_of_page(data.decode("latin-1")))

    # Its pages are long, and of a long document only the beginning may be read: more of them, then.
    return _sampled("bash_guide", f"deb:{BASH_GUIDE.spec}, version 1", documents, largest=2 * LARGEST_TEXT)


def text_of_page(page: str) -> str:
    """The running text of an HTML page of a DocBook manual: without head, scripts and navigation."""
    reader = _PageReader()
    reader.feed(page)
    reader.close()
    return "".join(reader.parts)


class _PageReader(HTMLParser):
    """Collects text; paragraphs are parted by blank lines, what is preformatted is left as it is."""

    _SKIPPED = ("head", "script", "style")
    _BLOCKS = frozenset(
        ["p", "div", "pre", "h1", "h2", "h3", "h4", "h5", "table", "tr", "dt", "dd", "li", "blockquote", "hr"]
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped: list[str] = []  # open elements from the outermost one that is left out
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("class") or ""
        if self._skipped or tag in self._SKIPPED or name in ("NAVHEADER", "NAVFOOTER"):
            if tag not in ("hr", "br", "img", "meta", "link"):  # these are never closed
                self._skipped.append(tag)
            return
        self._preformatted += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            while self._skipped and self._skipped.pop() != tag:
                pass
            return
        self._preformatted -= tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def _own_docs(cache: Path) -> Source:
    """This project's own prose: no donor that exists has read it.

    Pages and docstrings as they stood when the first experiment was made: they go on changing, and runs of different
    days must read the same.
    """
    if not OWN_DOCS.is_file():
        raise CorpusError(
            "own_docs", "is a text of a checkout, which an installed package does not have", expected=OWN_DOCS,
            remedy="Run it from a checkout, or leave this text out.",
        )  # fmt: skip

    def documents() -> Iterator[Document]:
        for line in OWN_DOCS.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield Document(record["id"], record["text"])

    return _sampled("own_docs", "this project's pages and docstrings", documents)


def _email(cache: Path) -> Source:
    [source] = default_foreign_sources(cache)
    return source


FOREIGN_SOURCES: dict[str, Callable[[Path], Source]] = {
    "email": _email,
    "fortunes": _fortunes,
    "bash_guide": _bash_guide,
    "own_docs": _own_docs,
}


def foreign_source(name: str, cache: Path) -> Source:
    """The packaged foreign text of that name.

    Raises:
        CorpusError: there is none, or it cannot be had here.
        PlatformError, StorageError: as those that fetch.
    """
    if name not in FOREIGN_SOURCES:
        raise CorpusError(
            f"foreign text {name}", "is unknown", expected=", ".join(FOREIGN_SOURCES),
            remedy="Give a file of your own as NAME=FILE.",
        )  # fmt: skip
    return FOREIGN_SOURCES[name](cache)


def _sampled(name: str, origin: str, read: Callable[[], Iterator[Document]], largest: int = LARGEST_TEXT) -> Source:
    """Documents by the hash of their ids until there is enough: a sample of all of them, always the same one."""

    @functools.cache
    def documents() -> Sequence[Document]:
        kept, size = [], 0
        cleaned = [Document(document.id, cleaning.normalise(document.text)) for document in read()]
        for document in sorted(cleaned, key=lambda document: stable_hash(name, document.id)):
            if len(document.text) >= _SHORTEST and size < largest:
                kept.append(document)
                size += len(document.text.encode())
        return kept

    return Source(name=name, origin=origin, documents=lambda: iter(documents()))
