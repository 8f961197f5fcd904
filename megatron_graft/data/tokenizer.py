"""Text to ids exactly as Megatron's own tokenizers give them in training, and ids back to an n-gram's text.

==================  ===============================  =========================================
file                Megatron's ``--tokenizer-type``  EOD, as Megatron chooses it
==================  ===============================  =========================================
``*.model``         ``SentencePieceTokenizer``       the model's end-of-sentence id
``tokenizer.json``  ``HuggingFaceTokenizer``         ``eos_token`` of ``tokenizer_config.json``
==================  ===============================  =========================================

Megatron takes the directory of a ``tokenizer.json``; :func:`load_tokenizer` takes either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_graft.data.pieces import PieceTable, huggingface_table, sentencepiece_table
from megatron_graft.errors import TokenizerError

Kind = Literal["sentencepiece", "huggingface"]
MEGATRON_TYPES: dict[Kind, str] = {
    "sentencepiece": "SentencePieceTokenizer",
    "huggingface": "HuggingFaceTokenizer",
}


class TextTokenizer(Protocol):
    """What the pipeline needs of a tokenizer.

    Attributes:
        path: the file it was read from.
        kind: which library reads it.
        vocab_size: number of ids, before Megatron pads it.
        eod: id of the token that ends a document.
        fingerprint: hex SHA-256 over the kind and the file's bytes.
        num_bytes_of_ids: int32 ``[largest id + 1]``, UTF-8 bytes each id stands for (0: none).
    """

    @property
    def path(self) -> Path: ...  # noqa: D102
    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def eod(self) -> int: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def num_bytes_of_ids(self) -> np.ndarray: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """The ids Megatron's tokenizer gives for ``text``; no EOD is added."""
        ...

    def ngram_text(self, ids: Sequence[int]) -> str | None:
        """The ids' own text, leading space kept; None if they hold a special token or a broken character."""
        ...

    def token_text(self, token: int) -> str:
        """One id of ``0 .. vocab_size - 1`` decoded alone: special tokens by name, U+FFFD for broken characters."""
        ...

    def token_string(self, token: int) -> str:
        """One id of ``0 .. vocab_size - 1`` as the vocabulary spells it; "" for an id that it leaves out."""
        ...


class _LoadedTokenizer:
    """What both kinds share: identity and the piece table."""

    kind: Kind

    def __init__(self, path: Path, vocab_size: int, eod: int, pieces: PieceTable) -> None:
        self.path, self.vocab_size, self.eod = path, vocab_size, eod
        self.fingerprint = hashlib.sha256(self.kind.encode() + b"\0" + path.read_bytes()).hexdigest()
        self._pieces = pieces
        self.num_bytes_of_ids = pieces.num_bytes

    def ngram_text(self, ids: Sequence[int]) -> str | None:
        return self._pieces.text(ids)


class SentencePieceTokenizer(_LoadedTokenizer):
    """A SentencePiece ``.model`` file."""

    kind: Kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, TypeError) as error:
            raise TokenizerError(
                path, f"is not a SentencePiece model: {error}", expected="a .model file of SentencePiece"
            ) from error
        eod = processor.eos_id()
        if eod < 0:
            raise TokenizerError(
                path,
                "has no end-of-sentence token, and Megatron ends documents with it",
                got=f"eos_id {eod}",
                expected="a model trained with an eos_id",
                remedy="Train one with tools/train_tokenizer.py.",
            )
        super().__init__(path, processor.get_piece_size(), eod, sentencepiece_table(processor))
        self._processor = processor

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, as ``SentencePieceProcessor.encode_as_ids`` gives them."""
        ids: list[int] = self._processor.encode_as_ids(text)
        return ids

    def token_text(self, token: int) -> str:
        """The piece with its leading space; a byte piece's character, U+FFFD from 0x80 on; special tokens by name.

        Why not ``SentencePieceProcessor.decode``: it drops the leading space, so the lone space would have no
        text, and it gives all control pieces the same one, "". The wrappers of transformers differ in the
        space from version to version. Once a text is stripped, only the lone space tells them apart.
        """
        text = self._pieces.decoded(token)
        return self.token_string(token) if text is None else text

    def token_string(self, token: int) -> str:
        """The piece as the model holds it: "\u2581" for a space, "<0x0A>" for a byte."""
        piece: str = self._processor.id_to_piece(token)
        return piece


class HuggingFaceTokenizer(_LoadedTokenizer):
    """A Hugging Face ``tokenizer.json`` file with its ``tokenizer_config.json`` beside it."""

    kind: Kind = "huggingface"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                path,
                f"is not a tokenizer file: {error}",
                expected="a tokenizer.json of Hugging Face tokenizers",
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        eod = _end_token(path, vocabulary)
        super().__init__(path, len(vocabulary), eod, huggingface_table(path, vocabulary))
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` with the special tokens that the file's post-processor adds, as in Megatron."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    def token_text(self, token: int) -> str:
        """What the file's own decoder makes of the id: what transformers' ``decode([token])`` gives for the file.

        Two settings of ``tokenizer_config.json`` have no part in it: ``clean_up_tokenization_spaces``, which
        transformers 5 ignores for BPE vocabularies, and a ``tokenizer_class`` that brings another decoder.
        """
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text

    def token_string(self, token: int) -> str:
        """The id's entry in the vocabulary or among the added tokens."""
        piece: str | None = self._tokenizer.id_to_token(token)
        return piece or ""


def load_tokenizer(path: Path | str) -> TextTokenizer:
    """Open a SentencePiece ``.model`` file, a ``tokenizer.json`` file, or the directory of one.

    Raises:
        TokenizerError: there is no such file, it cannot be read, or it names no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            path,
            "does not exist",
            expected="a SentencePiece .model file, a tokenizer.json file or its directory",
            remedy="Train one with tools/train_tokenizer.py.",
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if ".model" in path.suffixes:
        return SentencePieceTokenizer(path)
    raise TokenizerError(path, "is of an unknown kind", got=path.name, expected="*.model or tokenizer.json")


def _end_token(path: Path, vocabulary: dict[str, int]) -> int:
    config_path = path.parent / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(config_path, f"is not valid JSON: {error}") from error
    # Megatron lets a separator stand in for a missing end-of-sentence token.
    token = config.get("eos_token") or config.get("sep_token")
    name = token.get("content") if isinstance(token, dict) else token
    if name not in vocabulary:
        raise TokenizerError(
            config_path,
            "names no end-of-sentence token of the vocabulary, and Megatron ends documents with it",
            got=name,
            expected='"eos_token": one of the tokens in tokenizer.json',
        )
    return vocabulary[name]


def megatron_arguments(tokenizer: TextTokenizer) -> list[str]:
    """Arguments that make Megatron build the same tokenizer (a ``tokenizer.json`` by its directory)."""
    model = tokenizer.path.parent if tokenizer.kind == "huggingface" else tokenizer.path
    return ["--tokenizer-type", MEGATRON_TYPES[tokenizer.kind], "--tokenizer-model", str(model)]
