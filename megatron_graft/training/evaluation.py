"""Loss of a trained run on whole data sets: in nats and bits per byte, by length of match, memory on and off.

Documents are read in order, with their EOD tokens, in windows of the run's sequence length; every token but the first
is predicted once. One process, whatever layout was trained.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_graft.data.memory_fetcher import MemoryFetcher
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.errors import DataError
from megatron_graft.log import Progress
from megatron_graft.lookup.index import SuffixIndex
from megatron_graft.memory.site import MemorySite
from megatron_graft.training.count_baseline import BigramModel
from megatron_graft.training.forward_step import run_model

MISS = "miss"


@dataclass(frozen=True)
class EvaluationText:
    """A data set as one row of tokens.

    Attributes:
        tokens: int64 ``[N]``, documents in order, EOD tokens included.
        num_bytes: UTF-8 bytes of the text that the predicted tokens (all but the first) spell.
    """

    tokens: np.ndarray
    num_bytes: int

    @classmethod
    def read(cls, prefix: str, tokenizer: TextTokenizer, split: str | None = None) -> EvaluationText:
        """Read a ``.bin/.idx`` pair; with Megatron's ``--split`` of a run, only its validation share.

        Raises:
            DataError: it is missing, or there is nothing in it.
        """
        if not IndexedDataset.exists(prefix):
            raise DataError(f"data set {prefix}", "does not exist", expected=f"{prefix}.bin and {prefix}.idx")
        documents = IndexedDataset(prefix)
        entries = range(len(documents)) if split is None else validation_entries(split, len(documents))
        parts = [np.asarray(documents[index], dtype=np.int64) for index in entries]
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        if tokens.size < 2:
            whole = "" if split is None else f" in its validation share, --split {split}"
            raise DataError(f"data set {prefix}", f"holds nothing to predict{whole}", got=f"{tokens.size} tokens")
        return cls(tokens, int(tokenizer.num_bytes_of_ids[tokens[1:]].sum()))

    def windows(self, length: int, eod: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(inputs, labels, mask), int64 and bool ``[length]``; the last window is filled up with EOD and masked."""
        for start in range(0, self.tokens.size - 1, length):
            piece = self.tokens[start : start + length + 1]
            real = piece.size - 1
            padded = np.concatenate([piece, np.full(length - real, eod)])
            yield padded[:-1], padded[1:], np.arange(length) < real


def validation_entries(split: str, num_entries: int) -> range:
    """The entries of a data set that Megatron keeps for validation under ``--split``, rounded as it does."""
    share = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))[Split.valid.value]
    begin, end = (int(round(edge * float(num_entries))) for edge in share or (0.0, 0.0))
    return range(begin, end)


class LossByOrder:
    """Sums of token losses by length of the match at the position that predicts them."""

    def __init__(self, max_order: int) -> None:
        self.sums = np.zeros(max_order + 1)
        self.counts = np.zeros(max_order + 1, dtype=np.int64)

    def add(self, losses: np.ndarray, orders: np.ndarray) -> None:
        """Add losses (nats) with their orders (0: miss), arrays ``[n]``."""
        self.sums += np.bincount(orders, weights=losses, minlength=self.sums.size)
        self.counts += np.bincount(orders, minlength=self.sums.size)

    def summary(self, num_bytes: int) -> dict[str, Any]:
        """Means in nats per token, and bits per byte over all tokens."""
        total = float(self.sums.sum())
        by_order = {
            MISS if order == 0 else str(order): {"tokens": int(count), "loss": float(self.sums[order] / count)}
            for order, count in enumerate(self.counts)
            if count
        }
        return {
            "tokens": int(self.counts.sum()),
            "loss": total / int(self.counts.sum()),
            "bits_per_byte": total / math.log(2) / num_bytes,
            "by_order": by_order,
        }


