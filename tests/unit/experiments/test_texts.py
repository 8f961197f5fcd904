"""The texts of an experiment: two halves that share nothing, foreign texts, and documents that are not too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.errors import ConfigError, CorpusError
from megatron_graft.experiments.texts import prepare_texts, shortened
from tests.helpers.building import make_documents

LONGEST = 120


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(directory: Path, **changes: Any) -> dict[str, Any]:
    inputs = directory / "inputs"
    if not inputs.exists():
        inputs.mkdir()
        write_jsonl(inputs / "one.jsonl", make_documents(40, seed=1))
        write_jsonl(inputs / "two.jsonl", make_documents(20, seed=2))
        write_jsonl(inputs / "mail.jsonl", make_documents(5, seed=3))
    settings: dict[str, Any] = {
        "inputs": [inputs / "one.jsonl", inputs / "two.jsonl"],
        "foreign": [f"mail={inputs / 'mail.jsonl'}"],
        "held_out_fraction": 0.3,
        "longest_document": LONGEST,
    }
    return prepare_texts(directory / "work", cache=directory / "cache", **(settings | changes))


def records(directory: Path, name: str) -> list[dict[str, str]]:
    lines = (directory / "work" / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_halves_part_what_is_held_out_within_every_source(tmp_path: Path) -> None:
    manifest = prepare(tmp_path)
    held_out = [json.loads(line) for line in (tmp_path / "work/corpus/heldout.jsonl").read_text().splitlines()]
    ids = {name: {(r["source"], r["id"]) for r in records(tmp_path, name)} for name in ("heldout", "untouched")}
    assert ids["heldout"].isdisjoint(ids["untouched"])
    assert ids["heldout"] | ids["untouched"] == {(record["source"], record["id"]) for record in held_out}
    halves = [manifest["texts"][name]["sources"] for name in ("heldout", "untouched")]
    assert halves[0].keys() == halves[1].keys() and len(halves[0]) == 2
    assert all(0 <= halves[0][source] - halves[1][source] <= 1 for source in halves[0])


def test_the_manifest_counts_documents_in_their_order(tmp_path: Path) -> None:
    manifest = prepare(tmp_path)
    for name, facts in manifest["texts"].items():
        sources = [record["source"] for record in records(tmp_path, name)]
        assert sources == [source for source, count in facts["sources"].items() for _ in range(count)]
        assert facts["documents"] == len(sources)
    assert list(manifest["texts"]) == ["heldout", "untouched", "mail"]


def test_long_documents_are_cut_between_words(tmp_path: Path) -> None:
    prepare(tmp_path)
    texts = [record["text"] for name in ("heldout", "untouched", "mail") for record in records(tmp_path, name)]
    assert max(map(len, texts)) <= LONGEST
    assert max(map(len, texts)) > LONGEST / 2
    assert shortened("one two three", 8) == "one two"
    assert shortened("one two", 7) == "one two"
    assert shortened("one two t", 7) == "one two"
    assert shortened("unbroken", 4) == "unbr"
    assert shortened("  unbroken", 6) == "  unbr"  # a document that is nothing would shift all after it


def test_a_second_call_does_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    first = prepare(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*")}
    assert prepare(tmp_path) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*")} == before
    with pytest.raises(ConfigError, match="holds texts made with other settings"):
        prepare(tmp_path, longest_document=LONGEST + 1)


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one name"):
        prepare(tmp_path, foreign=["own_docs", "own_docs"])
    with pytest.raises(CorpusError, match="foreign text emails"):
        prepare(tmp_path, foreign=["emails"])


def test_files_of_one_name_in_two_directories_are_two_texts(tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files.append(write_jsonl(tmp_path / name / "mail.jsonl", [f"{name} text {number}" for number in range(3)]))
    manifest = prepare(tmp_path, foreign=[f"a={files[0]}", f"b={files[1]}"])
    for text, name in (("a", "first"), ("b", "second")):
        assert [record["text"] for record in records(tmp_path, text)] == [f"{name} text {n}" for n in range(3)]
        assert manifest["texts"][text]["sources"] == {text: 3}


@pytest.mark.parametrize("name", ["train", "heldout", "untouched", "../up", ""])
def test_a_name_that_would_lie_over_another_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="texts.foreign: gives"):
        prepare(tmp_path, foreign=[f"{name}={tmp_path / 'inputs' / 'mail.jsonl'}"])


def test_one_held_out_document_makes_no_two_halves(tmp_path: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", make_documents(3, seed=4))
    with pytest.raises(CorpusError, match="two halves"):
        prepare(tmp_path, inputs=[few])
