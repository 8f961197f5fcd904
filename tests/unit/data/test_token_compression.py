from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_graft.data.token_compression import CompressedVocabulary, compress_vocabulary
from megatron_graft.data.tokenizer import load_tokenizer
from tests.helpers.tokenizers import SENTENCES, TRICKY, small_byte_level, small_metaspace, small_sentencepiece

KINDS = ["byte_level", "many_scripts", "metaspace", "sentencepiece", "dummy_prefix", "spaces_symbol"]
MANY_SCRIPTS = (
    "Apple apple APPLE ÁPPLE Äpfel äpfel ａｐｐｌｅ ＡＰＰＬＥ ﬁne fine FINE",
    "МОСКВА Москва москва, ὈΔΥΣΣΕΎΣ Ὀδυσσεύς ΟΔΥΣΣΕΥΣ οδυσσευς",
    "汉字 漢字\u3000汉 한국어 x² x2 ¤ ¨ … ... \u00a0\u00a0 İi ß",
    "a\n\n\tb\r\n  c   d",
)
# (text, its compressed id), in the order of the ids. Worked out by hand from the paper's rule.
TABLE = (
    ("<unk>", 0), ("</s>", 1), ("<UNK>", 0),
    (" Apple", 2), ("apple", 2), ("ÁPPLE", 2), ("ａｐｐｌｅ", 2), ("A\u0301pple", 2), ("apple \n", 2), ("apples", 3),
    (" ", 4), ("\n", 4), ("\t", 4), ("\r\n  ", 4), ("\u00a0", 4), ("\u3000", 4),
    ("\ue000", 4),  # the character that stands in for a lone space
    ("\u00a8", 4),  # a diaeresis is, in compatibility, a space that bears an accent
    ("a b", 5), ("A\t\n b ", 5), ("ab", 6),
    ("\u0301", 7), ("\u0300", 8), ("\u0301\u0301", 9),  # accents alone: nothing is left, so their texts count
    ("\v", 10), ("\f", 11), ("a", 12), ("\va\f", 12),  # white space, but none that becomes a space
    ("a\x1c", 13), ("a\x85", 12),  # of these two control characters Unicode holds only the second for white space
    ("ﬁ", 14), ("fi", 14), ("x²", 15), ("X2", 15),
    ("ß", 16), ("ss", 17),  # lower case, not folded case
    ("ΑΣ", 18), ("ας", 19), ("ασ", 18),  # character by character: no final sigma
    ("İ", 20), ("i", 20), ("ı", 21),
    ("\ufffd", 22), ("\ufffdA", 23), ("\ufffda", 24),  # taken for broken: as they are spelt
    ("a\ue000b", 5), ("\ue000a", 25),  # and inside a text, where it becomes a space after the stripping
)  # fmt: skip
WHITE_SPACE = "\t\n\v\f\r \x85\u1680\u2028\u2029\u202f\u205f\u3000\u00a0" + "".join(map(chr, range(0x2000, 0x200B)))


