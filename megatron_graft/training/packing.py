"""Packed sequences (``--dataloader-inter-document-masking``): attention ends where a document ends.

Megatron's data set tells where documents lie in a sample; its packed attention wants all samples of a micro-batch end
to end. A micro-batch's memory is laid out sequence by sequence, which is the same order, so sites read it as it is.

Shapes: B sequences, S positions, D documents of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import flatten_batch_for_packed_sequences

BOUNDS, LONGEST = "cu_seqlens", "max_seqlen"  # of Megatron's data sets


def packed(batch: Mapping[str, Any]) -> tuple[dict[str, Any], PackedSeqParams | None]:
    """A micro-batch on the host as packed attention wants it, and what tells the model where its documents lie.

    Args:
        batch: tensors ``[B, S]``, some of them None; packed if ``cu_seqlens`` int32 ``[B, S + 1]`` and ``max_seqlen``
            ``[B]`` are among them.

    Returns:
        The batch without those two, ``[1, B * S]``; and None in place of the parameters where it is not packed, and
        then as it was.
    """
    tensors = dict(batch)
    if tensors.get(BOUNDS) is None:
        return {name: tensor for name, tensor in tensors.items() if name not in (BOUNDS, LONGEST)}, None
    length = tensors["tokens"].shape[1]
    flat = flatten_batch_for_packed_sequences(tensors)
    bounds = flat.pop(BOUNDS)[0].cuda(non_blocking=True)
    longest = int(flat.pop(LONGEST))
    return flat, PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=length,
    )


def document_bounds(tokens_BS: torch.Tensor, eod: int | None) -> dict[str, torch.Tensor]:
    """What Megatron's data set would tell of sequences: a document ends with its ``eod`` token.

    Returns:
        ``cu_seqlens`` int32 ``[B, S + 1]``, padded with S; ``max_seqlen`` int64 ``[B]``.
    """
    sequences, length = tokens_BS.shape
    bounds = torch.full((sequences, length + 1), length, dtype=torch.int32)
    longest = torch.zeros(sequences, dtype=torch.int64)
    for row, tokens in enumerate(tokens_BS):
        ends = [] if eod is None else (torch.nonzero(tokens == eod).flatten() + 1).tolist()
        inner = [0, *(end for end in ends if end < length)]
        bounds[row, : len(inner)] = torch.tensor(inner)
        longest[row] = max(after - before for before, after in zip(inner, [*inner[1:], length], strict=True))
    return {BOUNDS: bounds, LONGEST: longest}
