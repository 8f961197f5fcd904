"""A recipient, its data and a donor, made once for the room."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from tests.helpers.building import make_documents, save_llama, write_data_set
from tests.helpers.tokenizers import small_sentencepiece


@pytest.fixture(scope="session")
def recipient(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(small_sentencepiece(tmp_path_factory.mktemp("recipient")))


@pytest.fixture(scope="session")
def token_lists(recipient: TextTokenizer) -> list[list[int]]:
    return [[*recipient.encode(text), recipient.eod] for text in make_documents(40)]


@pytest.fixture(scope="session")
def data_prefix(
    recipient: TextTokenizer, token_lists: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> str:
    prefix = tmp_path_factory.mktemp("data") / "train_text_document"
    write_sidecar(prefix, recipient)
    return write_data_set(prefix, token_lists)


@pytest.fixture(scope="session")
def donor_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("donors") / "tiny-llama")
