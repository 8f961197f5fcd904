"""What a run's model costs for each token, on paper: forward floating-point operations and the parameters they touch.

A multiplication and an addition count as two operations. Attention is counted causally: a token attends to half the
sequence on average. Norms, activations and the router's softmax are left out, they are below one per cent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

type Identity = Mapping[str, Any]


def backbone_flops(flags: Mapping[str, Any], vocab_size: int, *, gated: bool) -> int:
    """Operations per token of the stock model.

    Args:
        flags: num_layers, hidden_size, ffn_hidden_size, seq_length, num_experts (None or 0: dense), moe_router_topk.
        vocab_size: V of the output layer.
        gated: three matrices in a feed-forward block (SwiGLU) rather than two.
    """
    hidden, experts = flags["hidden_size"], flags["num_experts"] or 0
    attention = 8 * hidden**2 + 2 * flags["seq_length"] * hidden
    per_block = (3 if gated else 2) * 2 * hidden * flags["ffn_hidden_size"]
    feed_forward = per_block * (flags["moe_router_topk"] if experts else 1) + 2 * hidden * experts
    return int(flags["num_layers"] * (attention + feed_forward) + 2 * hidden * vocab_size)


def site_flops(memory: Identity | None, hidden: int) -> int:
    """Operations per token of all memory sites: both projections of each memory, gate and convolution.

    Args:
        memory: the run's memory as checkpoints keep it (``graft_identity``), or None.
        hidden: H of the model.
    """
    if memory is None:
        return 0
    sites = memory["sites"].values()
    return sum(4 * hidden * sum(_widths(memory, site)) + 2 * hidden * (1 + site["conv_kernel"]) for site in sites)


def fetched_per_token(memory: Identity | None) -> int:
    """Parameters read at a position with a match, over all sites: the bank's row and the tables' rows."""
    if memory is None:
        return 0
    return sum(
        max(_widths(memory, site)) if site["combine"] == "exclusive" else sum(_widths(memory, site))
        for site in memory["sites"].values()
    )


def _widths(memory: Identity, site: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of the bank's row and of the table's rows that a site reads."""
    engram = memory["engram"]
    bank = site["columns"][1] - site["columns"][0] if site["columns"] else 0
    table = engram["dim"] * (engram["max_order"] - 1) if site["engram_rows"] else 0
    return bank, table
