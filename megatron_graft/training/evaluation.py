"""Loss of a trained run on whole texts: with its memory, with it off, and with another bank's rows in its bank's place.

Every token of a text but the first is predicted once, in windows of the run's sequence length. One process, whatever
layout was trained.

Shapes: N predicted tokens of a text; B sequences, S positions.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from megatron_graft.data.memory_fetcher import MemoryFetcher
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.log import Progress
from megatron_graft.memory.site import MemorySite
from megatron_graft.training.count_baseline import BigramModel
from megatron_graft.training.evaluation_text import EvaluationText
from megatron_graft.training.forward_step import run_model
from megatron_graft.training.loss_summaries import Classifier, summary
from megatron_graft.training.packing import document_bounds, packed


class Evaluator:
    """Runs one model over texts.

    Args:
        model: the bare GPT model, loaded.
        args: Megatron's arguments of the run.
        tokenizer: the run's tokenizer.
        fetcher: where memory comes from; None for the stock model.
        others: by name, what fetches the memory with another bank in place of the run's.
        classifier: the bank by whose matches losses are split; None if nothing does.
    """

    def __init__(
        self,
        model: Any,
        args: argparse.Namespace,
        tokenizer: TextTokenizer,
        *,
        fetcher: MemoryFetcher | None,
        others: Mapping[str, MemoryFetcher],
        classifier: Classifier | None,
    ) -> None:
        self.model, self.args, self.tokenizer = model, args, tokenizer
        self.fetcher, self.others, self.classifier = fetcher, others, classifier

    def evaluate(self, name: str, text: EvaluationText, *, memory_off: bool) -> dict[str, Any]:
        """The summary of the losses on a text.

        Args:
            name: of the text, for progress lines.
            text: what to predict.
            memory_off: measure also, where there is a memory, with it off (``memory_off``) and with every other bank
                (``other_bank``), each a pass of its own. The same positions are in the same classes.
        """
        batches = ((inputs_BS, mask_BS) for inputs_BS, _, mask_BS in self._batches(text))
        matches = self.classifier.matches(batches, self.tokenizer.eod) if self.classifier else None
        result = summary(self._losses(name, text, self.fetcher), text.documents, matches)
        if self.fetcher is None or not memory_off:
            return result
        with bypassed(self.model):
            losses_N = self._losses(f"{name}, memory off", text, None)
        result["memory_off"] = summary(losses_N, text.documents, matches)
        if self.others:
            result["other_bank"] = {
                bank: summary(self._losses(f"{name}, bank {bank}", text, fetcher), text.documents, matches)
                for bank, fetcher in self.others.items()
            }
        return result

    def _batches(self, text: EvaluationText) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return text.batches(self.args.seq_length, self.tokenizer.eod, self.args.micro_batch_size)

    @torch.no_grad()
    def _losses(self, name: str, text: EvaluationText, fetcher: MemoryFetcher | None) -> np.ndarray:
        """float32 ``[N]``, nats."""
        parts = []
        progress = Progress(f"evaluate {name}", text.num_predicted, "tokens")
        for inputs_BS, labels_BS, mask_BS in self._batches(text):
            losses_BS = self._forward(torch.from_numpy(inputs_BS), torch.from_numpy(labels_BS), fetcher)
            parts.append(losses_BS[mask_BS])
            progress.advance(parts[-1].size)
        progress.finish()
        return np.concatenate(parts)

    def _forward(self, inputs_BS: torch.Tensor, labels_BS: torch.Tensor, fetcher: MemoryFetcher | None) -> np.ndarray:
        device = torch.cuda.current_device()
        memory = None
        if fetcher is not None:
            fetched = fetcher.fetch(inputs_BS, 0).memory
            memory = (fetched.packed.to(device), fetched.exchange)
        tensors = {
            "tokens": inputs_BS.to(device),
            "labels": labels_BS.to(device),
            "loss_mask": torch.ones(inputs_BS.shape, device=device),
            "position_ids": torch.arange(inputs_BS.shape[1], device=device).expand_as(inputs_BS),
            "attention_mask": None,
        }
        if self.args.dataloader_inter_document_masking:
            tensors |= document_bounds(inputs_BS, self.tokenizer.eod)
        tensors, packing = packed(tensors)
        losses = run_model(self.model, tensors, memory, packing)
        losses_BS: np.ndarray = losses.float().cpu().numpy().reshape(inputs_BS.shape)
        return losses_BS


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
