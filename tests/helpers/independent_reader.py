"""Another reader of banks, written from ``docs/format.md`` alone: it imports nothing of the package.

It shows that the page is complete, and holds the package to it. It reads whole files and walks one position at a time.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 4096
BUCKET_BYTES, LANES, GUARD = 64, 8, 31
EMPTY = 0x7FFFFFFF
NO_ROW = 0xFFFFFFFF
REMAINDER_BITS = 26


@dataclass
class Section:
    order: int
    key_bits: int
    offset: int
    size: int
    entries: int
    buckets: int


class IndependentIndex:
    """``index.qbt``, read by the page."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        header = self.data[:HEADER_BYTES]
        assert header[:8] == b"GRAFTQBT"
        version, probe, size, sections, self.min_order, self.max_order = struct.unpack_from("<6I", header, 8)
        assert (version, probe, size) == (1, 0x01020304, HEADER_BYTES)
        assert struct.unpack_from("<I", header, 4092)[0] == zlib.crc32(header[:4092])
        self.rows, self.phantoms, self.vocab_size, file_bytes = struct.unpack_from("<4Q", header, 32)
        assert file_bytes == len(self.data)
        self.tokenizer_sha256, self.keys_sha256 = header[64:96], header[96:128]
        self.sections = {}
        end = HEADER_BYTES
        for place in range(sections):
            section = Section(*struct.unpack_from("<2I4Q", header, 128 + 64 * place))
            assert section.offset == -(-end // 4096) * 4096
            end = section.offset + section.size
            self.sections[section.order] = section
        assert end == len(self.data)
        first = 1 if self.min_order == 1 else 2
        assert list(self.sections) == list(range(first, self.max_order + 1))
        assert sum(section.entries for section in self.sections.values()) == self.rows + self.phantoms
        self.token_bits = max(1, (self.vocab_size - 1).bit_length())
        self.key_bits = max((self.rows + self.phantoms - 1).bit_length(), self.token_bits) + self.token_bits
        assert all(section.key_bits == self.key_bits for order, section in self.sections.items() if order > 1)

    def mix(self, key: int) -> int:
        bits, half = self.key_bits, (self.key_bits + 1) // 2
        x = key % 2**bits
        for factor in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93):
            x ^= x >> half
            x = x * factor % 2**bits
        return x ^ (x >> half)

    def find(self, order: int, newer: int, oldest: int) -> tuple[int, bool] | None:
        """The id of a node and whether it has children."""
        section = self.sections[order]
        x = self.mix(newer << self.token_bits | oldest)
        home = (x * 2**32 // 2**self.key_bits) * section.buckets // 2**32
        for displacement in range(31):
            place = section.offset + (home + displacement) * BUCKET_BYTES
            words = struct.unpack_from("<8I", self.data, place)
            wanted = displacement << REMAINDER_BITS | x % 2**REMAINDER_BITS
            for lane, word in enumerate(words):
                if word % 2**31 == wanted:
                    return struct.unpack_from("<I", self.data, place + 32 + 4 * lane)[0], word >= 2**31
            if words[-1] == EMPTY:
                return None
        return None

    def lookup(self, document: list[int], eod: int | None, row_limit: int | None = None) -> list[tuple[int, int]]:
        """(row, order) of every position of one sequence; (-1, 0) at a miss."""
        limit = self.rows if row_limit is None else row_limit
        answers, start = [], 0
        for position, token in enumerate(document):
            if token == eod or not 0 <= token < self.vocab_size:
                start = position + 1
                answers.append((-1, 0))
                continue
            answers.append(self._longest(document[start : position + 1], limit))
        return answers

    def _longest(self, suffix: list[int], limit: int) -> tuple[int, int]:
        best, node = (-1, 0), suffix[-1]
        if 1 in self.sections:
            row = struct.unpack_from("<I", self.data, self.sections[1].offset + 4 * node)[0]
            best = (row, 1) if row != NO_ROW and row < limit else best
        for order in range(2, min(len(suffix), self.max_order) + 1):
            found = self.find(order, node, suffix[-order])
            if found is None:
                break
            node, has_children = found
            best = (node, order) if node < limit else best
            if not has_children:
                break
        return best


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a safetensors file: dtype, shape, bytes. Checks where the data start."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    assert (8 + size) % 4096 == 0
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[8 + size + begin : 8 + size + end])
    return tensors


def read_manifest(bank: Path) -> dict[str, object]:
    """``bank.json``, with every digest in it checked."""
    manifest = json.loads((bank / "bank.json").read_bytes())
    assert (manifest["format"], manifest["version"]) == ("megatron-graft-bank", 2)
    canonical = json.dumps(manifest["identity"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest["digest"] == hashlib.sha256(canonical.encode()).hexdigest()
    for file in [*manifest["identity"]["files"], manifest["index"]]:
        data = (bank / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    assert {file.name for file in bank.iterdir()} == {
        "bank.json",
        *(file["name"] for file in [*manifest["identity"]["files"], manifest["index"]]),
    }
    return manifest


def read_keys(bank: Path) -> list[tuple[tuple[int, ...], int]]:
    """Every key with its count, in row order."""
    tensors = read_tensors(bank / "keys.safetensors")
    rows, width = tensors["key_ids"][1]
    ids = struct.unpack(f"<{rows * width}i", tensors["key_ids"][2])
    counts = struct.unpack(f"<{rows}q", tensors["key_counts"][2])
    keys = []
    for row, order in enumerate(tensors["key_orders"][2]):
        padded = ids[row * width : (row + 1) * width]
        assert set(padded[: width - order]) <= {-1}
        keys.append((padded[width - order :], counts[row]))
    return keys


def read_rows(bank: Path, manifest: dict[str, object]) -> list[bytes]:
    """Every gathered row: elements of all donor layers, padding, scales."""
    identity = manifest["identity"]
    layers, names = identity["donor"]["layers"], [file["name"] for file in identity["files"][1:]]
    shards = len(names) // len(layers)
    elements, scales = [], []
    for layer in range(len(layers)):
        mine = [read_tensors(bank / name) for name in names[layer * shards : (layer + 1) * shards]]
        pieces, factors = [], []
        for tensors in mine:
            _, (count, _), data = tensors["rows"]
            width = len(data) // count
            pieces += [data[row * width : (row + 1) * width] for row in range(count)]
            if "scales" in tensors:
                factors += [tensors["scales"][2][4 * row : 4 * row + 4] for row in range(count)]
        elements.append(pieces)
        scales.append(factors)
    gathered = []
    for row in range(identity["num_rows"]):
        data = b"".join(layer[row] for layer in elements)
        data += b"\0" * (-len(data) % 4)
        gathered.append(data + b"".join(layer[row] for layer in scales if layer))
    return gathered
