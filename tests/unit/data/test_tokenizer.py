from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_graft.data.tokenizer import load_tokenizer, megatron_arguments
from megatron_graft.errors import TokenizerError
from tests.helpers.tokenizers import (
    SENTENCES,
    TRICKY,
    small_byte_level,
    small_metaspace,
    small_sentencepiece,
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": small_sentencepiece(directory),
        "byte_level": small_byte_level(directory / "byte_level"),
        "metaspace": small_metaspace(directory / "metaspace"),
        "dummy_prefix": small_sentencepiece(directory, "prefix.model", add_dummy_prefix=True),
    }


def megatron_tokenizer(arguments: list[str]) -> Any:
    """What Megatron's training builds from these arguments and its own defaults."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config.training_config import TokenizerConfig

    settings = {field.name: field.default for field in dataclasses.fields(TokenizerConfig)}
    settings |= {"rank": 0, "pad_vocab_size": False}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        settings[flag.removeprefix("--").replace("-", "_")] = value
    return build_tokenizer(argparse.Namespace(**settings))


@pytest.mark.parametrize("name", ["sentencepiece", "dummy_prefix", "byte_level", "metaspace"])
def test_ids_eod_and_vocabulary_are_those_of_megatrons_own_tokenizer(name: str, paths: dict[str, Path]) -> None:
    ours = load_tokenizer(paths[name])
    theirs = megatron_tokenizer(megatron_arguments(ours))
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod)
    for text in (*SENTENCES, *TRICKY, "\n\n".join(SENTENCES)):
        assert ours.encode(text) == theirs.tokenize(text), text


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "metaspace"])
def test_the_pieces_of_a_text_joined_are_the_text(name: str, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[name])
    generator = random.Random(0)
    for text in (*SENTENCES, *TRICKY[:4]):
        ids = tokenizer.encode(text)
        assert tokenizer.ngram_text(ids) == text
        assert int(tokenizer.num_bytes_of_ids[ids].sum()) == len(text.encode())
        borders = sorted({0, len(ids), *generator.choices(range(len(ids)), k=4)})
        parts = [tokenizer.ngram_text(ids[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
        if None not in parts:
            assert "".join(part or "" for part in parts) == text


def test_an_ngrams_text_keeps_the_leading_space_that_decode_drops(paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths["dummy_prefix"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(paths["dummy_prefix"]))
    ids = tokenizer.encode("the whale")
    assert processor.decode(ids) == "the whale"
    assert tokenizer.ngram_text(ids) == " the whale"


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "metaspace"])
def test_whole_characters_of_byte_pieces_have_text_and_fragments_have_none(name: str, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[name])
    ids = tokenizer.encode("汉")
    assert len(ids) >= 2
    assert tokenizer.ngram_text(ids) == "汉"
    assert tokenizer.ngram_text(ids[:-1]) is None
    assert tokenizer.ngram_text(ids[1:]) is None
    assert tokenizer.ngram_text([*tokenizer.encode("sea"), ids[0]]) is None
    assert tokenizer.ngram_text(tokenizer.encode("\n")) == "\n"


@pytest.mark.parametrize("name", ["sentencepiece", "byte_level", "metaspace"])
def test_special_and_impossible_ids_have_no_text(name: str, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[name])
    word = tokenizer.encode("sea")
    assert tokenizer.ngram_text([*word, tokenizer.eod]) is None
    assert tokenizer.ngram_text([0, *word]) is None  # <unk> or <|pad|>
    assert tokenizer.ngram_text([-1]) is None
    assert tokenizer.ngram_text([tokenizer.vocab_size]) is None
    assert tokenizer.num_bytes_of_ids[tokenizer.eod] == 0
    assert tokenizer.num_bytes_of_ids.shape == (tokenizer.vocab_size,)


def test_a_placeholder_of_characters_that_stand_for_no_bytes_has_no_text(tmp_path: Path) -> None:
    directory = small_byte_level(tmp_path)
    description = json.loads((directory / "tokenizer.json").read_bytes())
    placeholder = len(description["model"]["vocab"]) + len(description["added_tokens"])
    description["model"]["vocab"]["<\N{FULLWIDTH VERTICAL LINE}hole>"] = placeholder
    (directory / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.ngram_text([placeholder]) is None and tokenizer.num_bytes_of_ids[placeholder] == 0


def test_a_tokenizer_json_is_found_by_its_directory_too(paths: dict[str, Path]) -> None:
    directory = paths["byte_level"]
    by_file = load_tokenizer(directory / "tokenizer.json")
    assert by_file.fingerprint == load_tokenizer(directory).fingerprint
    assert by_file.kind == "huggingface"


def test_the_fingerprint_follows_the_files_bytes(paths: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "renamed.model"
    copy.write_bytes(paths["sentencepiece"].read_bytes())
    other = small_sentencepiece(tmp_path, "other.model", vocab_size=390)
    first = load_tokenizer(paths["sentencepiece"]).fingerprint
    assert load_tokenizer(copy).fingerprint == first
    assert load_tokenizer(other).fingerprint != first


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.model: does not exist"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: does not exist"):
        load_tokenizer(tmp_path)
    for name in ("broken.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"not a tokenizer")
        with pytest.raises(TokenizerError, match="is not a"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(TokenizerError, match="unknown kind"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no end-of-sentence token.*eos_id -1"):
        load_tokenizer(small_sentencepiece(tmp_path, eos_id=-1))
    for end_token in (None, "<absent>"):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: names no end-of-sentence token"):
            load_tokenizer(small_byte_level(tmp_path / "byte_level", end_token=end_token))


def test_a_tokenizer_whose_pieces_have_no_text_of_their_own_is_refused(tmp_path: Path) -> None:
    directory = small_byte_level(tmp_path)
    description = json.loads((directory / "tokenizer.json").read_text())
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (directory / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match="no text on their own.*WordPiece"):
        load_tokenizer(directory)


def test_tokenizers_load_without_torch_and_megatron(paths: dict[str, Path]) -> None:
    program = (
        "import sys; from megatron_graft.data.tokenizer import load_tokenizer\n"
        "for path in sys.argv[1:]: load_tokenizer(path)\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(paths["sentencepiece"]), str(paths["byte_level"])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