def meaning(text: str) -> str:
    """The paper's normalised text, by Python's own tables of Unicode."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(character for character in text if unicodedata.category(character)[0] != "M")
    text = re.sub(r"[ \t\r\n]+", " ", "".join(character.lower() for character in text))
    return " " if text == " " else text.strip(WHITE_SPACE).replace("\ue000", " ")


def expected_ids(texts: Sequence[str], strings: Sequence[str | None]) -> list[int]:
    """Ranks of groups: collected first, and ordered by their smallest ids afterwards."""
    members: dict[str | None, list[int]] = {}
    for token, text in enumerate(texts):
        key = strings[token] if "\ufffd" in text else meaning(text) or text
        members.setdefault(key, []).append(token)
    ids = [-1] * len(texts)
    for rank, group in enumerate(sorted(members.values(), key=min)):
        for token in group:
            ids[token] = rank
    return ids


def word_tokenizer(directory: Path, words: Iterable[str | None]) -> Path:
    """The directory of a ``tokenizer.json`` whose ids are these texts, the first ones special; None leaves one out."""
    vocabulary = {word.replace(" ", "▁"): token for token, word in enumerate(words) if word is not None}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def piece_tokenizer(directory: Path, words: Sequence[str]) -> Path:
    """A SentencePiece model of these pieces, the first two of which are the unknown and the end token."""
    model = sentencepiece_model_pb2.ModelProto.FromString(small_sentencepiece(directory).read_bytes())
    model.trainer_spec.byte_fallback = False
    model.trainer_spec.unk_piece, model.trainer_spec.eos_piece = words[:2]
    del model.pieces[:]
    for token, word in enumerate(words):
        kind = {0: "UNKNOWN", 1: "CONTROL"}.get(token, "NORMAL")
        model.pieces.add(piece=word.replace(" ", "▁"), score=-token, type=kind)
    path = directory / "words.model"
    path.write_bytes(model.SerializeToString())
    return path


def many_scripts(directory: Path) -> Path:
    """A byte-level tokenizer of several scripts, with an ordinary and a special token added at the end."""
    tokenizer = Tokenizer.from_file(str(small_byte_level(directory) / "tokenizer.json"))
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((*SENTENCES, *TRICKY, *MANY_SCRIPTS * 4), trainer)
    tokenizer.add_tokens(["Ａｐｐｌｅ ", "   "])
    tokenizer.add_special_tokens(["<|Start｜>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def stripping(directory: Path) -> Path:
    """A tokenizer whose decoder drops a leading space, as Llama's does: the lone space has the text ""."""
    tokenizer = Tokenizer.from_file(str(small_metaspace(directory) / "tokenizer.json"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("tokenizers")
    symbols = ["▁▁", "▁▁▁▁", "\n", "\n\n", "ÁPPLE", "▁apple", "Ａｐｐｌｅ", "THE", "▁ﬁne", "fine", "\u0301"]
    return {
        "byte_level": small_byte_level(directory / "byte_level"),
        "many_scripts": many_scripts(directory / "many_scripts"),
        "metaspace": small_metaspace(directory / "metaspace"),
        "stripping": stripping(directory / "stripping"),
        "sentencepiece": small_sentencepiece(directory),
        "dummy_prefix": small_sentencepiece(directory, "prefix.model", add_dummy_prefix=True),
        "spaces_symbol": small_sentencepiece(directory, "symbols.model", user_defined_symbols=symbols),
    }


def compressed(path: Path) -> CompressedVocabulary:
    return compress_vocabulary(load_tokenizer(path))


def texts_and_strings(path: Path) -> tuple[list[str], list[str]]:
    """Every id's text and spelling, read from the file itself."""
    if path.is_dir():
        description = json.loads((path / "tokenizer.json").read_text())
        vocabulary = dict(description["model"]["vocab"])
        special = {entry["content"]: entry["id"] for entry in description["added_tokens"]}
        byte_level = description["decoder"]["type"] == "ByteLevel"
        strings = [string for string, _ in sorted((vocabulary | special).items(), key=lambda item: item[1])]
        return [piece_text(string, byte_level, string in special) for string in strings], strings
    pieces = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes()).pieces
    named = [each.type in (each.UNKNOWN, each.CONTROL) for each in pieces]
    strings = [each.piece for each in pieces]
    return [piece_text(string, False, name) for string, name in zip(strings, named, strict=True)], strings


def piece_text(piece: str, byte_level: bool, by_name: bool) -> str:
    if by_name:
        return piece
    if byte_level:
        # The characters of the bytes that Latin-1 prints are these bytes; the others count on from U+0100.
        others = [byte for byte in range(256) if not 0x21 <= byte <= 0x7E and not (byte >= 0xA1 and byte != 0xAD)]
        data = bytes(others[ord(each) - 0x100] if each >= "\u0100" else ord(each) for each in piece)
        return data.decode(errors="replace")
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5]).decode(errors="replace")
    return piece.replace("▁", " ")


@pytest.mark.parametrize("make", [word_tokenizer, piece_tokenizer])
def test_texts_become_one_as_worked_out_by_hand(make: Callable[[Path, list[str]], Path], tmp_path: Path) -> None:
    table = dict(TABLE)
    vocabulary = compressed(make(tmp_path, list(table)))
    assert dict(zip(table, vocabulary.ids.tolist(), strict=True)) == table
    assert vocabulary.size == max(table.values()) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_an_independent_reading_of_the_file(kind: str, paths: dict[str, Path]) -> None:
    texts, strings = texts_and_strings(paths[kind])
    tokenizer = load_tokenizer(paths[kind])
    assert [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)] == texts
    assert [tokenizer.token_string(token) for token in range(tokenizer.vocab_size)] == strings
    vocabulary = compress_vocabulary(tokenizer)
    assert vocabulary.ids.tolist() == expected_ids(texts, strings)
    assert vocabulary.size < tokenizer.vocab_size


def test_characters_and_words_of_many_scripts_become_what_pythons_tables_say(tmp_path: Path) -> None:
    # Characters after Unicode 3.2 are left out: the two libraries know different versions of it.
    # So are most Han and Hangul characters, which are many and go by one rule each.
    known = unicodedata.ucd_3_2_0
    codes = (*range(0x3400), *range(0x3400, 0xD800, 64), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA1E))
    characters = [chr(code) for code in codes if known.category(chr(code)) not in ("Cn", "Co")]
    generator = random.Random(0)
    words = ["".join(generator.choices(characters, k=generator.randrange(2, 5))) for _ in range(5_000)]
    spelt = list(dict.fromkeys(text.replace(" ", "▁") for text in ("<unk>", "</s>", *characters, *words)))
    texts = [string.replace("▁", " ") for string in spelt]
    vocabulary = compressed(word_tokenizer(tmp_path, spelt))
    assert len(spelt) > 15_000 and vocabulary.size < 0.95 * len(spelt)
    assert vocabulary.ids.tolist() == expected_ids(texts, spelt)


