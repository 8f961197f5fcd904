"""``bank.json``: what a bank is (its identity) and where it came from (its provenance).

The identity holds everything that can change a result, the digests of keys and rows included; the bank's digest
is the SHA-256 of its canonical JSON. The index follows from the keys, so it stands beside the identity: a better
index of the same keys is the same bank. Dates, hosts and figures of the build are provenance and stay outside too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megatron_graft.bank.fields import Fields, object_without_repeats
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.errors import BankFormatError, BankIncompleteError, BankVersionError
from megatron_graft.files import canonical_json

FORMAT_NAME = "megatron-graft-bank"
FORMAT_VERSION = 2
MANIFEST_NAME = "bank.json"
KEYS_NAME = "keys.safetensors"
INDEX_NAME = "index.qbt"
MAX_ORDER = 8
MAX_NODES = 2**32 - 1
"""Most rows and phantoms together: the index numbers both with 32 bits, of which the highest means "none"."""
MAX_VOCAB_SIZE = 2**20
MAX_SHARDS = 99_999
_MAX_MANIFEST_BYTES = 1 << 24
_MAX_SIZE = 2**63 - 1

COPY_AGAIN = "Copy or build the bank again."
_REBUILD = "Rebuild the bank with tools/build_bank.py."

ControlKind = Literal["shuffled", "random"]


def rows_name(layer: int, shard: int = 0, shards: int = 1) -> str:
    """Name of the file that holds one shard of the rows of one donor layer."""
    return f"rows-{shard:05d}-of-{shards:05d}.layer-{layer}.safetensors"


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """The tokenizer whose ids the keys are made of: fingerprint (hex SHA-256), vocabulary size, id of EOD."""

    fingerprint: str
    vocab_size: int
    eod: int

    @classmethod
    def from_fields(cls, fields: Fields) -> TokenizerIdentity:
        """Take apart ``identity.tokenizer``."""
        fingerprint = fields.sha256("fingerprint")
        vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB_SIZE)
        eod = fields.integer("eod", 0, vocab_size - 1)
        identity = cls(fingerprint=fingerprint, vocab_size=vocab_size, eod=eod)
        fields.done()
        return identity


@dataclass(frozen=True, kw_only=True)
class DonorIdentity:
    """The model the rows came from: name, SHA-256 of its weights, layers (in column order), hidden size."""

    name: str
    revision: str
    layers: tuple[int, ...]
    hidden_size: int

    @classmethod
    def from_fields(cls, fields: Fields) -> DonorIdentity:
        """Take apart ``identity.donor``."""
        identity = cls(
            name=fields.text("name"),
            revision=fields.sha256("revision"),
            layers=fields.integers("layers", 0, 2**31 - 1),
            hidden_size=fields.integer("hidden_size", 1, 2**31 - 1),
        )
        fields.done()
        return identity


@dataclass(frozen=True, kw_only=True)
class Processing:
    """What was done to the donor's states, layer by layer.

    Attributes:
        centred: the mean over all rows was removed, per dimension.
        normalised: rows were scaled to a root mean square of 1; with ``centred``, before and after the mean was taken.
    """

    centred: bool
    normalised: bool

    @classmethod
    def from_fields(cls, fields: Fields) -> Processing:
        """Take apart ``identity.processing``."""
        processing = cls(centred=fields.boolean("centred"), normalised=fields.boolean("normalised"))
        fields.done()
        return processing


@dataclass(frozen=True, kw_only=True)
class Control:
    """Marks a control bank: rows permuted among the keys, or random rows with the real rows' moments."""

    kind: ControlKind
    seed: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Control:
        """Take apart ``identity.control``."""
        kind = cast(ControlKind, fields.text("kind", "shuffled|random"))
        control = cls(kind=kind, seed=fields.integer("seed", 0, _MAX_SIZE))
        fields.done()
        return control


