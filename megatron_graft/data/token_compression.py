"""Engram's compression of token ids (arXiv 2601.07372, section 2.2): ids whose texts mean the same become one.

Ids are taken in ascending order. The key of an id is its text, decoded alone and normalised (compatibility forms,
accents, case and white space go), or the text itself where normalisation leaves nothing of it. Where the text is no
whole character (it holds U+FFFD), the key is the id's spelling in the vocabulary. The first id with a key makes the
next compressed id.

All keys are of one kind, as published: a fragment of a character that the vocabulary spells like another id's
normalised text becomes one with that id, and U+E000 counts as a space.

The published code reads Hugging Face tokenizers only; for a ``tokenizer.json`` file the ids here are the same as its.
How SentencePiece models, which it does not read, give each piece a text is said at
:meth:`megatron_graft.data.tokenizer.SentencePieceTokenizer.token_text`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_graft.data.tokenizer import TextTokenizer

_BROKEN = "\ufffd"  # what a decoder makes of bytes that are no character
_LONE_SPACE = "\ue000"  # a private character, in whose stead a text of one space outlives the stripping


@dataclass(frozen=True, kw_only=True)
class CompressedVocabulary:
    """What a tokenizer's ids become.

    Attributes:
        ids: int32 ``[V]``, read-only: the compressed id of every token id. A compressed id is the rank of its
            first token id among the first ones of all.
        size: V', number of compressed ids.
    """

    ids: np.ndarray
    size: int

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the ids' bytes, little-endian."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()


def compress_vocabulary(tokenizer: TextTokenizer) -> CompressedVocabulary:
    """Compress the ids ``0 .. tokenizer.vocab_size - 1``; the same tokenizer always gives the same ids.

    Ids by which Megatron pads a vocabulary are none of them: no text holds one.
    """
    normalise = _normaliser()
    compressed: dict[str, int] = {}
    ids = np.empty(tokenizer.vocab_size, dtype=np.int32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token)
        key = tokenizer.token_string(token) if _BROKEN in text else normalise(text) or text
        ids[token] = compressed.setdefault(key, len(compressed))
    ids.flags.writeable = False
    return CompressedVocabulary(ids=ids, size=len(compressed))


def _normaliser() -> Callable[[str], str]:
    """The published sequence. White space becomes one space each, and goes at the ends unless it is all there is."""
    from tokenizers import Regex, normalizers

    sequence = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
    normalise: Callable[[str], str] = sequence.normalize_str
    return normalise