@pytest.mark.parametrize("kind", ["byte_level", "many_scripts", "metaspace", "stripping"])
def test_texts_and_strings_are_those_of_transformers(kind: str, paths: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(paths[kind])
    ours = load_tokenizer(paths[kind])
    texts = [theirs.decode([token], skip_special_tokens=False) for token in range(len(theirs))]
    strings = [theirs.convert_ids_to_tokens(token) for token in range(len(theirs))]
    assert ours.vocab_size == len(theirs)
    assert [ours.token_text(token) for token in range(len(theirs))] == texts
    assert [ours.token_string(token) for token in range(len(theirs))] == strings
    assert compress_vocabulary(ours).ids.tolist() == expected_ids(texts, strings)


def test_an_id_that_the_vocabulary_leaves_out_has_the_empty_text_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = word_tokenizer(tmp_path, ["<unk>", "</s>", None, "A", None, "b", "a", "c"])
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert len(theirs) == ours.vocab_size == 6
    assert theirs.decode([2]) == ours.token_text(2) == "" == ours.token_string(2)
    assert compress_vocabulary(ours).ids.tolist() == [0, 1, 2, 3, 2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_id_is_the_rank_of_its_first_token_id(kind: str, paths: dict[str, Path]) -> None:
    vocabulary = compressed(paths[kind])
    highest = np.maximum.accumulate(vocabulary.ids)
    assert vocabulary.ids[0] == 0 and (np.diff(highest) <= 1).all() and (vocabulary.ids >= 0).all()
    assert np.unique(vocabulary.ids).size == vocabulary.size == highest[-1] + 1
    assert vocabulary.ids.dtype == np.int32 and vocabulary.ids.shape == (load_tokenizer(paths[kind]).vocab_size,)
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.ids[0] = 1


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "sentencepiece"])
def test_bytes_of_unfinished_characters_stay_apart_and_ascii_bytes_are_characters(
    kind: str, paths: dict[str, Path]
) -> None:
    tokenizer = load_tokenizer(paths[kind])
    tokens = {tokenizer.token_string(token): token for token in range(tokenizer.vocab_size)}
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "byte_level":
        names[:128] = [mapped.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)]
        names[128:] = sorted(set(mapped.alphabet()) - set(names[:128]))
    ids = compress_vocabulary(tokenizer).ids
    of_byte = ids[[tokens[name] for name in names]]
    counts = np.bincount(ids)
    assert (counts[of_byte[128:]] == 1).all()
    assert np.unique(of_byte[:128]).size == 128 - 26 - 3  # capitals, and \t \n \r beside the space
    assert len({of_byte[ord(each)] for each in " \t\r\n"}) == 1 and of_byte[ord("Q")] == of_byte[ord("q")]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_become_one_with_no_other(kind: str, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[kind])
    names = ["<unk>", "<s>", "</s>"] if tokenizer.kind == "sentencepiece" else ["<|pad|>", "<|endoftext|>"]
    names = ["<unk>", "</s>"] if kind == "metaspace" else names
    assert [tokenizer.token_text(token) for token in range(len(names))] == names
    ids = compress_vocabulary(tokenizer).ids
    assert (np.bincount(ids)[ids[: len(names)]] == 1).all() and tokenizer.eod < len(names)


def test_compressing_what_is_compressed_changes_nothing(tmp_path: Path) -> None:
    first = {}
    for text, rank in TABLE[:-1]:  # the last one's key begins with a space, which another pass would strip
        first.setdefault(rank, text if "\ufffd" in text else meaning(text) or text)
    again = compressed(word_tokenizer(tmp_path, first.values()))
    assert again.ids.tolist() == list(range(len(first)))


def test_the_same_file_gives_the_same_ids_and_digest(paths: dict[str, Path]) -> None:
    for path in paths.values():
        first, second = compressed(path), compressed(path)
        assert (first.ids == second.ids).all() and first.digest == second.digest
    assert len({compressed(path).digest for path in paths.values()}) == len(paths)


def test_the_digest_is_that_of_the_ids_bytes_and_follows_them(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "a", "A", "b"]
    vocabulary = compressed(word_tokenizer(tmp_path / "first", words))
    data = bytes(byte for rank in (0, 1, 2, 2, 3) for byte in (rank, 0, 0, 0))
    assert vocabulary.digest == hashlib.sha256(data).hexdigest()
    moved = compressed(word_tokenizer(tmp_path / "moved", ["<unk>", "</s>", "a", "b", "A"]))
    assert moved.size == vocabulary.size and moved.digest != vocabulary.digest
