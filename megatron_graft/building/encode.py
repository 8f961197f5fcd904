"""From texts to states: what a donor must be able to do, and the two stages that run it.

``pack`` turns texts into packs; each task of ``encode`` runs its share of the packs. They speak through files
alone: ranks of torchrun need no process group, and a task that is lost is run again by whoever comes next.

Shapes: N rows, D width of one donor layer, n states of one task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_graft.building.packs import (
    Packs,
    flat_token_lists,
    load_packs,
    map_array,
    packs_of_task,
    plan_packs,
    save_packs,
)
from megatron_graft.errors import DonorError
from megatron_graft.files import storage_errors
from megatron_graft.log import Progress

_BLOCK_TEXTS = 1 << 16
_NODES = "nodes.npy"


class Encoder(Protocol):
    """A donor: turns texts into hidden states. Layers are block outputs counted from 1; 0 is the embedding."""

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

    def token_lists(self, texts: Sequence[str]) -> list[list[int]]:
        """The donor's ids of every text, a beginning-of-sequence token first."""

    def states(
        self, packs: Packs, first_pack: int, last_pack: int, layers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray]]]:
        """For each pack, the last not included: the places that rows take, int64 ``[m]``, ascending, and the states
        there, layer -> float32 ``[m, D]``, before any final norm."""

    def encode(self, texts: Sequence[str], layers: Sequence[int]) -> dict[int, np.ndarray]:
        """All of it in memory: layer -> float32 ``[N, D]``, the state at the last token of every text."""


def pack_texts(texts: Sequence[str], encoder: Encoder, pack_tokens: int, scratch: Path) -> dict[str, Any]:
    """Tokenise texts, plan packs, and write them into ``scratch``.

    Args:
        texts: N strings, in row order.
        encoder: the donor; its model is not loaded.
        pack_tokens: most donor tokens of one pack; with the texts, it decides every state to the last bit.
        scratch: directory to write to.

    Returns:
        facts: rows, distinct token lists, donor tokens (also by row), packs, and rows by donor tokens of their text.

    Raises:
        ConfigError: ``pack_tokens`` is not positive.
        DonorError: there is no text, or one is too long for the donor.
        StorageError: the file system refused.
    """
    ids, lengths = [], []
    for start in range(0, len(texts), _BLOCK_TEXTS):
        # Block by block: lists of Python numbers take ten times the memory of arrays.
        block = flat_token_lists(encoder.token_lists(texts[start : start + _BLOCK_TEXTS]))
        ids.append(block[0])
        lengths.append(block[1])
    nothing = np.empty(0, dtype=np.int64)
    packs = plan_packs(np.concatenate([nothing, *ids]), np.concatenate([nothing, *lengths]), pack_tokens)
    save_packs(packs, scratch)
    rows_of_length = np.bincount(packs.lengths_of_row)
    return {
        "rows": packs.num_rows,
        "distinct": len(packs.taken),
        "donor_tokens": len(packs.tokens),
        "tokens_per_row": round(len(packs.tokens) / packs.num_rows, 4),
        "packs": len(packs),
        "pack_tokens": pack_tokens,
        "rows_by_donor_length": {str(length): int(rows) for length, rows in enumerate(rows_of_length) if rows},
    }


