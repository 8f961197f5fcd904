from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.data.tokenizer_training import split_into_lines, train_tokenizer
from megatron_graft.errors import ConfigError, CorpusError, TokenizerError
from tests.helpers.tokenizers import SENTENCES, TRICKY
from tools import train_tokenizer as command


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "train.jsonl", list(SENTENCES) * 3)


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(corpus: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = write_corpus(elsewhere / "copy.jsonl", list(SENTENCES) * 3)
    first = train_tokenizer([corpus], tmp_path / "a", vocab_size=330).read_bytes()
    assert first == train_tokenizer([copy], elsewhere / "b", vocab_size=330).read_bytes()
    assert str(tmp_path).encode() not in first


def test_text_is_not_altered(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer([corpus], tmp_path / "out", vocab_size=330))
    for text in (*SENTENCES, *TRICKY):
        assert tokenizer.ngram_text(tokenizer.encode(text)) == text


def test_the_vocabulary_has_the_asked_size_and_the_end_token_is_eod(corpus: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_tokenizer([corpus], tmp_path / "out", vocab_size=330))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.vocab_size == 330
    assert processor.id_to_piece(tokenizer.eod) == "</s>"
    assert tokenizer.encode("zażółć 🙂").count(processor.unk_id()) == 0


def test_a_finished_tokenizer_is_kept_and_a_stale_one_is_trained_anew(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = train_tokenizer([corpus], out, vocab_size=330)
    first = model.stat().st_mtime_ns
    assert train_tokenizer([corpus], out, vocab_size=330).stat().st_mtime_ns == first
    assert load_tokenizer(train_tokenizer([corpus], out, vocab_size=340)).vocab_size == 340
    model.write_bytes(model.read_bytes()[:-10])
    assert load_tokenizer(train_tokenizer([corpus], out, vocab_size=340)).vocab_size == 340
    write_corpus(corpus, ["other words in other places"] * 9 + list(SENTENCES))
    before = model.read_bytes()
    assert train_tokenizer([corpus], out, vocab_size=340).read_bytes() != before


def test_a_document_of_one_long_line_is_learnt_from(tmp_path: Path) -> None:
    # The trainer silently skips lines above 4,192 bytes: a speech is one line of a hundred thousand.
    speech = "unforgettable circumstance " * 2000
    corpus = write_corpus(tmp_path / "train.jsonl", [speech, *SENTENCES])
    tokenizer = load_tokenizer(train_tokenizer([corpus], tmp_path / "out", vocab_size=330))
    assert len(tokenizer.encode(" unforgettable")) == 1


def test_lines_are_cut_before_a_space_and_nothing_is_lost() -> None:
    text = "first line\n" + "word and another " * 300 + "\n\n" + "x" * 2500
    lines = list(split_into_lines(text))
    assert "".join(lines) == text.replace("\n", "")
    assert max(map(len, lines)) <= 1000
    assert all(line.startswith((" ", "w", "f", "x")) for line in lines)
    assert all(not line.endswith(" ") for line in lines[1:-4])


def test_more_text_than_the_limit_is_sampled_by_document(tmp_path: Path) -> None:
    texts = [f"document {number} says {sentence}" for number in range(300) for sentence in SENTENCES]
    corpus = write_corpus(tmp_path / "train.jsonl", texts)
    size = corpus.stat().st_size
    sampled = train_tokenizer([corpus], tmp_path / "a", vocab_size=330, max_bytes=size // 4).read_bytes()
    again = train_tokenizer([corpus], tmp_path / "b", vocab_size=330, max_bytes=size // 4).read_bytes()
    assert sampled == again != train_tokenizer([corpus], tmp_path / "c", vocab_size=330).read_bytes()


def test_faults_in_the_text_are_reported_with_their_line(corpus: Path, tmp_path: Path) -> None:
    with corpus.open("ab") as stream:
        stream.write(b'{"text": "broken \xff"}\n')
    with pytest.raises(CorpusError, match=r"train\.jsonl:13: is not UTF-8"):
        train_tokenizer([corpus], tmp_path / "out", vocab_size=330)
    assert not (tmp_path / "out").exists()


def test_impossible_vocabularies_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="--vocab-size.*Lower --vocab-size"):
        train_tokenizer([corpus], tmp_path / "out", vocab_size=20_000)
    with pytest.raises(ConfigError, match="--vocab-size: is too small"):
        train_tokenizer([corpus], tmp_path / "out", vocab_size=259)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_it_made(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(corpus), "--output", str(tmp_path / "out"), "--vocab-size"]
    assert command.main([*arguments, "330"]) == 0
    assert "330 ids, EOD 2" in capsys.readouterr().out
    assert command.main([*arguments, "100"]) == 2
    assert "error: --vocab-size" in capsys.readouterr().err
