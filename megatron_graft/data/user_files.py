"""The user's own text as sources: ``.txt`` files hold one document each, ``.jsonl`` files one a line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_graft.data.jsonl import decode_utf8, read_texts, require_text_file
from megatron_graft.data.sources import Document, Source
from megatron_graft.errors import CorpusError
from megatron_graft.files import sha256_of_file

DEFAULT_JSON_KEY = "text"


def sources_of_files(paths: Sequence[Path], flag: str, json_key: str = DEFAULT_JSON_KEY) -> list[Source]:
    """Group files into sources: every ``.jsonl`` file is one, all ``.txt`` files of a directory are one.

    A document's id is its file's path below the common parent of all files (with the line, for ``.jsonl``),
    so that the split does not depend on the directory the command is run from.

    Args:
        paths: the files.
        flag: the option that named them, for errors.
        json_key: member of a ``.jsonl`` object that holds the text.

    Raises:
        CorpusError: a file is missing, empty, named twice, or neither ``.txt`` nor ``.jsonl``.
    """
    resolved = [_checked(path, flag).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise CorpusError(f"{flag} {path}", "is given twice", remedy="Name every file once.")
    if not resolved:
        return []
    parent = Path(os.path.commonpath([path.parent for path in resolved]))
    texts: dict[Path, list[Path]] = {}
    sources = []
    for path in resolved:
        if path.suffix == ".txt":
            texts.setdefault(path.parent, []).append(path)
        else:
            name = str(path.relative_to(parent))
            opener = partial(_lines, path, name, json_key)
            origin = f"sha256:{sha256_of_file(path)}, key {json_key}"
            sources.append(Source(name=name, origin=origin, documents=opener))
    names = {source.name for source in sources} | {str(directory.relative_to(parent)) for directory in texts}
    for directory, files in texts.items():
        name = str(directory.relative_to(parent))  # "." for the common parent, which is better called by its name
        if directory == parent and directory.name not in names:
            name = directory.name
        sources.append(Source(name=name, origin=_digest_of_all(files), documents=partial(_whole_files, files, parent)))
    return sources


def _checked(path: Path, flag: str) -> Path:
    require_text_file(path, flag)
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(
            f"{flag} {path}",
            "is of an unknown kind",
            got=f"suffix '{path.suffix}'",
            expected=".txt (one document) or .jsonl (one document a line)",
            remedy="Rename or convert the file.",
        )
    return path


def _digest_of_all(files: Sequence[Path]) -> str:
    return "sha256:" + ",".join(sha256_of_file(path) for path in files)


def _lines(path: Path, name: str, json_key: str) -> Iterator[Document]:
    for number, text in read_texts(path, json_key):
        yield Document(f"{name}:{number}", text)


def _whole_files(files: Sequence[Path], parent: Path) -> Iterator[Document]:
    for path in files:
        yield Document(str(path.relative_to(parent)), decode_utf8(path.read_bytes(), str(path)))
