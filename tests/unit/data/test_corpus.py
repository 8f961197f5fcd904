from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.data.corpus import prepare_corpus, read_manifest
from megatron_graft.data.sources import Document, Source
from megatron_graft.data.user_files import sources_of_files
from megatron_graft.errors import ConfigError, CorpusError
from tools import prepare_corpus as command


def source(name: str, count: int, prefix: str = "") -> Source:
    documents = [Document(f"{name}-{n}", f"{prefix}text {n} of {name}") for n in range(count)]
    return source_of(name, documents)


def source_of(name: str, documents: Sequence[Document]) -> Source:
    return Source(name=name, origin=f"{len(documents)} documents", documents=lambda: iter(documents))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_every_document_stands_on_exactly_one_side(tmp_path: Path) -> None:
    prepare_corpus(tmp_path / "out", [source("a", 200), source("b", 5)], [source("c", 3)])
    sides = {name: read(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "heldout", "foreign")}
    ids = {name: {record["id"] for record in records} for name, records in sides.items()}
    assert not ids["train"] & ids["heldout"]
    assert ids["train"] | ids["heldout"] == {f"a-{n}" for n in range(200)} | {f"b-{n}" for n in range(5)}
    assert ids["foreign"] == {"c-0", "c-1", "c-2"}
    assert [record["source"] for record in sides["heldout"]].count("a") == 6  # 3 % of 200
    assert [record["source"] for record in sides["heldout"]].count("b") == 1  # every source is represented


def test_the_split_depends_on_ids_alone(tmp_path: Path) -> None:
    documents = [Document(f"d{n}", f"text {n}") for n in range(100)]
    shuffled = random.Random(0).sample(documents, k=100)
    changed = [Document(document.id, document.text + "!") for document in documents]
    held_out = []
    for number, some in enumerate((documents, shuffled, changed)):
        out = tmp_path / str(number)
        prepare_corpus(out, [source_of("s", some)], held_out_fraction=0.1)
        held_out.append({record["id"] for record in read(out / "heldout.jsonl")})
    assert len(held_out[0]) == 10
    assert held_out[0] == held_out[1] == held_out[2]


def test_the_manifest_counts_documents_and_bytes(tmp_path: Path) -> None:
    documents = [
        Document("1", "é" * 10),
        Document("2", "x" * 5),
        Document("3", " \n"),
        Document("4", "x" * 5),
    ]
    manifest = prepare_corpus(tmp_path / "out", [source_of("s", documents)], [source("f", 1)])
    splits = manifest["splits"]
    assert splits["train"]["documents"] == splits["heldout"]["documents"] == 1
    assert splits["train"]["bytes"] + splits["heldout"]["bytes"] == 25
    assert splits["foreign"]["sources"]["f"]["documents"] == 1
    assert manifest["dropped"] == {"blank": 1, "repeated": 1}
    assert read_manifest(tmp_path / "out") == manifest


def test_a_text_that_occurs_twice_is_on_one_side_only(tmp_path: Path) -> None:
    documents = [Document(f"d{n}", f"text {n % 20}") for n in range(60)]
    prepare_corpus(tmp_path / "out", [source_of("s", documents)], [source_of("f", documents)][:0], 0.3)
    train, held_out = ({r["text"] for r in read(tmp_path / "out" / f"{s}.jsonl")} for s in ("train", "heldout"))
    assert not train & held_out
    assert len(train | held_out) == 20


