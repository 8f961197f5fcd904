"""A memory site written from its definition, position by position and document by document: slow, and on its own.

It shares nothing with the package but the parameters: n-grams are found by trying every key, documents are cut out
before anything is computed, and the convolution is a double loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_graft.bank.reader import Bank


class SiteOracle:
    """Answers instead of ``MemorySite.forward``; set :attr:`tokens_BS` before each micro-batch."""

    def __init__(self, bank: Bank) -> None:
        self.rows = torch.from_numpy(bank.float_rows(np.arange(bank.num_rows)).astype(np.float64))
        self.keys = {
            tuple(int(token) for token in ids[len(ids) - order :]): row
            for row, (ids, order) in enumerate(zip(bank.key_ids.tolist(), bank.key_orders.tolist(), strict=True))
        }
        self.eod, self.orders = bank.eod, range(bank.max_order, bank.min_order - 1, -1)
        self.tokens_BS: list[list[int]] = []

    def forward(self, site: Any, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """``[S, B, H]`` with the memory added, computed in float64."""
        sequences = [
            torch.cat([self._document(site, part, hidden_SBH[start : start + len(part), b].double())
                       for start, part in self._documents(tokens)])
            for b, tokens in enumerate(self.tokens_BS)
        ]  # fmt: skip
        return torch.stack(sequences, dim=1).to(hidden_SBH.dtype)

    def _documents(self, tokens: list[int]) -> list[tuple[int, list[int]]]:
        """(first position, tokens) of each document; an EOD is its document's last token."""
        ends = [position + 1 for position, token in enumerate(tokens) if token == self.eod]
        if not ends or ends[-1] < len(tokens):
            ends.append(len(tokens))
        return [(start, tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _rows(self, document: list[int]) -> torch.Tensor:
        rows = torch.zeros(len(document), self.rows.shape[1], dtype=torch.float64)
        for end in range(1, len(document) + 1):
            for order in self.orders:
                key = tuple(document[end - order : end]) if order <= end else ()
                if key in self.keys:
                    rows[end - 1] = self.rows[self.keys[key]]
                    break
        return rows

    def _document(self, site: Any, document: list[int], hidden: torch.Tensor) -> torch.Tensor:
        weights = {name: parameter.double() for name, parameter in site.named_parameters()}
        epsilon = site.config.layernorm_epsilon

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight

        rows = self._rows(document)
        key, value = rows @ weights["key_weight"].T, rows @ weights["value_weight"].T
        logit = (norm(key, weights["key_norm"]) * norm(hidden, weights["query_norm"])).sum(-1, keepdim=True)
        update = torch.sigmoid(logit / hidden.shape[-1] ** 0.5) * value
        source = norm(update, weights["conv_norm"])
        mixed = []
        for position in range(len(document)):
            total = torch.zeros_like(source[0])
            for tap, kernel in enumerate(weights["conv_kernel"]):
                if position - tap * site.site.conv_dilation >= 0:
                    total = total + kernel * source[position - tap * site.site.conv_dilation]
            mixed.append(total * torch.sigmoid(total))
        return hidden + update + torch.stack(mixed)
