"""A memory site written from its definition, position by position and document by document: slow, and on its own.

It shares nothing with the package but the parameters: n-grams are found by trying every key and hashed one by one,
documents are cut out before anything is computed, and the convolution is a double loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_graft.bank.reader import Bank
from tests.helpers import engram_oracle


class BankOracle:
    """Rows of a bank, by trying every key."""

    def __init__(self, bank: Bank) -> None:
        self.rows = torch.from_numpy(bank.float_rows(np.arange(bank.num_rows)).astype(np.float64))
        self.keys = {
            tuple(int(token) for token in ids[len(ids) - order :]): row
            for row, (ids, order) in enumerate(zip(bank.key_ids.tolist(), bank.key_orders.tolist(), strict=True))
        }
        self.orders = range(bank.max_order, bank.min_order - 1, -1)

    def of_document(self, document: list[int]) -> tuple[torch.Tensor, list[bool]]:
        """``[S, D]``, zero at a miss; and where there is a match."""
        rows, hits = torch.zeros(len(document), self.rows.shape[1], dtype=torch.float64), [False] * len(document)
        for end in range(1, len(document) + 1):
            for order in self.orders:
                key = tuple(document[end - order : end]) if order <= end else ()
                if key in self.keys:
                    rows[end - 1], hits[end - 1] = self.rows[self.keys[key]], True
                    break
        return rows, hits


class SiteOracle:
    """Answers instead of ``MemorySite.forward``; set :attr:`tokens_BS` before each micro-batch.

    Args:
        memory: the run's ``RunMemory``.
    """

    def __init__(self, memory: Any) -> None:
        self.banks = [BankOracle(bank) for bank in memory.banks]
        self.eod = memory.tokenizer.eod
        self.engram = memory.engram
        self.tokens_BS: list[list[int]] = []
        if self.engram is not None:
            config, vocabulary = self.engram.config, self.engram.vocabulary
            layers = [layer for layer, _ in config.layer_ids]
            self.moduli = dict(
                zip(layers, engram_oracle.primes(len(layers), config.vocab_sizes, config.heads), strict=True)
            )
            self.factors = {
                layer: engram_oracle.multipliers(config.seed, layer_id, config.max_order, vocabulary.size)
                for layer, layer_id in config.layer_ids
            }

    def forward(self, site: Any, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """``[S, B, H]`` with the memory added, computed in float64."""
        sequences = [self._sequence(site, b, hidden_SBH[:, b].double()) for b in range(hidden_SBH.shape[1])]
        return torch.stack(sequences, dim=1).to(hidden_SBH.dtype)

    def _sequence(self, site: Any, number: int, hidden_SH: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens_BS[number]
        hashed = self._hashed(site, tokens) if site.site.reading.engram else None
        parts = []
        for start, document in self._documents(tokens):
            here = slice(start, start + len(document))
            parts.append(self._document(site, document, hidden_SH[here], hashed and hashed[here]))
        return torch.cat(parts)

    def _documents(self, tokens: list[int]) -> list[tuple[int, list[int]]]:
        """(first position, tokens) of each document; an EOD is its document's last token."""
        ends = [position + 1 for position, token in enumerate(tokens) if token == self.eod]
        if not ends or ends[-1] < len(tokens):
            ends.append(len(tokens))
        return [(start, tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _hashed(self, site: Any, tokens: list[int]) -> list[list[int]]:
        """Table rows of every position of a whole sequence: n-grams may be let reach across documents."""
        layer, config = site.layer_number, self.engram.config
        return engram_oracle.rows_of_sequence(
            tokens, self.engram.vocabulary.ids.tolist(), factors=self.factors[layer], moduli=self.moduli[layer],
            pad_id=config.pad_id, eod=None if config.across_documents else self.eod,
        )  # fmt: skip

    def _document(
        self, site: Any, document: list[int], hidden_SH: torch.Tensor, hashed: list[list[int]] | None
    ) -> torch.Tensor:
        weights = {name: parameter.double() for name, parameter in site.named_parameters()}
        epsilon, hits = site.config.layernorm_epsilon, [False] * len(document)
        key = value = torch.zeros_like(hidden_SH)
        if (graft := site.site.reading.graft) is not None:
            rows, hits = self.banks[graft.bank].of_document(document)
            rows = rows[:, graft.columns[0] : graft.columns[1]]
            key, value = rows @ weights["graft.key_weight"].T, rows @ weights["graft.value_weight"].T
        if hashed is not None:
            table = weights["engram.table"]
            skip = hits if site.site.reading.exclusive else [False] * len(document)
            read = [torch.cat([table[row] for row in rows]) for rows in hashed]
            rows = torch.stack([row * 0 if skipped else row for row, skipped in zip(read, skip, strict=True)])
            key, value = key + rows @ weights["engram.key_weight"].T, value + rows @ weights["engram.value_weight"].T

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight

        agreement = (norm(key, weights["key_norm"]) * norm(hidden_SH, weights["query_norm"])).sum(-1, keepdim=True)
        logit = agreement / hidden_SH.shape[-1] ** 0.5
        if site.site.gate == "signed-sqrt":
            logit = logit.sign() * logit.abs().clamp_min(1e-6).sqrt()
        update = torch.sigmoid(logit) * value
        if not site.site.conv_kernel:
            return hidden_SH + update
        return hidden_SH + update + self._convolved(site, norm(update, weights["conv_norm"]), weights["conv_kernel"])

    def _convolved(self, site: Any, source_SH: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        mixed = []
        for position in range(len(source_SH)):
            total = torch.zeros_like(source_SH[0])
            for tap, kernel in enumerate(kernels):
                if position - tap * site.site.conv_dilation >= 0:
                    total = total + kernel * source_SH[position - tap * site.site.conv_dilation]
            mixed.append(total * torch.sigmoid(total))
        return torch.stack(mixed)
