"""The rows of an open bank: mapped shards, checked against the manifest, and who copies rows out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_graft.bank.extension import load_extension
from megatron_graft.bank.manifest import Identity
from megatron_graft.bank.row_layout import ROW_DTYPES, Columns, RowDtype, RowLayout
from megatron_graft.bank.tensorfile import TensorEntry, map_tensor
from megatron_graft.errors import BankFormatError

GatherImplementation = Literal["native", "reference"]


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """The rows of one donor layer, shard by shard in row order; all arrays are mapped and read-only.

    Attributes:
        shards: one ``[n, D]`` array of the row dtype's NumPy type each.
        scales: float32 ``[n]`` each; empty if the row dtype has none.
    """

    shards: tuple[np.ndarray, ...]
    scales: tuple[np.ndarray, ...]

    @property
    def width(self) -> int:
        """D."""
        return int(self.shards[0].shape[1])


def open_rows(
    directory: Path, headers: Mapping[str, dict[str, TensorEntry]], identity: Identity
) -> dict[int, LayerRows]:
    """Map the rows of all donor layers.

    Args:
        directory: the bank's.
        headers: file name -> its tensors.
        identity: what they are compared with.

    Raises:
        BankFormatError: a shard does not hold what the manifest describes.
    """
    dtype = ROW_DTYPES[identity.row_dtype]
    layers = {layer: _open_layer(directory, headers, identity, layer, dtype) for layer in identity.donor.layers}
    width = sum(rows.width for rows in layers.values())
    if width != identity.row_dim:
        raise BankFormatError(directory, "has rows of the wrong width", got=width, expected=identity.row_dim)
    cuts = {layer: [len(shard) for shard in rows.shards] for layer, rows in layers.items()}
    for layer, lengths in cuts.items():
        if lengths != cuts[identity.donor.layers[0]]:
            raise BankFormatError(directory, f"has rows of layer {layer} that are cut into shards in another way")
    return layers


def _open_layer(
    directory: Path, headers: Mapping[str, dict[str, TensorEntry]], identity: Identity, layer: int, dtype: RowDtype
) -> LayerRows:
    shards, scales = [], []
    for name in identity.shard_names(layer):
        path, tensors = directory / name, headers[name]
        _check_shard(path, tensors, dtype)
        shards.append(map_tensor(path, tensors["rows"]))
        if dtype.scaled:
            scales.append(map_tensor(path, tensors["scales"]))
        if shards[-1].shape[1] != shards[0].shape[1]:
            raise BankFormatError(
                path, "has rows of another width than the shards before it",
                got=shards[-1].shape[1], expected=shards[0].shape[1],
            )  # fmt: skip
    found = sum(len(shard) for shard in shards)
    if found != identity.num_rows:
        files = f"{directory / identity.shard_names(layer)[0]} and its further shards"
        raise BankFormatError(files, "have the wrong number of rows", got=found, expected=identity.num_rows)
    return LayerRows(shards=tuple(shards), scales=tuple(scales))


def _check_shard(path: Path, tensors: dict[str, TensorEntry], dtype: RowDtype) -> None:
    rows = tensors.get("rows")
    shape = rows.shape if rows is not None else ()
    if len(shape) != 2 or 0 in shape:
        raise BankFormatError(path, "does not hold rows", got=tensors, expected="a matrix 'rows' that is not empty")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {"rows": (dtype.tensor, shape)}
    if dtype.scaled:
        wanted["scales"] = ("F32", shape[:1])
    found = {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}
    if found != wanted:
        raise BankFormatError(path, "does not hold the rows that the manifest describes", got=found, expected=wanted)


class RowGatherer:
    """Copies rows out of mapped shards. Its arguments have been checked: see ``Bank.gather``.

    Args:
        layers: the rows, in column order.
        layout: of a gathered row.
        implementation: the compiled extension, loaded at the first call, or NumPy.
        threads: of one native call.
    """

    def __init__(
        self, layers: Sequence[LayerRows], layout: RowLayout, implementation: GatherImplementation, threads: int
    ) -> None:
        self._layers, self._layout = layers, layout
        self._implementation, self._threads = implementation, threads
        self._native: Any = None

    def gather(self, rows: np.ndarray, out: np.ndarray, columns: Columns | None) -> None:
        """Copy rows (int64 ``[M]``) into ``out`` (uint8 ``[M, row_bytes(columns)]``)."""
        ranges = self._layout.byte_ranges(columns)
        if self._implementation == "reference":
            gather_reference(self._layers, rows, out, ranges)
            return
        if self._native is None:  # two threads may both come here: each then makes one, either will do
            blocks = [[shard.view(np.uint8) for shard in layer.shards] for layer in self._layers]
            scales = [list(layer.scales) for layer in self._layers] if self._layout.dtype.scaled else []
            self._native = load_extension().RowGatherer(blocks, scales, self._threads)
        self._native.gather(rows, out, ranges)


def gather_reference(
    layers: Sequence[LayerRows], rows: np.ndarray, out: np.ndarray, ranges: Sequence[tuple[int, int]]
) -> None:
    """The same in NumPy. ``ranges`` are the bytes wanted of every layer's stored row."""
    out.fill(0)
    column = 0
    for layer, (begin, end) in zip(layers, ranges, strict=True):
        _take([shard.view(np.uint8)[:, begin:end] for shard in layer.shards], rows, out, column)
        column += end - begin
    column += -column % 4
    for layer in layers:
        if layer.scales:
            _take([scales.view(np.uint8).reshape(-1, 4) for scales in layer.scales], rows, out, column)
            column += 4


def _take(shards: Sequence[np.ndarray], rows: np.ndarray, out: np.ndarray, column: int) -> None:
    """Copy rows, numbered through all shards, to ``out`` from ``column`` on; leave out the negative ones."""
    start = 0
    for shard in shards:
        here = (rows >= start) & (rows < start + len(shard))
        out[here, column : column + shard.shape[1]] = shard[rows[here] - start]
        start += len(shard)
