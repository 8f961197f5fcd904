"""Split documents into training and held-out text before anything else sees them; write the splits as JSONL.

Output directory, all or nothing::

    train.jsonl  heldout.jsonl  [foreign.jsonl]     {"text", "source", "id"} per line
    corpus.json                                     settings, documents and bytes per split and source
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_graft.data.sources import Document, Source, stable_hash
from megatron_graft.errors import ConfigError, CorpusError
from megatron_graft.files import directory_in_one_step, write_json_atomically
from megatron_graft.log import get_logger

HELD_OUT_FRACTION = 0.03
MANIFEST = "corpus.json"
FORMAT = "megatron-graft-corpus"
VERSION = 1

TRAIN, HELD_OUT, FOREIGN = "train", "heldout", "foreign"


@dataclass
class SplitCounts:
    """How much text a split (or one source's part of it) holds."""

    documents: int = 0
    bytes: int = 0

    def add(self, text: str) -> None:
        """Count one document and its UTF-8 bytes."""
        self.documents += 1
        self.bytes += len(text.encode())


def prepare_corpus(
    directory: Path,
    sources: Sequence[Source],
    foreign: Sequence[Source] = (),
    held_out_fraction: float = HELD_OUT_FRACTION,
) -> dict[str, Any]:
    """Write the corpus, or find it complete and made with the same settings and leave it alone.

    The held-out documents of a source are those whose ids hash lowest: the same for every run and machine,
    about ``held_out_fraction`` of each source and at least one document of each that has two. A text that
    occurs twice, letter for letter, is kept once, so none stands on both sides.

    Args:
        directory: where to write; must not exist, or hold the same corpus.
        sources: training and held-out text.
        foreign: text of another domain, never trained on; may be none.
        held_out_fraction: share of documents held out, between 0 and 1.

    Returns:
        The manifest, as in ``corpus.json``.

    Raises:
        ConfigError: the fraction is out of range, or ``directory`` holds something else.
        CorpusError: a source is unreadable or empty, or nothing can be held out.
        StorageError: the directory cannot be written.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ConfigError("--held-out-fraction", "is out of range", got=held_out_fraction, expected="0 < f < 1")
    settings = _settings(sources, foreign, held_out_fraction)
    finished = _finished_manifest(directory, settings)
    if finished is not None:
        get_logger().info("corpus %s is complete: nothing to do", directory)
        return finished
    seen: set[bytes] = set()
    plans = [_plan_split(source, held_out_fraction, seen) for source in sources]
    foreign_plans = [_plan_split(source, 0.0, seen) for source in foreign]
    _require_both_sides(plans)
    with directory_in_one_step(directory) as scratch:
        manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION, "settings": settings, "splits": {}}
        for split in (TRAIN, HELD_OUT):
            manifest["splits"][split] = _write_split(scratch, split, _pick(sources, plans, split))
        if foreign:
            chosen = _pick(foreign, foreign_plans, TRAIN)
            manifest["splits"][FOREIGN] = _write_split(scratch, FOREIGN, chosen)
        manifest["dropped"] = dict(sum((plan.dropped for plan in plans + foreign_plans), Counter()))
        write_json_atomically(scratch / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
        CorpusError: there is no finished corpus in ``directory``.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(
            directory,
            f"holds no finished corpus: {error}",
            expected=MANIFEST,
            remedy="Run tools/prepare_corpus.py.",
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CorpusError(directory / MANIFEST, "is not the manifest of a corpus", expected=f'"format": "{FORMAT}"')
    return manifest


def _settings(sources: Sequence[Source], foreign: Sequence[Source], fraction: float) -> dict[str, Any]:
    return {
        "held_out_fraction": fraction,
        "sources": {source.name: source.origin for source in sources},
        "foreign": {source.name: source.origin for source in foreign},
    }


def _finished_manifest(directory: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    if not (directory / MANIFEST).is_file():
        raise ConfigError(
            f"--output {directory}",
            "exists but is not a corpus",
            expected=f"a new directory, or one with {MANIFEST}",
            remedy="Remove it or choose another directory.",
        )
    manifest = read_manifest(directory)
    if manifest.get("version") != VERSION or manifest.get("settings") != settings:
        raise ConfigError(
            f"--output {directory}",
            "holds a corpus made with other settings",
            got=json.dumps(manifest.get("settings")),
            expected=json.dumps(settings),
            remedy="Remove it or choose another directory.",
        )
    return manifest


@dataclass(frozen=True)
class _Plan:
    """Where every document of a source goes, in reading order: a split's name, or None to drop it."""

    splits: list[str | None]
    dropped: Counter[str]


def _plan_split(source: Source, held_out_fraction: float, seen: set[bytes]) -> _Plan:
    splits: list[str | None] = []
    dropped: Counter[str] = Counter()
    ranks: list[tuple[int, int]] = []  # (hash of the id, index)
    for index, document in enumerate(source.documents()):
        reason = _reason_to_drop(document, seen)
        if reason is not None:
            dropped[reason] += 1
        else:
            ranks.append((stable_hash(source.name, document.id), index))
        splits.append(None if reason else TRAIN)
    if not ranks:
        raise CorpusError(
            source.name,
            "has no usable document",
            got=f"{len(splits)} documents, of which blank or repeated: {dropped.total()}",
            expected="at least one text",
        )
    if held_out_fraction:
        count = min(len(ranks) - 1, max(1, round(held_out_fraction * len(ranks))))
        for _, index in sorted(ranks)[:count]:
            splits[index] = HELD_OUT
    return _Plan(splits, dropped)


def _reason_to_drop(document: Document, seen: set[bytes]) -> str | None:
    if not document.text.strip():
        return "blank"
    digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    if digest in seen:
        return "repeated"
    seen.add(digest)
    return None


def _require_both_sides(plans: Sequence[_Plan]) -> None:
    kept = [split for plan in plans for split in plan.splits if split is not None]
    if HELD_OUT not in kept:
        raise CorpusError(
            "--input",
            "is too little to hold anything out: no source has two documents",
            got=f"{len(kept)} documents",
            expected="a source with at least 2 documents",
            remedy="Give more .txt files of one directory, or a .jsonl file with a document a line.",
        )


def _pick(sources: Sequence[Source], plans: Sequence[_Plan], wanted: str) -> Iterator[tuple[str, Document]]:
    for source, plan in zip(sources, plans, strict=True):
        for document, split in zip(source.documents(), plan.splits, strict=True):
            if split == wanted:
                yield source.name, document


def _write_split(directory: Path, split: str, documents: Iterator[tuple[str, Document]]) -> dict[str, Any]:
    total = SplitCounts()
    by_source: dict[str, SplitCounts] = {}
    with (directory / f"{split}.jsonl").open("wb") as stream:
        for source, document in documents:
            _write_document(stream, source, document)
            total.add(document.text)
            by_source.setdefault(source, SplitCounts()).add(document.text)
    get_logger().info("%s: %s documents, %s bytes", split, f"{total.documents:,}", f"{total.bytes:,}")
    return vars(total) | {"sources": {name: vars(counts) for name, counts in by_source.items()}}


def _write_document(stream: BinaryIO, source: str, document: Document) -> None:
    record = {"text": document.text, "source": source, "id": document.id}
    stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
