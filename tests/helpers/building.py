"""What building works on, in miniature: text whose n-grams repeat, Megatron data sets, tiny random donors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers.tokenizers import SENTENCES, TRICKY, small_byte_level

HIDDEN_SIZE = 32
NUM_LAYERS = 2


def make_documents(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of a few sentences each."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(SENTENCES + TRICKY, k=choose.randint(1, 4))) for _ in range(num_documents)]


def write_data_set(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> str:
    """Write token lists in Megatron's format with Megatron's own writer; return the prefix as a string."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def save_llama(directory: Path, *, seed: int = 5, **options: Any) -> Path:
    """A random Llama of two layers, width 32, with its byte-level tokenizer, as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small_byte_level(directory)
    settings = {
        "vocab_size": 400,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | options))).save_pretrained(directory)
    return directory


def save_gpt2(directory: Path, seed: int = 5) -> Path:
    """A random GPT-2 of the same size: another layout of modules, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small_byte_level(directory)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=400, n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


DONOR_FAMILIES: dict[str, Callable[[Path], Path]] = {"llama": save_llama, "gpt2": save_gpt2}
