"""A donor's states that are in memory already, and a bank's rows made of them."""

from __future__ import annotations

import numpy as np

from megatron_graft.bank.manifest import Processing
from megatron_graft.building.rows import process_layer


class StatesInMemory:
    """States that are there already: layer -> float32 ``[N, D]``."""

    def __init__(self, layers: dict[int, np.ndarray]) -> None:
        self._layers = layers
        self.num_rows = len(next(iter(layers.values())))

    def rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        """float32 ``[stop - start, D]``."""
        return np.array(self._layers[layer][start:stop], dtype=np.float32)


def rows_from_states(states_ND: np.ndarray, processing: Processing) -> np.ndarray:
    """:func:`process_layer` of states in memory: float32 ``[N, D]`` -> uint16 ``[N, D]``, bfloat16 bits."""
    return process_layer(StatesInMemory({0: states_ND}), 0, processing).rows
