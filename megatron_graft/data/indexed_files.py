"""A ``.bin/.idx`` pair and its tokenizer note, written so that the ``.idx`` appears last or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_graft.data.sidecar import sidecar_path, write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer
from megatron_graft.files import scratch_beside, storage_errors, sync_directory

# Header of an .idx file: magic, version, code of the ids' dtype, number of sequences and of document borders.
_INDEX_HEADER = np.dtype(
    [("magic", "S9"), ("version", "<u8"), ("dtype_code", "u1"), ("sequences", "<u8"), ("borders", "<u8")]
)
_INDEX_MAGIC = b"MMIDIDX"  # NumPy strips the two zero bytes that end it
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # dtype code -> bytes, as megatron's DType


def indexed_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores ids of such a vocabulary in: uint16 where they fit, else int32."""
    return np.dtype(_megatron_module().DType.optimal_dtype(vocab_size))


def _megatron_module() -> Any:
    """megatron-core's own module; imported late, since it brings all of torch, and without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optimizers and Transformer Engine, which nothing here uses
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class IndexedFiles:
    """Write documents under temporary names beside ``prefix``; :meth:`publish` renames them into place.

    Leaving the ``with`` block without :meth:`publish` removes what was written and keeps the old files.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        self.prefix, self.dtype = prefix, dtype

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as scratch, storage_errors(self.prefix):
            directory = scratch.enter_context(scratch_beside(self.prefix))
            self._bin, self._idx = directory / "bin", directory / "idx"
            self._builder = _megatron_module().IndexedDatasetBuilder(str(self._bin), dtype=self.dtype.type)
            self._scratch = scratch.pop_all()
        return self

    def add(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents: their ids end to end, and the length of each."""
        with storage_errors(self.prefix):
            borders = np.cumsum([0, *lengths])
            for start, end in zip(borders[:-1], borders[1:], strict=True):
                self._builder.add_document(tokens[start:end], [int(end - start)])

    def publish(self, tokenizer: TextTokenizer) -> None:
        """Make the pair and its note visible, replacing what had their names."""
        with storage_errors(self.prefix):
            self._builder.finalize(str(self._idx))
            for path in (self._bin, self._idx):
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            # From here to the last rename there is no .idx, so a stop leaves nothing that opens.
            Path(f"{self.prefix}.idx").unlink(missing_ok=True)
            # Megatron keeps its sample index here, keyed by this path and not by the content.
            shutil.rmtree(self.prefix / "cache", ignore_errors=True)
            os.replace(self._bin, f"{self.prefix}.bin")
            write_sidecar(self.prefix, tokenizer)
            os.replace(self._idx, f"{self.prefix}.idx")
            sync_directory(self.prefix.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing writes what is still in a buffer: on a full disk it fails once more, after the error that says so.
        with self._scratch, contextlib.suppress(OSError):
            self._builder.data_file.close()


def sizes_agree(prefix: Path | str) -> bool:
    """Whether the pair and its note exist, with the sizes that the header of the ``.idx`` implies."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if not (bin_path.is_file() and idx_path.is_file() and sidecar_path(prefix).is_file()):
        return False
    with idx_path.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.itemsize)
        if len(header) < _INDEX_HEADER.itemsize:
            return False
        fields = np.frombuffer(header, dtype=_INDEX_HEADER)[0]
        item_bytes = _ITEM_BYTES.get(int(fields["dtype_code"]))
        if fields["magic"] != _INDEX_MAGIC or fields["version"] != 1 or item_bytes is None:
            return False
        sequences, borders = int(fields["sequences"]), int(fields["borders"])
        # int32 lengths, int64 offsets, int64 borders
        if idx_path.stat().st_size != _INDEX_HEADER.itemsize + 12 * sequences + 8 * borders:
            return False
        lengths = np.fromfile(stream, dtype="<i4", count=sequences)
    return bin_path.stat().st_size == int(lengths.sum(dtype=np.int64)) * item_bytes
