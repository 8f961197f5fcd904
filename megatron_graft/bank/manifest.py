"""``bank.json``: what a bank is (its identity) and where it came from (its provenance).

The identity holds everything that can change a result, the digests of all files included; the bank's digest
is the SHA-256 of its canonical JSON. Dates, hosts and figures of the build are provenance and stay outside
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from megatron_graft.bank.fields import Fields
from megatron_graft.errors import BankFormatError, BankIncompleteError, BankVersionError
from megatron_graft.files import canonical_json

FORMAT_NAME = "megatron-graft-bank"
FORMAT_VERSION = 1
MANIFEST_NAME = "bank.json"
KEYS_NAME = "keys.safetensors"
ROW_DTYPE = "bfloat16"
MAX_ORDER = 255
MAX_ROWS = 2**32 - 2
MAX_VOCAB_SIZE = 2**31 - 1
_MAX_MANIFEST_BYTES = 1 << 24
_MAX_SIZE = 2**63 - 1

COPY_AGAIN = "Copy or build the bank again."

ControlKind = Literal["shuffled", "random"]


def rows_name(layer: int) -> str:
    """Name of the file that holds the rows of one donor layer."""
    return f"rows-00000-of-00001.layer-{layer}.safetensors"


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
class Identity:
    """All that can change a result. ``row_dim`` is the width of a row over all donor layers, in elements."""

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
            num_rows=fields.integer("num_rows", 1, MAX_ROWS),
            row_dim=fields.integer("row_dim", 1, 2**31 - 1),
            row_dtype=fields.text("row_dtype", ROW_DTYPE),
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
        names = [file.name for file in self.files]
        expected = [KEYS_NAME, *map(rows_name, self.donor.layers)]
        if names != expected:
            raise BankFormatError(f"{where}.files", "names the wrong files", got=names, expected=expected)

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
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this manifest."""
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "identity": self.identity.to_json(),
            "digest": self.digest,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any, where: str = MANIFEST_NAME) -> Manifest:
        """Check and take apart a decoded ``bank.json``.

        Raises:
            BankFormatError: a field is missing, unknown, of the wrong type or at odds with another one, or
                the digest does not belong to the identity.
            BankVersionError: the format version is newer than this package knows.
        """
        fields = Fields(value, where)
        fields.text("format", FORMAT_NAME)
        version = fields.integer("version", FORMAT_VERSION, _MAX_SIZE)
        if version > FORMAT_VERSION:
            raise BankVersionError(
                where,
                "was written by a newer format version",
                got=version,
                expected=f"at most {FORMAT_VERSION}",
                remedy="Update megatron-graft or rebuild the bank.",
            )
        manifest = cls(
            identity=Identity.from_fields(fields.object("identity")),
            digest=fields.sha256("digest"),
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
        return manifest


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
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise BankFormatError(path, "cannot be read", got=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise BankFormatError(path, "is not JSON", got=error, remedy=COPY_AGAIN) from error
    return Manifest.from_json(value, str(path))
