"""The chosen n-grams on disk: keys, texts and facts, as the select stage hands them to the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.keys import BankKeys
from megatron_graft.building.select import Selection

_KEYS = ("key_ids", "key_orders", "key_counts")


def write_selection(selection: Selection, directory: Path) -> dict[str, Any]:
    """Write a selection into a directory; return its facts."""
    for name in _KEYS:
        np.save(directory / f"{name}.npy", getattr(selection.keys, name))
    ends = np.empty(len(selection.texts), dtype=np.int64)
    end = 0
    with (directory / "texts.bin").open("wb") as stream:
        for row, text in enumerate(selection.texts):
            end += stream.write(text.encode())
            ends[row] = end
    np.save(directory / "text_ends.npy", ends)
    facts = selection.facts()
    (directory / "facts.json").write_text(json.dumps(facts))
    return facts


class SelectedNgrams:
    """What :func:`write_selection` wrote, mapped.

    Attributes:
        keys: N keys in bank order.
        facts: of the selection.
    """

    def __init__(self, directory: Path) -> None:
        key_ids, key_orders, key_counts = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in _KEYS)
        self.keys = BankKeys(key_ids=key_ids, key_orders=key_orders, key_counts=key_counts)
        self.facts: dict[str, Any] = json.loads((directory / "facts.json").read_text())
        self._text_path = directory / "texts.bin"
        self._ends = np.load(directory / "text_ends.npy", mmap_mode="r")

    def texts(self) -> list[str]:
        """The text of every row."""
        return list(self._read_texts())

    def _read_texts(self) -> Iterator[str]:
        start = 0
        with self._text_path.open("rb") as stream:
            for end in self._ends.tolist():
                yield stream.read(end - start).decode()
                start = end
