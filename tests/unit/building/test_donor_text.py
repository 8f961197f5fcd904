from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers

from megatron_graft.building.donor_text import DonorText
from megatron_graft.errors import DonorError
from tests.helpers.tokenizers import small_byte_level

NO_BOS = SimpleNamespace(bos_token_id=None)


def byte_level(directory: Path, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = small_byte_level(directory) / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), split_special_tokens=True, **special)


def with_own_space() -> Any:
    """A tokenizer that puts a space before every text, as Llama's SentencePiece tokenizer does."""
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "▁t",
        "he",
        "▁the",
    ]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_every_text_begins_with_one_bos(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path, bos_token="<|pad|>")
    text = DonorText(tokenizer, NO_BOS, "donor")
    assert (text.bos_id, text.bos_source) == (tokenizer.bos_token_id, "bos_token")
    assert text.token_lists([" the", "x"]) == [[0, *tokenizer.encode(" the")], [0, *tokenizer.encode("x")]]


@pytest.mark.parametrize(
    ("special", "configured", "source", "token"),
    [
        ({"bos_token": "<|pad|>"}, 5, "bos_token", 0),
        ({}, 5, "config.bos_token_id", 5),
        ({}, None, "<|endoftext|>", 1),
        ({"eos_token": "<|pad|>"}, 100_000, "<|endoftext|>", 1),
    ],
)
def test_a_donor_without_bos_gets_the_next_best_token(
    tmp_path: Path, special: dict[str, str], configured: int | None, source: str, token: int
) -> None:
    text = DonorText(byte_level(tmp_path, **special), SimpleNamespace(bos_token_id=configured), "donor")
    assert (text.bos_source, text.bos_id) == (source, token)


def test_the_end_token_is_the_last_resort_and_none_is_refused() -> None:
    tokenizer = with_own_space()
    tokenizer.bos_token = None
    with pytest.raises(DonorError, match="no token to begin a text"):
        DonorText(tokenizer, NO_BOS, "donor")
    tokenizer.eos_token = "<s>"
    assert DonorText(tokenizer, NO_BOS, "donor").bos_source == "eos_token"


def test_a_donor_that_adds_a_space_reads_texts_as_in_mid_sentence() -> None:
    tokenizer = with_own_space()
    pieces = [
        tokenizer.convert_ids_to_tokens(ids) for ids in DonorText(tokenizer, NO_BOS, "d").token_lists([" the", "the"])
    ]
    assert pieces == [["<s>", "▁the"], ["<s>", "t", "he"]]


def test_what_looks_like_a_special_token_is_text(tmp_path: Path) -> None:
    (tokens,) = DonorText(byte_level(tmp_path, bos_token="<|pad|>"), NO_BOS, "donor").token_lists(["<|endoftext|>"])
    assert 1 not in tokens and len(tokens) > 3
