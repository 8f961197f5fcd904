"""Small real tokenizers for tests, trained on the spot in some milliseconds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = (
    "The sea was calm and the whale was near.",
    "A man who had seen the whale told of it, and the crew heard him in silence.",
    "We hold that the people of the several States are one people; they are free.",
    "Nobody had seen the sea so calm, nor the sky so wide: so they said.",
)
TRICKY = (
    " leading space",
    "two  spaces and a tab\there",
    "line one\n\n  line two\n",
    "naïve “quotes”, ﬁ and 汉字 with 🙂",
    "</s> <unk> <0x0A> are only text",
    "trailing space ",
)


def small_sentencepiece(directory: Path, name: str = "small.model", **options: Any) -> Path:
    """A SentencePiece BPE model of 400 pieces; ``options`` override the trainer's."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "num_threads": 1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **(settings | options)
    )
    path = directory / name
    path.write_bytes(model.getvalue())
    return path


def small_byte_level(directory: Path, *, end_token: str | None = "<|endoftext|>") -> Path:
    """The directory of a byte-level BPE ``tokenizer.json``, as GPT-2 and SmolLM2 have one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _save(tokenizer, directory, end_token)


def small_metaspace(directory: Path) -> Path:
    """The directory of a SentencePiece-like ``tokenizer.json`` with byte fallback, as Llama has one."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehiklnostuw"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return _save(tokenizer, directory, "</s>")


def _save(tokenizer: Tokenizer, directory: Path, end_token: str | None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end_token is not None:
        config["eos_token"] = end_token
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
