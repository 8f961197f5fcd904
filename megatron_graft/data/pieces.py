"""What every token id stands for in bytes. The text of an n-gram is the bytes of its pieces, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.errors import TokenizerError

SPACE_MARK = "\u2581"  # SentencePiece's visible space


class PieceTable:
    """The UTF-8 bytes of each id; None for an id that stands for no text (control, unknown, special tokens).

    Why bytes and not the tokenizer's own ``decode``: ``decode`` strips the leading space of a fragment,
    replaces broken characters by U+FFFD and prints special tokens as if they were text.
    """

    def __init__(self, bytes_of_ids: Sequence[bytes | None]) -> None:
        self._bytes_of_ids = bytes_of_ids
        self.num_bytes = np.array([len(piece or b"") for piece in bytes_of_ids], dtype=np.int32)
        self.num_bytes.flags.writeable = False

    def decoded(self, token: int) -> str | None:
        """One id's own text with U+FFFD for a broken character, or None if it stands for no text."""
        piece = self._bytes_of_ids[token]
        return None if piece is None else piece.decode("utf-8", errors="replace")

    def text(self, ids: Sequence[int]) -> str | None:
        """The ids' own text with its leading space, or None if it is no valid text."""
        pieces = []
        for token in ids:
            piece = self._bytes_of_ids[token] if 0 <= token < len(self._bytes_of_ids) else None
            if piece is None:
                return None
            pieces.append(piece)
        try:
            return b"".join(pieces).decode("utf-8")
        except UnicodeDecodeError:
            return None


def sentencepiece_table(processor: Any) -> PieceTable:
    """The table of a loaded ``sentencepiece.SentencePieceProcessor``."""
    bytes_of_ids: list[bytes | None] = []
    for token in range(processor.get_piece_size()):
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            bytes_of_ids.append(bytes([int(piece[3:5], 16)]))  # <0xNN>
        elif processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            bytes_of_ids.append(None)
        else:
            bytes_of_ids.append(piece.replace(SPACE_MARK, " ").encode())
    return PieceTable(bytes_of_ids)


def huggingface_table(path: Path, vocabulary: dict[str, int]) -> PieceTable:
    """The table of a ``tokenizer.json`` file.

    Args:
        path: the file, for its decoder and its added tokens.
        vocabulary: piece -> id, added tokens included.

    Raises:
        TokenizerError: the decoder is neither byte-level nor SentencePiece-like: a piece alone has no text.
    """
    description = json.loads(path.read_bytes())
    kinds = _decoder_kinds(description.get("decoder"))
    added = {entry["id"]: entry for entry in description.get("added_tokens", [])}
    unknown = (description.get("model") or {}).get("unk_token")
    byte_of_character = _byte_of_character() if "ByteLevel" in kinds else None
    if byte_of_character is None and not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise TokenizerError(
            path,
            "has pieces that are no text on their own",
            got=f"decoder {sorted(kinds) or None}",
            expected="a byte-level or SentencePiece-like decoder",
        )
    bytes_of_ids: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        if token in added:
            bytes_of_ids[token] = None if added[token].get("special") else piece.encode()
        elif piece == unknown:
            bytes_of_ids[token] = None
        elif byte_of_character is not None:
            bytes_of_ids[token] = _byte_level_bytes(piece, byte_of_character)
        else:
            bytes_of_ids[token] = _metaspace_bytes(piece, "ByteFallback" in kinds)
    return PieceTable(bytes_of_ids)


def _byte_level_bytes(piece: str, byte_of_character: dict[str, int]) -> bytes | None:
    """None for a piece that no text becomes: a placeholder's characters stand for no bytes."""
    if not byte_of_character.keys() >= set(piece):
        return None
    return bytes(byte_of_character[character] for character in piece)


def _metaspace_bytes(piece: str, byte_fallback: bool) -> bytes:
    if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return {decoder["type"]}


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: itself where printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
