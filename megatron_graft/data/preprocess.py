"""JSON lines to Megatron's ``.bin/.idx``, with several processes and the same bytes for any number of them.

The main process reads whole lines in batches, workers parse and encode them, and the main process writes the
results in reading order through megatron-core's own ``IndexedDatasetBuilder``.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.data.document_progress import DocumentProgress
from megatron_graft.data.indexed_files import IndexedFiles, indexed_dtype, sizes_agree
from megatron_graft.data.jsonl import parse_line, require_text_file
from megatron_graft.data.sidecar import read_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import ConfigError, CorpusError, PlatformError
from megatron_graft.processes import end_with_parent

_BATCH_BYTES = 1 << 18  # small enough to share a small corpus out, large enough to hide the hand-over
_BATCHES_IN_FLIGHT = 3  # per worker: what bounds the memory, whatever the size of the input


@dataclass(frozen=True, kw_only=True)
class DataSetCounts:
    """What was written: documents and tokens (EOD included), and the UTF-8 bytes of their text."""

    documents: int
    tokens: int
    text_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """All a worker needs to encode; small and picklable."""

    tokenizer_path: Path
    json_key: str
    append_eod: bool
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class _Batch:
    """Consecutive lines of one file."""

    path: Path
    first_line: int
    lines: list[bytes]


@dataclass(frozen=True)
class _EncodedBatch:
    """Token ids of the batch's documents end to end, and the length of each."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    file_bytes: int


def dataset_prefix(output_prefix: Path | str, json_key: str = "text") -> Path:
    """The prefix Megatron's tool would choose: ``<output prefix>_<key>_document``."""
    return Path(f"{output_prefix}_{json_key}_document")


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: TextTokenizer,
    *,
    json_key: str = "text",
    workers: int = 1,
    append_eod: bool = True,
    log_interval: int | None = None,
) -> DataSetCounts:
    """Tokenise JSONL files into ``<output_prefix>_<json_key>_document.{bin,idx,tokenizer.json}``.

    Documents keep the order of the input; a document without any token is left out. The ``.idx`` comes last:
    a stopped run leaves no data set that opens.

    Args:
        inputs: JSONL files.
        output_prefix: path and start of the name of the files to write; what was there is replaced.
        tokenizer: from :func:`megatron_graft.data.tokenizer.load_tokenizer`.
        json_key: member that holds the text.
        workers: processes that encode; 1 encodes in this process.
        append_eod: end every document with the EOD token (once, if the tokenizer has put one there already).
        log_interval: documents between two progress lines; None for a line every few seconds.

    Raises:
        CorpusError: an input is missing, empty, not UTF-8 or malformed, or holds no token at all.
        ConfigError: ``workers`` is not positive.
        PlatformError: a worker process died.
        StorageError: the files cannot be written.
    """
    if workers < 1:
        raise ConfigError("--workers", "is out of range", got=workers, expected="1 or more")
    for path in inputs:
        require_text_file(path, "--input")
    prefix = dataset_prefix(output_prefix, json_key)
    encoding = _Encoding(
        tokenizer_path=tokenizer.path,
        json_key=json_key,
        append_eod=append_eod,
        dtype=indexed_dtype(tokenizer.vocab_size),
    )
    progress = DocumentProgress(prefix.name, sum(path.stat().st_size for path in inputs), log_interval)
    tokens = text_bytes = 0
    with IndexedFiles(prefix, encoding.dtype) as files:
        # closing(): on any error here the workers stop now, not when the generator is collected.
        with closing(_encode_all(_batches(inputs), encoding, tokenizer, workers)) as encoded:
            for batch in encoded:
                files.add(batch.tokens, batch.lengths)
                tokens, text_bytes = tokens + len(batch.tokens), text_bytes + batch.text_bytes
                progress.advance(len(batch.lengths), batch.file_bytes)
        if not tokens:
            names = ", ".join(str(path) for path in inputs)
            raise CorpusError(f"--input {names}", "holds no text to tokenise", expected="at least one document")
        files.publish(tokenizer)
    seconds = progress.finish(tokens)
    return DataSetCounts(documents=progress.documents, tokens=tokens, text_bytes=text_bytes, seconds=seconds)


def is_complete(prefix: Path | str, tokenizer: TextTokenizer, inputs: Sequence[Path] = ()) -> bool:
    """Whether a data set is whole, was made by ``tokenizer``, and is no older than any of ``inputs``.

    Args:
        prefix: without ``.bin`` or ``.idx``.
        tokenizer: the one in use now.
        inputs: files it was made from, to notice that they have changed since.
    """
    if not sizes_agree(prefix):
        return False
    sidecar = read_sidecar(prefix)
    if sidecar is None or sidecar.fingerprint != tokenizer.fingerprint:
        return False
    written = Path(f"{prefix}.idx").stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= written for path in inputs)


def _batches(inputs: Iterable[Path]) -> Iterator[_Batch]:
    for path in inputs:
        with path.open("rb") as stream:
            first_line = 1
            while lines := stream.readlines(_BATCH_BYTES):
                yield _Batch(path, first_line, lines)
                first_line += len(lines)


def _encode_all(
    batches: Iterator[_Batch], encoding: _Encoding, tokenizer: TextTokenizer, workers: int
) -> Generator[_EncodedBatch]:
    if workers == 1:
        for batch in batches:
            yield _encode_batch(batch, encoding, tokenizer)
        return
    pending: deque[Future[_EncodedBatch]] = deque()
    # Spawned, not forked: the caller may already hold threads (torch, OpenMP) that a fork would break.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoding,)
    )
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) >= workers * _BATCHES_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise PlatformError(
            "--workers",
            f"one of {workers} worker processes died",
            remedy="Lower --workers if memory ran out.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[_Encoding, TextTokenizer] | None = None  # a spawned worker's own copy


def _start_worker(encoding: _Encoding) -> None:
    global _worker
    end_with_parent()  # or it would wait for ever for batches of a parent that was killed
    _worker = encoding, load_tokenizer(encoding.tokenizer_path)


def _encode_in_worker(batch: _Batch) -> _EncodedBatch:
    if _worker is None:
        raise RuntimeError("the worker was not started by its pool")
    return _encode_batch(batch, *_worker)


def _encode_batch(batch: _Batch, encoding: _Encoding, tokenizer: TextTokenizer) -> _EncodedBatch:
    documents: list[np.ndarray] = []
    text_bytes = 0
    for number, line in enumerate(batch.lines, start=batch.first_line):
        text = parse_line(line, encoding.json_key, f"{batch.path}:{number}")
        ids = tokenizer.encode(text) if text else []
        if not ids:
            continue
        if encoding.append_eod and ids[-1] != tokenizer.eod:
            ids.append(tokenizer.eod)
        documents.append(np.asarray(ids, dtype=encoding.dtype))
        text_bytes += len((text or "").encode())
    tokens = np.concatenate(documents) if documents else np.empty(0, dtype=encoding.dtype)
    return _EncodedBatch(tokens, [len(ids) for ids in documents], text_bytes, sum(map(len, batch.lines)))
