"""From texts to rows: what a donor must be able to do, and what is done to its states.

Shapes: N rows, D width of one donor layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.manifest import Processing
from megatron_graft.errors import DonorError

RMS_EPSILON = 1e-6
_BLOCK_ROWS = 1 << 14


class Encoder(Protocol):
    """A donor: turns texts into hidden states."""

    @property
    def name(self) -> str:
        """What the bank's identity calls it."""

    @property
    def revision(self) -> str:
        """Hex SHA-256 over its weights."""

    @property
    def hidden_size(self) -> int:
        """D, the width of a state."""

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise :class:`DonorError` unless the donor has all of ``layers``."""

    def settings(self) -> dict[str, Any]:
        """Choices other than the weights that change its states, for comparison with an existing bank."""

    def encode(self, texts: Sequence[str], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """The state after each of ``layers`` at the last token of every text: layer -> float32 ``[N, D]``.

        Layers are block outputs counted from 1, before any final norm; 0 is the embedding.
        """


def rows_from_states(states_ND: np.ndarray, processing: Processing) -> np.ndarray:
    """Make a bank's rows of one donor layer.

    Normalising divides every row by its root mean square, as RMSNorm without a weight does; centring takes
    the mean over all rows away (states of one layer share a large common direction). With both, rows are
    normalised before the mean is taken and again afterwards: a few texts have states hundreds of times longer
    than the rest, along one dimension, and a mean of unscaled states would be theirs alone; taking it away
    would give every other row that dimension in place of its own contents.

    Args:
        states_ND: float32 ``[N, D]``; used as scratch space.
        processing: which of the steps to take.

    Returns:
        uint16 ``[N, D]``, bfloat16 bits.

    Raises:
        DonorError: a state is not finite.
    """
    if not np.isfinite(states_ND).all():
        row = int(np.argwhere(~np.isfinite(states_ND))[0, 0])
        raise DonorError(
            "--donor",
            "gives states that are not finite",
            got=f"text number {row}",
            remedy="Run the donor with --donor-dtype float32.",
        )
    if processing.normalised:
        _normalise(states_ND)
    if processing.centred:
        states_ND -= states_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
        if processing.normalised:
            _normalise(states_ND)
    return bf16_from_float32(states_ND)


def _normalise(states_ND: np.ndarray) -> None:
    """Scale every row to a root mean square of 1, in place and block by block."""
    for start in range(0, len(states_ND), _BLOCK_ROWS):
        block = states_ND[start : start + _BLOCK_ROWS]
        square = np.mean(block * block, axis=1, keepdims=True, dtype=np.float32)
        block /= np.sqrt(square + np.float32(RMS_EPSILON))