@dataclass(frozen=True, kw_only=True)
class FileIdentity:
    """One file of the bank: name, size in bytes, hex SHA-256."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def from_fields(cls, fields: Fields) -> FileIdentity:
        """Take apart one entry of ``identity.files``."""
        identity = cls(
            # A plain name: a manifest must not be able to point outside its own directory.
            name=fields.text("name", r"[A-Za-z0-9_][A-Za-z0-9_.-]*"),
            bytes=fields.integer("bytes", 0, _MAX_SIZE),
            sha256=fields.sha256("sha256"),
        )
        fields.done()
        return identity


@dataclass(frozen=True, kw_only=True)
class IndexFile(FileIdentity):
    """The index file, and how many suffixes of keys in it are no keys themselves."""

    phantoms: int

    @classmethod
    def from_fields(cls, fields: Fields) -> IndexFile:
        """Take apart ``index``."""
        index = cls(
            name=fields.text("name", re.escape(INDEX_NAME)),
            bytes=fields.integer("bytes", 0, _MAX_SIZE),
            sha256=fields.sha256("sha256"),
            phantoms=fields.integer("phantoms", 0, MAX_NODES - 1),
        )
        fields.done()
        return index


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that can change a result.

    ``row_dim`` is the width of a row over all donor layers, in elements; ``row_dtype`` one of
    :data:`~megatron_graft.bank.row_layout.ROW_DTYPES`; ``files`` the keys, then layer by layer its shards.
    """

    tokenizer: TokenizerIdentity
    orders: tuple[int, ...]
    num_rows: int
    row_dim: int
    row_dtype: str
    processing: Processing
    control: Control | None
    donor: DonorIdentity
    files: tuple[FileIdentity, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Identity:
        """Take apart ``identity``."""
        control, files = fields.take("control"), fields.array("files")
        where = fields.where
        identity = cls(
            tokenizer=TokenizerIdentity.from_fields(fields.object("tokenizer")),
            orders=fields.integers("orders", 1, MAX_ORDER),
            num_rows=fields.integer("num_rows", 1, MAX_NODES),
            row_dim=fields.integer("row_dim", 1, 2**31 - 1),
            row_dtype=fields.text("row_dtype", "|".join(ROW_DTYPES)),
            processing=Processing.from_fields(fields.object("processing")),
            control=None if control is None else Control.from_fields(Fields(control, f"{where}.control")),
            donor=DonorIdentity.from_fields(fields.object("donor")),
            files=tuple(FileIdentity.from_fields(Fields(file, f"{where}.files")) for file in files),
        )
        fields.done()
        identity._check(where)
        return identity

    def _check(self, where: str) -> None:
        if list(self.orders) != sorted(self.orders):
            raise BankFormatError(f"{where}.orders", "is not ascending", got=list(self.orders))
        if not 1 <= self.shards <= MAX_SHARDS:
            raise BankFormatError(f"{where}.files", "has a wrong number of files", got=len(self.files))
        expected = [KEYS_NAME, *(name for layer in self.donor.layers for name in self.shard_names(layer))]
        for place, name in enumerate(expected):
            found = self.files[place].name if place < len(self.files) else "no more files"
            if found != name:
                raise BankFormatError(f"{where}.files.{place}", "is the wrong file", got=found, expected=name)

    @property
    def shards(self) -> int:
        """How many files the rows of every donor layer lie in."""
        return -(-(len(self.files) - 1) // len(self.donor.layers))

    def shard_names(self, layer: int) -> list[str]:
        """The files of one donor layer's rows, in row order."""
        return [rows_name(layer, shard, self.shards) for shard in range(self.shards)]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this identity."""
        value = asdict(self)
        value["orders"] = list(self.orders)
        value["donor"]["layers"] = list(self.donor.layers)
        value["files"] = list(value["files"])
        return value

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: the bank's name for every comparison."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``bank.json``."""

    identity: Identity
    digest: str
    index: IndexFile
    provenance: Mapping[str, Any]

    def files(self) -> tuple[FileIdentity, ...]:
        """All files of the bank but the manifest itself."""
        return (*self.identity.files, self.index)

    def digest_of_rows(self, num_rows: int) -> str:
        """The digest of the bank's first ``num_rows`` rows opened as a bank; of all of them, it is :attr:`digest`."""
        if num_rows == self.identity.num_rows:
            return self.digest
        return hashlib.sha256(canonical_json({"bank": self.digest, "rows": num_rows})).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this manifest."""
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "identity": self.identity.to_json(),
            "digest": self.digest,
            "index": asdict(self.index),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any, where: str = MANIFEST_NAME) -> Manifest:
        """Check and take apart a decoded ``bank.json``.

        Raises:
            BankFormatError: a field is missing, unknown, of the wrong type or at odds with another one, or
                the digest does not belong to the identity.
            BankVersionError: the format version is not the one this package writes.
        """
        fields = Fields(value, where)
        fields.text("format", FORMAT_NAME)
        _check_version(fields.integer("version", 1, _MAX_SIZE), where)
        manifest = cls(
            identity=Identity.from_fields(fields.object("identity")),
            digest=fields.sha256("digest"),
            index=IndexFile.from_fields(fields.object("index")),
            provenance=fields.take("provenance"),
        )
        fields.done()
        if not isinstance(manifest.provenance, dict):
            raise BankFormatError(f"{where}.provenance", "is malformed", expected="an object")
        if manifest.digest != manifest.identity.digest():
            raise BankFormatError(
                where,
                "was altered: its digest does not belong to its identity",
                got=manifest.digest,
                expected=manifest.identity.digest(),
                remedy=COPY_AGAIN,
            )
        nodes = manifest.identity.num_rows + manifest.index.phantoms
        if nodes > MAX_NODES:
            limit = f"at most {MAX_NODES} with the rows"
            raise BankFormatError(f"{where}.index.phantoms", "is too large", got=nodes, expected=limit)
        return manifest


def _check_version(version: int, where: str) -> None:
    if version == FORMAT_VERSION:
        return
    older = version < FORMAT_VERSION
    raise BankVersionError(
        where,
        f"was written by {'an older' if older else 'a newer'} format version",
        got=version,
        expected=FORMAT_VERSION,
        remedy=_REBUILD if older else f"Update megatron-graft. {_REBUILD}",
    )


def read_manifest(directory: Path) -> Manifest:
    """Read ``bank.json`` of a bank directory.

    Raises:
        BankIncompleteError: there is none.
        BankFormatError, BankVersionError: as :meth:`Manifest.from_json`.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise BankIncompleteError(
            directory,
            f"has no {MANIFEST_NAME}: it is not a bank, or its build or copy did not finish",
            remedy=COPY_AGAIN,
        )
    try:
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            limit = f"at most {_MAX_MANIFEST_BYTES} bytes"
            raise BankFormatError(path, "is too large", got=size, expected=limit)
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=object_without_repeats)
    except OSError as error:
        raise BankFormatError(path, "cannot be read", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise BankFormatError(path, "is not JSON", got=error, remedy=COPY_AGAIN) from error
    return Manifest.from_json(value, str(path))
