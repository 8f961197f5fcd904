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
_SIZES = {
    "vocab_size": 400,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "initializer_range": 0.3,
}


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


def _save(directory: Path, model_class: Any, config: Any, seed: int) -> Path:
    small_byte_level(directory)
    torch.manual_seed(seed)
    model_class(config).save_pretrained(directory)
    return directory


def save_llama(directory: Path, *, seed: int = 5, **options: Any) -> Path:
    """A random Llama of two layers, width 32, with its byte-level tokenizer, as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(directory, LlamaForCausalLM, LlamaConfig(**(_SIZES | options)), seed)


def save_qwen2(directory: Path, *, seed: int = 5) -> Path:
    """A random Qwen2 of the same size: biases, grouped keys, layers that say which mask they take."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _save(directory, Qwen2ForCausalLM, Qwen2Config(**_SIZES, num_key_value_heads=2), seed)


def save_gemma3(directory: Path, *, seed: int = 5, sliding_window: int = 32) -> Path:
    """A random Gemma 3 of the same size: a layer with a sliding window and one without, each its own positions."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_SIZES, num_key_value_heads=1, head_dim=16, sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return _save(directory, Gemma3ForCausalLM, config, seed)


def save_gpt2(directory: Path, seed: int = 5) -> Path:
    """A random GPT-2 of the same size: another layout of modules, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=400, n_embd=HIDDEN_SIZE, n_layer=NUM_LAYERS, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return _save(directory, GPT2LMHeadModel, config, seed)


def save_mamba(directory: Path, seed: int = 5) -> Path:
    """A random Mamba of the same size: no attention, so no tree mask."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=400, hidden_size=HIDDEN_SIZE, num_hidden_layers=NUM_LAYERS, state_size=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return _save(directory, MambaForCausalLM, config, seed)


TREE_FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": save_llama,
    "qwen2": save_qwen2,
    "gemma3": save_gemma3,
    "gpt2": save_gpt2,
}
"""Donors that follow a tree mask."""

DONOR_FAMILIES = TREE_FAMILIES | {"mamba": save_mamba}