def encode_task(
    packs_directory: Path, encoder: Encoder, layers: Sequence[int], task: int, num_tasks: int, scratch: Path
) -> dict[str, Any]:
    """Run one task's packs; write ``nodes.npy`` (int64 ``[n]``, ascending places) and ``layer-<l>.npy`` (float32
    ``[n, D]``) into ``scratch``. States go to the files pack by pack.

    Args:
        packs_directory: what :func:`pack_texts` wrote.
        encoder: the donor.
        layers: ascending.
        task: number of the task, 0 to ``num_tasks - 1``.
        num_tasks: tasks that share the packs; their states do not depend on it.
        scratch: directory to write to.

    Returns:
        facts: states, donor tokens, seconds, and both by second.

    Raises:
        DonorError: the packs are damaged, the donor cannot be run, or a state is not finite.
        StorageError: the file system refused.
    """
    packs = load_packs(packs_directory)
    first, last = packs_of_task(len(packs), task, num_tasks)
    nodes = packs.taken_in(first, last)
    started, done = time.monotonic(), 0
    with storage_errors(scratch):
        np.save(scratch / _NODES, nodes)
        files = {
            layer: np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                _layer_file(scratch, layer), mode="w+", dtype=np.float32, shape=(len(nodes), encoder.hidden_size)
            )
            for layer in layers
        }
    progress = Progress(f"encoding, task {task}", len(nodes), "rows")
    for places, states in encoder.states(packs, first, last, layers):
        for layer, states_MD in states.items():
            files[layer][done : done + len(places)] = states_MD
        done += len(places)
        progress.advance(len(places))
    for file in files.values():
        file.flush()
    seconds = time.monotonic() - started
    tokens = int(packs.pack_starts[last] - packs.pack_starts[first])
    return {
        "states": done,
        "donor_tokens": tokens,
        "seconds": round(seconds, 2),
        "states_per_second": round(done / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
    }


class EncodedRows:
    """The states of all rows, read from the files of every encode task; nothing but the asked for is in memory.

    Args:
        packs_directory: what :func:`pack_texts` wrote.
        task_directories: what each call of :func:`encode_task` wrote, in the order of the tasks.
        layers: donor layers.

    Raises:
        DonorError: a file is missing or damaged, or the tasks are not those of these packs.
    """

    def __init__(self, packs_directory: Path, task_directories: Sequence[Path], layers: Sequence[int]) -> None:
        packs = load_packs(packs_directory)
        self._taken, self._node_of_row = packs.taken, packs.node_of_row
        self.num_rows = packs.num_rows
        """N."""
        self.lengths_of_row = packs.lengths_of_row
        """int32 ``[N]``: donor tokens of each row's text, BOS not counted."""
        starts = [0]
        for directory in task_directories:
            nodes = map_array(directory / _NODES)
            expected = self._taken[starts[-1] : starts[-1] + len(nodes)]
            if not np.array_equal(nodes, expected):
                raise _wrong_task(directory, "states of other nodes")
            starts.append(starts[-1] + len(nodes))
        if starts[-1] != len(self._taken):
            raise _wrong_task(packs_directory, f"{starts[-1]:,} states of {len(self._taken):,}")
        self._starts = np.array(starts, dtype=np.int64)
        self._directories = tuple(task_directories)
        for layer in layers:
            for directory, size in zip(task_directories, np.diff(self._starts), strict=True):
                found = map_array(_layer_file(directory, layer))
                if len(found) != size:
                    raise _wrong_task(directory, f"{len(found):,} states of layer {layer} for {size:,} nodes")
                self._width = found.shape[1]

    def rows(self, layer: int, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, the last not included: float32 ``[stop - start, D]``, the caller's own."""
        at = np.searchsorted(self._taken, self._node_of_row[start:stop])
        out = np.empty((len(at), self._width), dtype=np.float32)
        order = np.argsort(at, kind="stable")  # files are read from front to back
        bounds = np.searchsorted(at[order], self._starts)
        for task, directory in enumerate(self._directories):
            rows = order[bounds[task] : bounds[task + 1]]
            if len(rows):  # opened anew each time: there may be more tasks than a process may hold files open
                out[rows] = map_array(_layer_file(directory, layer))[at[rows] - self._starts[task]]
        return out


def _layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer}.npy"


def _wrong_task(directory: Path, got: str) -> DonorError:
    return DonorError(
        directory,
        "does not fit the packs of this build",
        got=got,
        expected="the output of every encode task of the same plan",
        remedy="Remove it and run the encode stage again.",
    )