class Evaluator:
    """Runs one model over texts.

    Args:
        model: the bare GPT model, loaded.
        args: Megatron's arguments of the run.
        tokenizer: the run's tokenizer.
        fetcher: where memory comes from; None for the stock model.
        index: tells the length of the match at every position, by which losses are split; None if nothing does.
    """

    def __init__(
        self,
        model: Any,
        args: argparse.Namespace,
        tokenizer: TextTokenizer,
        fetcher: MemoryFetcher | None,
        index: SuffixIndex | None,
    ) -> None:
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.fetcher, self.index = fetcher, index

    def evaluate(self, name: str, text: EvaluationText) -> dict[str, Any]:
        """The losses on a text, with the memory and, where there is one, with it bypassed."""
        result = self._losses(name, text).summary(text.num_bytes)
        result["bytes"] = text.num_bytes
        if self.fetcher is not None:
            with bypassed(self.model):
                result["memory_off"] = self._losses(f"{name}, memory off", text).summary(text.num_bytes)
        return result

    @torch.no_grad()
    def _losses(self, name: str, text: EvaluationText) -> LossByOrder:
        losses = LossByOrder(self.index.max_order if self.index else 0)
        length, size = self.args.seq_length, self.args.micro_batch_size
        progress = Progress(f"evaluate {name}", text.tokens.size - 1, "tokens")
        windows = list(text.windows(length, self.tokenizer.eod))
        for start in range(0, len(windows), size):
            inputs_BS, labels_BS, mask_BS = (
                np.stack(part) for part in zip(*windows[start : start + size], strict=True)
            )
            losses_BS = self._forward(torch.from_numpy(inputs_BS), torch.from_numpy(labels_BS))
            orders_BS = self._orders(inputs_BS)
            losses.add(losses_BS[mask_BS], orders_BS[mask_BS])
            progress.advance(int(mask_BS.sum()))
        progress.finish()
        return losses

    def _orders(self, inputs_BS: np.ndarray) -> np.ndarray:
        if self.index is None:
            return np.zeros(inputs_BS.shape, dtype=np.uint8)
        _, orders_BS = self.index.lookup(inputs_BS, eod=self.tokenizer.eod)
        return orders_BS

    def _forward(self, inputs_BS: torch.Tensor, labels_BS: torch.Tensor) -> np.ndarray:
        device = torch.cuda.current_device()
        memory = None
        if self.fetcher is not None:
            fetched = self.fetcher.fetch(inputs_BS, 0).memory
            memory = (fetched.packed.to(device), fetched.exchange)
        tensors = {
            "tokens": inputs_BS.to(device),
            "labels": labels_BS.to(device),
            "loss_mask": torch.ones(inputs_BS.shape, device=device),
            "position_ids": torch.arange(inputs_BS.shape[1], device=device).expand_as(inputs_BS),
            "attention_mask": None,
        }
        losses_BS = run_model(self.model, tensors, memory)
        return losses_BS.float().cpu().numpy().astype(np.float64)


@contextlib.contextmanager
def bypassed(model: Any) -> Iterator[None]:
    """Switch every memory site of a model off: the module is skipped, nothing is looked up as empty."""
    sites = [module for module in model.modules() if isinstance(module, MemorySite)]
    for site in sites:
        site.bypassed = True
    try:
        yield
    finally:
        for site in sites:
            site.bypassed = False


def bigram_baseline(
    train_dataset: Any, num_samples: int, texts: dict[str, EvaluationText], vocab_size: int
) -> dict[str, Any]:
    """Losses of the bigram model counted over the first ``num_samples`` samples: those that the run trained on."""

    def samples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        progress = Progress("count bigrams", num_samples, "samples")
        for index in range(num_samples):
            sample = train_dataset[index]
            yield sample["tokens"].numpy(), sample["labels"].numpy()
            progress.advance(1)

    model = BigramModel.fitted(samples(), vocab_size)
    return {name: float(model.losses(text.tokens[:-1], text.tokens[1:]).mean()) for name, text in texts.items()}
