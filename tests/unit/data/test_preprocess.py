from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_graft.data import indexed_files, preprocess
from megatron_graft.data.document_progress import DocumentProgress
from megatron_graft.data.preprocess import is_complete
from megatron_graft.data.sidecar import read_sidecar, require_same_tokenizer, sidecar_path
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.errors import (
    ConfigError,
    CorpusError,
    DataError,
    IdentityError,
    PlatformError,
    StorageError,
)
from megatron_graft.log import get_logger
from tests.helpers.forked import check_in_fork
from tests.helpers.tokenizers import SENTENCES, TRICKY, small_byte_level, small_sentencepiece
from tools import preprocess_data as command

REPOSITORY = Path(__file__).resolve().parents[3]
TEXTS = [*SENTENCES, *TRICKY, "\n\n".join(SENTENCES)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(small_sentencepiece(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "text.jsonl", TEXTS)


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def open_with_megatron(prefix: Path) -> Any:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = open_with_megatron(prefix)  # held: its arrays are views of a map that it closes when it goes
    return [dataset[index].tolist() for index in range(len(dataset))]


def written_names(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.endswith(".jsonl"))


def test_megatron_reads_back_every_document_ended_by_eod(text: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    counts = preprocess.preprocess([text], tmp_path / "out" / "train", tokenizer)
    dataset = open_with_megatron(tmp_path / "out" / "train_text_document")
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
    assert documents_of(tmp_path / "out" / "train_text_document") == expected
    assert dataset.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert dataset.index.dtype == np.uint16
    assert (counts.documents, counts.tokens) == (len(TEXTS), sum(map(len, expected)))
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_ids_are_stored_as_megatron_stores_them_for_the_vocabulary() -> None:
    assert indexed_files.indexed_dtype(65_499) == np.uint16
    assert indexed_files.indexed_dtype(65_500) == np.int32


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_BATCH_BYTES", 500)  # many batches, handed out in turn
    texts = [f"{number} {sentence * (number % 7)}" for number in range(60) for sentence in SENTENCES]
    inputs = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n::2]) for n in range(2)]
    for workers in (1, 3):
        preprocess.preprocess(inputs, tmp_path / f"workers{workers}", tokenizer, workers=workers)
    for suffix in ("bin", "idx", "tokenizer.json"):
        one, three = (tmp_path / f"workers{n}_text_document.{suffix}" for n in (1, 3))
        assert one.read_bytes() == three.read_bytes()
    assert documents_of(tmp_path / "workers3_text_document")[3] == [
        *tokenizer.encode(texts[6]),
        tokenizer.eod,
    ]