def test_a_finished_corpus_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare_corpus(out, [source("a", 10)])
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare_corpus(out, [source("a", 10)]) == first
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_another_corpus_or_directory_is_not_overwritten(tmp_path: Path) -> None:
    prepare_corpus(tmp_path / "out", [source("a", 10)])
    with pytest.raises(ConfigError, match="made with other settings.*Remove it"):
        prepare_corpus(tmp_path / "out", [source("a", 11)])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not a corpus"):
        prepare_corpus(tmp_path / "notes", [source("a", 10)])
    assert os.listdir(tmp_path / "notes") == ["mine.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', r"bad\.jsonl:2: is not UTF-8 \(got byte 0xe9 at offset 13"),
        (b'{"text": "x"', r"bad\.jsonl:2: is not valid JSON"),
        (b'{"body": "x"}', r'bad\.jsonl:2: has no string under the key "text".*--json-keys'),
        (b'{"text": 7}', r'bad\.jsonl:2: has no string under the key "text"'),
        (b'["text"]', r'bad\.jsonl:2: has no string under the key "text"'),
        (b'{"text": "\\ud800"}', r"bad\.jsonl:2: holds half of a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_left(tmp_path: Path, line: bytes, message: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "also fine"}\n')
    with pytest.raises(CorpusError, match=message):
        prepare_corpus(tmp_path / "out", sources_of_files([bad], "--input"))
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_files_that_cannot_be_used_are_named_with_their_flag(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    cases = {
        "absent.txt": r"--input .*absent\.txt: does not exist",
        "empty.txt": r"--input .*empty\.txt: is empty",
        "table.csv": r"--input .*table\.csv: is of an unknown kind.*\.txt \(one document\)",
        ".": "is a directory",
    }
    for name, message in cases.items():
        with pytest.raises(CorpusError, match=message):
            sources_of_files([tmp_path / name], "--input")
    (latin,) = sources_of_files([tmp_path / "latin.txt"], "--input")
    with pytest.raises(CorpusError, match=r"latin\.txt: is not UTF-8 \(got byte 0xe9 at offset 3"):
        list(latin.documents())
    with pytest.raises(CorpusError, match="is given twice"):
        sources_of_files([tmp_path / "latin.txt"] * 2, "--input")


def test_directories_of_texts_have_different_names(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "a"
    inner.mkdir(parents=True)
    paths = [inner.parent / "1.txt", inner / "1.txt"]
    for path in paths:
        path.write_text("text")
    assert [source.name for source in sources_of_files(paths[:1], "--input")] == ["a"]
    assert [source.name for source in sources_of_files(paths, "--input")] == [".", "a"]


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="too little to hold anything out.*got 1 documents"):
        prepare_corpus(tmp_path / "out", [source("a", 1)])
    with pytest.raises(CorpusError, match="a: has no usable document"):
        prepare_corpus(tmp_path / "out", [source_of("a", [Document("1", " ")])])
    for fraction in (0.0, 1.0):
        with pytest.raises(ConfigError, match="--held-out-fraction"):
            prepare_corpus(tmp_path / "out", [source("a", 10)], held_out_fraction=fraction)
    assert not (tmp_path / "out").exists()


def test_a_users_files_are_sources_with_ids_below_their_common_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_jsonl(tmp_path / "x" / "lines.jsonl", ["one", "two"])
    books = [tmp_path / "x" / "books" / name for name in ("a.txt", "b.txt")]
    books[0].parent.mkdir()
    for book in books:
        book.write_bytes(b"\xef\xbb\xbf" + f"the text of {book.name}\n\n with its  spaces".encode())
    monkeypatch.chdir(tmp_path / "x")
    relative = [Path("lines.jsonl"), *(Path("books") / book.name for book in books)]
    for paths in ([lines, *books], relative):
        found = {s.name: list(s.documents()) for s in sources_of_files(paths, "--input")}
        assert found == {
            "lines.jsonl": [Document("lines.jsonl:1", "one"), Document("lines.jsonl:2", "two")],
            "books": [
                Document(f"books/{book.name}", f"the text of {book.name}\n\n with its  spaces") for book in books
            ],
        }


def test_the_command_splits_a_users_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [f"text {n}" for n in range(50)])
    foreign = write_jsonl(tmp_path / "foreign.jsonl", ["other"])
    arguments = ["--input", str(own), "--output", str(tmp_path / "out"), "--held-out-fraction", "0.2"]
    assert command.main([*arguments, "--foreign", str(foreign)]) == 0
    assert "heldout         10 documents" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == [
        "corpus.json", "foreign.jsonl", "heldout.jsonl", "train.jsonl",
    ]  # fmt: skip
    assert command.main([*arguments, "--json-keys", "body"]) == 2
    assert "error: " in capsys.readouterr().err
