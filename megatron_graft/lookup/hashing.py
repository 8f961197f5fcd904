"""Hashed n-grams of whole batches: in C++ beside the data loader, or by the definition in NumPy.

Shapes: B sequences, S positions, K heads of all orders.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from megatron_graft.bank.arrays import ArrayError, check_array, check_no_overlap, check_threads
from megatron_graft.bank.extension import load_extension
from megatron_graft.errors import ConfigError
from megatron_graft.ngram.hashing import EngramConfig, LayerHash, hash_rows_reference

Implementation = Literal["auto", "native", "reference"]


class NgramHasher(Protocol):
    """Says which rows of one layer's table every position reads.

    It keeps no state between calls, and any number of threads may call it at once.

    Attributes:
        num_heads: K, rows that a position reads.
        num_rows: rows of the table, all heads together.
    """

    num_heads: int
    num_rows: int

    def rows(self, tokens_BS: np.ndarray, *, rows_out: np.ndarray | None = None) -> np.ndarray:
        """The table rows of every position, by order and then head.

        Args:
            tokens_BS: int32 or int64 ``[B, S]``, C-contiguous. A negative id is mixed as it is, without a compressed
                one.
            rows_out: int64 ``[B, S, K]`` to write into; with it, a call allocates nothing (``native``).

        Returns:
            int64 ``[B, S, K]``.

        Raises:
            ArrayError: an array has the wrong dtype, shape or layout, the output overlaps the input, or a token id
                has no compressed one (part of the output may be written then).
        """
        ...


def open_hasher(
    config: EngramConfig,
    layer: LayerHash,
    compressed_ids: np.ndarray,
    *,
    eod: int | None,
    implementation: Implementation = "auto",
    threads: int = 1,
) -> NgramHasher:
    """The hasher of one layer.

    Args:
        config: sizes and dialect.
        layer: the layer's constants, of that configuration.
        compressed_ids: int32 or int64 ``[V]``, the compressed id of every token id.
        eod: id of the end-of-document token, or None if sequences hold one document each.
        implementation: ``"native"``, ``"reference"``, or ``"auto"``, which is ``"native"``: the slow one has to be
            asked for.
        threads: native only. Positions of one call are split over so many threads.

    Raises:
        NativeExtensionError: the native one is wanted and the extension is not built.
        ArrayError: the compressed ids have the wrong dtype, shape or layout, or are no compressed ids.
        ConfigError: the pad id has no compressed one, there is no such implementation, or the machine cannot do what
            is asked.
    """
    check_array("compressed_ids", compressed_ids, dtypes=[np.int32, np.int64], shape=(None,))
    size = len(compressed_ids)
    if config.pad_id >= size:
        raise ConfigError(
            "--engram-pad-id", "is outside the tokenizer's vocabulary", got=config.pad_id, expected=f"0 to {size - 1}"
        )
    low, high = int(compressed_ids.min()), int(compressed_ids.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ArrayError(
            "compressed_ids", "holds a number that is no compressed id", got=wrong, expected=f"0 to {size - 1}"
        )
    if implementation == "reference":
        return ReferenceHasher(config, layer, compressed_ids, eod=eod)
    if implementation in ("auto", "native"):
        return NativeHasher(config, layer, compressed_ids, eod=eod, threads=threads)
    raise ConfigError("hashing implementation", "is unknown", got=implementation, expected="auto, native or reference")


class ReferenceHasher:
    """An :class:`NgramHasher` that is the definition, in NumPy."""

    def __init__(self, config: EngramConfig, layer: LayerHash, compressed_ids: np.ndarray, *, eod: int | None) -> None:
        self.num_heads, self.num_rows = config.num_heads, layer.num_rows
        self._config, self._layer, self._compressed_ids, self._eod = config, layer, compressed_ids, eod

    def rows(self, tokens_BS: np.ndarray, *, rows_out: np.ndarray | None = None) -> np.ndarray:
        """See :meth:`NgramHasher.rows`."""
        rows_BSK = _checked_output(tokens_BS, rows_out, self.num_heads)
        _refuse_unknown_ids(tokens_BS, len(self._compressed_ids))
        rows_BSK[:] = hash_rows_reference(tokens_BS, self._compressed_ids, self._layer, self._config, self._eod)
        return rows_BSK


class NativeHasher:
    """An :class:`NgramHasher` over the compiled extension (``csrc/ngram_hash.hpp``). It hashes without the GIL."""

    def __init__(
        self, config: EngramConfig, layer: LayerHash, compressed_ids: np.ndarray, *, eod: int | None, threads: int = 1
    ) -> None:
        check_threads(threads)
        self.num_heads, self.num_rows = config.num_heads, layer.num_rows
        self._vocab_size = len(compressed_ids)
        pad = int(compressed_ids[config.pad_id])
        ids = np.ascontiguousarray(compressed_ids, dtype=np.int32)
        reset = None if config.across_documents else eod
        self._hasher = load_extension().NgramHasher(
            ids, layer.multipliers, layer.primes, layer.offsets, pad, reset, threads
        )

    def rows(self, tokens_BS: np.ndarray, *, rows_out: np.ndarray | None = None) -> np.ndarray:
        """See :meth:`NgramHasher.rows`."""
        rows_BSK = _checked_output(tokens_BS, rows_out, self.num_heads)
        try:
            self._hasher.rows(tokens_BS, rows_BSK)
        except IndexError:
            # Searched again rather than parsed from the message; only a failing call pays for it.
            _refuse_unknown_ids(tokens_BS, self._vocab_size)
            raise
        return rows_BSK


def _checked_output(tokens_BS: np.ndarray, rows_out: np.ndarray | None, num_heads: int) -> np.ndarray:
    """Check the arrays of a call, so that all implementations refuse the same; the output, allocated if not given."""
    check_array("tokens_BS", tokens_BS, dtypes=[np.int32, np.int64], shape=(None, None))
    shape = (*tokens_BS.shape, num_heads)
    rows_BSK = np.empty(shape, dtype=np.int64) if rows_out is None else rows_out
    check_array("rows_out", rows_BSK, dtypes=[np.int64], shape=shape, writable=True)
    check_no_overlap("rows_out", rows_BSK, "tokens_BS", tokens_BS)
    return rows_BSK


def _refuse_unknown_ids(tokens_BS: np.ndarray, vocab_size: int) -> None:
    """Raise ``ArrayError`` for the first token id that has no compressed one."""
    unknown = np.argwhere(tokens_BS >= vocab_size)
    if len(unknown):
        sequence, position = unknown[0].tolist()
        raise ArrayError(
            f"tokens_BS[{sequence}, {position}]",
            "is outside the tokenizer's vocabulary",
            got=int(tokens_BS[sequence, position]),
            expected=f"less than {vocab_size}",
            remedy="Use data that was made with the run's tokenizer.",
        )