def test_eod_can_be_left_out_and_is_never_doubled(text: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    preprocess.preprocess([text], tmp_path / "plain", tokenizer, append_eod=False)
    assert documents_of(tmp_path / "plain_text_document")[0] == tokenizer.encode(TEXTS[0])
    directory = small_byte_level(tmp_path / "ends_itself")
    description = json.loads((directory / "tokenizer.json").read_text())
    sequence, end = {"Sequence": {"id": "A", "type_id": 0}}, "<|endoftext|>"
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [sequence, {"SpecialToken": {"id": end, "type_id": 0}}],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {end: {"id": end, "ids": [1], "tokens": [end]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(description))
    ending = load_tokenizer(directory)
    preprocess.preprocess([text], tmp_path / "once", ending)
    document = documents_of(tmp_path / "once_text_document")[0]
    assert document == ending.encode(TEXTS[0])
    assert document.count(ending.eod) == 1


def test_documents_without_a_token_are_left_out(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", ["one", "", "two"])
    with text.open("a") as stream:
        stream.write("\n")
    assert preprocess.preprocess([text], tmp_path / "out", tokenizer).documents == 2
    write_jsonl(text, ["", ""])
    with pytest.raises(CorpusError, match=r"text\.jsonl: holds no text to tokenise"):
        preprocess.preprocess([text], tmp_path / "none", tokenizer)
    assert not list(tmp_path.glob("*none*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_named_and_old_files_stay(
    workers: int, text: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "_BATCH_BYTES", 200)
    preprocess.preprocess([text], tmp_path / "out", tokenizer)
    before = {name: (tmp_path / name).read_bytes() for name in written_names(tmp_path)}
    with text.open("ab") as stream:
        stream.write(b'{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match=rf"text\.jsonl:{len(TEXTS) + 1}: is not UTF-8"):
        preprocess.preprocess([text], tmp_path / "out", tokenizer, workers=workers)
    assert {name: (tmp_path / name).read_bytes() for name in written_names(tmp_path)} == before


def test_workers_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """They hold its standard error, which is read to its end only when all are gone."""
    text = write_jsonl(tmp_path / "long.jsonl", SENTENCES * 40_000)
    command = [sys.executable, "tools/preprocess_data.py", "--input", text, "--output-prefix", tmp_path / "out"]
    command += ["--tokenizer-model", small_sentencepiece(tmp_path), "--workers", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(psutil.Process(process.pid).children()) < 3:  # two workers and multiprocessing's tracker
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert not list(tmp_path.glob("out*")) and process.returncode == -signal.SIGKILL


def test_workers_that_cannot_run_end_the_command(text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_sentencepiece(tmp_path))
    tokenizer.path.unlink()  # what the worker opens when it starts
    with pytest.raises(PlatformError, match="one of 2 worker processes died"):
        preprocess.preprocess([text], tmp_path / "out", tokenizer, workers=2)
    with pytest.raises(ConfigError, match="--workers: is out of range"):
        preprocess.preprocess([text], tmp_path / "out", tokenizer, workers=0)
    assert written_names(tmp_path) == []


def test_missing_and_empty_input_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"--input .*absent\.jsonl: does not exist"):
        preprocess.preprocess([tmp_path / "absent.jsonl"], tmp_path / "out", tokenizer)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(CorpusError, match=r"--input .*empty\.jsonl: is empty"):
        preprocess.preprocess([tmp_path / "empty.jsonl"], tmp_path / "out", tokenizer)


def test_a_stop_while_publishing_leaves_no_index(
    text: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess.preprocess([text], tmp_path / "out", tokenizer)

    def disk_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(indexed_files, "write_sidecar", disk_full)
    with pytest.raises(StorageError, match="No space left on device"):
        preprocess.preprocess([text], tmp_path / "out", tokenizer)
    assert "out_text_document.idx" not in written_names(tmp_path)
    assert not is_complete(tmp_path / "out_text_document", tokenizer)


def test_a_disk_that_fills_up_is_named_and_nothing_stays(tmp_path: Path) -> None:
    """With the file system's own error, which closing the file would meet once more."""
    indexed_files.indexed_dtype(9)  # imports Megatron, which writes files of its own

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with (
            pytest.raises(StorageError, match="File too large"),
            indexed_files.IndexedFiles(tmp_path / "out_text_document", np.dtype(np.uint16)) as files,
        ):
            for _ in range(100):
                files.add(np.ones(1000, dtype=np.uint16), [1000])

    check_in_fork(fill)
    assert written_names(tmp_path) == []


def test_megatrons_sample_index_of_replaced_data_is_dropped(
    text: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    prefix = preprocess.dataset_prefix(tmp_path / "out")
    stale = prefix / "cache" / "GPTDataset_indices" / "0-GPTDataset-train-sample_index.npy"
    stale.parent.mkdir(parents=True)
    stale.touch()
    preprocess.preprocess([text], tmp_path / "out", tokenizer)
    assert not stale.exists()


def test_complete_means_whole_and_of_this_tokenizer_and_not_stale(
    text: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    prefix = preprocess.dataset_prefix(tmp_path / "out")
    assert not is_complete(prefix, tokenizer)
    preprocess.preprocess([text], tmp_path / "out", tokenizer)
    assert is_complete(prefix, tokenizer, [text])
    other = load_tokenizer(small_sentencepiece(tmp_path, vocab_size=390))
    assert not is_complete(prefix, other)
    os.utime(text)
    assert is_complete(prefix, tokenizer)
    assert not is_complete(prefix, tokenizer, [text])


@pytest.mark.parametrize("suffix", ["bin", "idx", "tokenizer.json"])
def test_a_damaged_data_set_is_not_complete(suffix: str, text: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    prefix = preprocess.dataset_prefix(tmp_path / "out")
    preprocess.preprocess([text], tmp_path / "out", tokenizer)
    file = Path(f"{prefix}.{suffix}")
    whole = file.read_bytes()
    file.unlink()
    assert not is_complete(prefix, tokenizer)
    if suffix != "tokenizer.json":
        for damaged in (whole[:-2], whole + b"\0", b""):
            file.write_bytes(damaged)
            assert not is_complete(prefix, tokenizer)
    file.write_bytes(whole)
    assert is_complete(prefix, tokenizer)


def test_the_note_beside_the_data_tells_its_tokenizer(text: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    prefix = preprocess.dataset_prefix(tmp_path / "out")
    assert read_sidecar(prefix) is None  # as beside a data set of Megatron's own tool
    assert not require_same_tokenizer(prefix, tokenizer)
    preprocess.preprocess([text], tmp_path / "out", tokenizer)
    assert json.loads(sidecar_path(prefix).read_text()) == {
        "fingerprint": tokenizer.fingerprint,
        "kind": "sentencepiece",
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
    assert require_same_tokenizer(prefix, tokenizer)
    other = load_tokenizer(small_byte_level(tmp_path / "other"))
    with pytest.raises(IdentityError, match="was tokenised by another tokenizer") as caught:
        require_same_tokenizer(prefix, other)
    assert tokenizer.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)


@pytest.mark.parametrize("note", ["{", "[]", '{"fingerprint": "x"}', '{"fingerprint": 1, "kind": "x"}'])
def test_a_broken_note_is_refused(note: str, tmp_path: Path) -> None:
    sidecar_path(tmp_path / "data").write_text(note)
    with pytest.raises(DataError, match=r"data\.tokenizer\.json: is not"):
        read_sidecar(tmp_path / "data")


def test_progress_tells_documents_megabytes_and_eta(caplog: pytest.LogCaptureFixture) -> None:
    get_logger().addHandler(caplog.handler)  # the package's logger does not propagate
    progress = DocumentProgress("train", 4_000_000, every_documents=10)
    for _ in range(3):
        progress.advance(5, 1_000_000)
    progress.finish(1234)
    get_logger().removeHandler(caplog.handler)
    lines = list(dict.fromkeys(caplog.messages))
    assert len(lines) == 2
    assert "train: 10 documents, 2.0/4.0 MB" in lines[0] and "MB/s, ETA " in lines[0]
    assert "train: 15 documents, 1,234 tokens in" in lines[1] and "documents/s" in lines[1]


def test_the_command_takes_megatrons_flags(
    text: Path, tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(text, TEXTS, key="body")
    arguments = [
        "--input", str(text), "--output-prefix", str(tmp_path / "out"), "--json-keys", "body",
        "--tokenizer-model", str(tokenizer.path), "--workers", "1", "--log-interval", "5",
    ]  # fmt: skip
    assert command.main([*arguments, "--append-eod", "--tokenizer-type", "SentencePieceTokenizer"]) == 0
    assert f"out_body_document: {len(TEXTS)} documents" in capsys.readouterr().out
    assert is_complete(tmp_path / "out_body_document", tokenizer)
    assert command.main([*arguments, "--tokenizer-type", "HuggingFaceTokenizer"]) == 2
    assert "expected SentencePieceTokenizer" in capsys.readouterr().err
