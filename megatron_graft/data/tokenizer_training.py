"""Train a SentencePiece model on the training split, the same bytes from the same text on every machine.

The settings, and why:

* BPE with byte fallback: every text can be written, and no id is ever unknown;
* ``identity`` normalisation, extra spaces kept, no dummy prefix: text is not altered: the joined pieces of
  an encoded document are the document, letter for letter, and an n-gram's text is what stood in the corpus;
* ``</s>`` is id 2 and is what Megatron reports as EOD;
* the trainer sees lines, so a line break stays the byte piece ``<0x0A>`` and no piece spans it.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_graft.data.jsonl import read_texts, require_text_file
from megatron_graft.data.sources import stable_hash
from megatron_graft.data.tokenizer import SentencePieceTokenizer
from megatron_graft.errors import ConfigError, CorpusError, TokenizerError
from megatron_graft.files import sha256_of_file, write_bytes_atomically, write_json_atomically
from megatron_graft.log import format_seconds, get_logger

MODEL_NAME = "tokenizer.model"
RECORD_NAME = "tokenizer_training.json"
VOCAB_SIZE = 8192
MAX_BYTES = 200_000_000
_PIECE_CHARACTERS = 1000  # the trainer drops lines above 4,192 bytes; a character is at most 4 bytes
_SMALLEST_VOCAB = 3 + 256  # control tokens and the byte pieces


def train_tokenizer(
    inputs: Sequence[Path],
    directory: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    json_key: str = "text",
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write ``tokenizer.model`` into ``directory``, or find it there, made from the same text and settings.

    Args:
        inputs: JSONL files of the training split.
        directory: where the model and the record of its making go.
        vocab_size: number of ids, the 256 byte pieces and 3 control tokens included.
        json_key: member that holds the text.
        max_bytes: above this much input, whole documents are sampled by the hash of their text.

    Returns:
        The path of the model.

    Raises:
        ConfigError: the vocabulary is smaller than its fixed part.
        CorpusError: an input is missing, empty or malformed.
        TokenizerError: the text is too little for the vocabulary.
        StorageError: the directory cannot be written.
    """
    if vocab_size <= _SMALLEST_VOCAB:
        raise ConfigError(
            "--vocab-size",
            "is too small",
            got=vocab_size,
            expected=f"more than {_SMALLEST_VOCAB} (bytes and controls)",
        )
    for path in inputs:
        require_text_file(path, "--input")
    model, record_path = directory / MODEL_NAME, directory / RECORD_NAME
    settings = {
        "inputs": [sha256_of_file(path) for path in inputs],
        "json_key": json_key,
        "max_bytes": max_bytes,
        "trainer": _trainer_options(vocab_size),
    }
    if _is_finished(model, record_path, settings):
        get_logger().info("tokenizer %s is complete: nothing to do", model)
        return model
    data = _train(inputs, vocab_size, json_key, max_bytes)
    record_path.unlink(missing_ok=True)  # so that a stop between the two writes is seen as unfinished
    write_bytes_atomically(model, data)
    fingerprint = SentencePieceTokenizer(model).fingerprint
    write_json_atomically(record_path, {"fingerprint": fingerprint, "settings": settings})
    return model


def _trainer_options(vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
    }


def _is_finished(model: Path, record_path: Path, settings: dict[str, Any]) -> bool:
    if not model.is_file() or not record_path.is_file():
        return False
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        return bool(
            record["settings"] == settings and record["fingerprint"] == SentencePieceTokenizer(model).fingerprint
        )
    except (ValueError, KeyError, TypeError, TokenizerError):
        return False


def _train(inputs: Sequence[Path], vocab_size: int, json_key: str, max_bytes: int) -> bytes:
    import sentencepiece

    start = time.monotonic()
    input_bytes = sum(path.stat().st_size for path in inputs)
    get_logger().info(
        "training a SentencePiece model of %s pieces on %s bytes",
        f"{vocab_size:,}", f"{min(input_bytes, max_bytes):,}",
    )  # fmt: skip
    buffer = io.BytesIO()
    sentences = _Sentences(inputs, json_key, min(1.0, max_bytes / input_bytes))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            minloglevel=2,
            **_trainer_options(vocab_size),
        )
    except (RuntimeError, OSError) as error:
        if sentences.fault is not None:
            raise sentences.fault from error
        raise TokenizerError(
            "--vocab-size",
            f"cannot be trained on this text: {error}",
            got=f"{vocab_size:,} pieces, {input_bytes:,} bytes of input",
            remedy="Lower --vocab-size or give more text.",
        ) from error
    get_logger().info("trained in %s", format_seconds(time.monotonic() - start))
    return buffer.getvalue()


class _Sentences:
    """The trainer's input. The C++ trainer loses an error raised in here, so it is kept in ``fault``."""

    def __init__(self, inputs: Sequence[Path], json_key: str, share: float) -> None:
        self.inputs, self.json_key, self.share = inputs, json_key, share
        self.fault: CorpusError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for path in self.inputs:
                for _, text in read_texts(path, self.json_key):
                    if self.share >= 1.0 or stable_hash(text) < self.share * 2**64:
                        yield from split_into_lines(text)
        except CorpusError as error:
            self.fault = error
            raise


def split_into_lines(text: str) -> Iterator[str]:
    """Lines of a text, long ones cut before a space, where a piece ends anyway."""
    for line in text.split("\n"):
        while len(line) > _PIECE_CHARACTERS:
            cut = line.rfind(" ", 1, _PIECE_CHARACTERS)
            cut = cut if cut > 0 else _PIECE_CHARACTERS
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line
