"""The donor's side of a text: its own token ids, with one beginning-of-sequence token in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_graft.errors import DonorError

_END_OF_TEXT = "<|endoftext|>"
_ANCHOR = "\n"
_SPACE_MARKS = ("▁", "Ġ")


class DonorText:
    """Turns texts into donor ids, exactly as they would stand in the middle of running text.

    A BOS token always comes first: the first position of a sequence is an attention sink with a state unlike
    any other, and a text of one donor token would sit there. A donor without a BOS token gets, in this order,
    its configuration's ``bos_token_id``, its ``<|endoftext|>`` token (what such models see between
    documents), or its end-of-sequence token; ``bos_source`` says which.

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's configuration.
        subject: the donor's directory, for messages.

    Raises:
        DonorError: there is no token to begin with.
    """

    def __init__(self, tokenizer: Any, config: Any, subject: object) -> None:
        self._tokenizer = tokenizer
        self.bos_id, self.bos_source = _first_token(tokenizer, config, subject)
        # SentencePiece-style donors put a space of their own before a text: " of" would get two.
        self._adds_space = _adds_space(tokenizer)
        self._anchor_ids = self._plain([_ANCHOR])[0] if self._adds_space else []

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """Donor ids of every text, BOS first. Strings that look like special tokens are read as text."""
        if self._adds_space:
            return [[self.bos_id, *ids] for ids in self._anchored(texts)]
        return [[self.bos_id, *ids] for ids in self._plain(texts)]

    def text(self, ids: Sequence[int]) -> str:
        """The text that donor ids spell, for messages."""
        return str(self._tokenizer.decode(list(ids)))

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _anchored(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise behind a line break and take the line break's ids off again."""
        size = len(self._anchor_ids)
        behind = self._plain([_ANCHOR + text for text in texts])
        plain = self._plain(texts)
        return [
            ids[size:] if ids[:size] == self._anchor_ids and len(ids) > size else alone
            for ids, alone in zip(behind, plain, strict=True)
        ]


def _first_token(tokenizer: Any, config: Any, subject: object) -> tuple[int, str]:
    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id), "bos_token"
    configured = getattr(config, "bos_token_id", None)
    if isinstance(configured, int) and 0 <= configured < len(tokenizer):
        return configured, "config.bos_token_id"
    if _END_OF_TEXT in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(_END_OF_TEXT)), _END_OF_TEXT
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id), "eos_token"
    raise DonorError(
        subject,
        "its tokenizer has no token to begin a text with",
        expected=f"a BOS, {_END_OF_TEXT} or EOS token",
        remedy="Add bos_token to its tokenizer_config.json.",
    )


def _adds_space(tokenizer: Any) -> bool:
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return str(first).startswith(_SPACE_MARKS)
