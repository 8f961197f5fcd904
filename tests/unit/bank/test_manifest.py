from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from typing import Any

import pytest

from megatron_graft.bank.manifest import (
    FORMAT_VERSION,
    KEYS_NAME,
    MANIFEST_NAME,
    Control,
    FileIdentity,
    Identity,
    Manifest,
    Processing,
    read_manifest,
    rows_name,
)
from megatron_graft.errors import BankFormatError, BankIncompleteError, BankVersionError
from megatron_graft.files import canonical_json
from tests.helpers.banks import donor_identity, tokenizer_identity

MISSING = object()


def make_manifest(control: Control | None = None, layers: tuple[int, ...] = (12, 20)) -> Manifest:
    names = [KEYS_NAME, *map(rows_name, layers)]
    identity = Identity(
        tokenizer=tokenizer_identity(),
        orders=(2, 3, 4),
        num_rows=7,
        row_dim=8,
        row_dtype="bfloat16",
        processing=Processing(centred=True, normalised=False),
        control=control,
        donor=donor_identity(layers),
        files=tuple(FileIdentity(name=name, bytes=100, sha256="ab" * 32) for name in names),
    )
    return Manifest(identity=identity, digest=identity.digest(), provenance={"host": "somewhere"})


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good manifest's JSON with one field changed or removed, and a digest that fits."""
    manifest = copy.deepcopy(make_manifest(Control(kind="random", seed=3)).to_json())
    *parents, name = path.split(".")
    target: Any = manifest
    for parent in parents:
        target = target[int(parent)] if isinstance(target, list) else target[parent]
    if value is MISSING:
        del target[name]
    else:
        target[name] = value
    if path not in ("digest", "identity"):
        with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate has no bytes to take a digest of
            manifest["digest"] = hashlib.sha256(canonical_json(manifest["identity"])).hexdigest()
    return manifest


@pytest.mark.parametrize("control", [None, Control(kind="shuffled", seed=0), Control(kind="random", seed=2**40)])
def test_json_and_back_is_the_same_manifest(control):
    manifest = make_manifest(control)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_digest_covers_the_identity_and_not_the_provenance():
    manifest = make_manifest()
    other = Manifest(identity=manifest.identity, digest=manifest.digest, provenance={"host": "elsewhere"})
    assert Manifest.from_json(other.to_json()).digest == manifest.digest
    digests = {make_manifest(Control(kind="random", seed=seed)).digest for seed in range(3)} | {manifest.digest}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("identity.tokenizer.eod", 1),
        ("identity.tokenizer.fingerprint", "0" * 64),
        ("identity.orders", [2, 3]),
        ("identity.num_rows", 8),
        ("identity.processing.centred", False),
        ("identity.control.seed", 4),
        ("identity.control", None),
        ("identity.donor.name", "another"),
        ("identity.files.0.sha256", "0" * 64),
    ],
)
def test_an_altered_identity_is_found_by_the_digest(path, value):
    altered = changed(path, value)
    Manifest.from_json(altered)  # well-formed: nothing but the digest tells
    altered["digest"] = make_manifest(Control(kind="random", seed=3)).digest
    with pytest.raises(BankFormatError, match="was altered"):
        Manifest.from_json(altered)


OBJECTS = ["identity", "identity.tokenizer", "identity.donor", "identity.processing", "identity.files.1"]
FIELDS = [
    "format", "version", "identity", "digest", "provenance",
    *(f"identity.{name}" for name in Identity.__dataclass_fields__),
    *(f"identity.tokenizer.{name}" for name in ("fingerprint", "vocab_size", "eod")),
    *(f"identity.donor.{name}" for name in ("name", "revision", "layers", "hidden_size")),
    *(f"identity.processing.{name}" for name in ("centred", "normalised")),
    *(f"identity.control.{name}" for name in ("kind", "seed")),
    *(f"identity.files.2.{name}" for name in ("name", "bytes", "sha256")),
]  # fmt: skip


WRONG_TYPES = [MISSING, None, -1, 1.5, True, "", "\ud800", [[]], {"a": {}}]
FITS = {("identity.control", "None"), ("provenance", "{'a': {}}")} | {
    (f"identity.processing.{name}", "True") for name in ("centred", "normalised")
}


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path in FIELDS for value in WRONG_TYPES if (path, repr(value)) not in FITS],
    ids=repr,
)
def test_a_field_that_is_missing_or_of_another_type_is_refused(path, value):
    with pytest.raises(BankFormatError, match=r"bank\.json"):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "another-format"),
        ("version", 0),
        ("identity.orders", []),
        ("identity.orders", [3, 2]),
        ("identity.orders", [2, 2]),
        ("identity.orders", [0, 1]),
        ("identity.orders", [256]),
        ("identity.num_rows", 0),
        ("identity.num_rows", 2**32),
        ("identity.row_dim", 0),
        ("identity.row_dtype", "float32"),
        ("identity.tokenizer.vocab_size", 0),
        ("identity.tokenizer.vocab_size", 2**31),
        ("identity.tokenizer.eod", 50),
        ("identity.tokenizer.fingerprint", "F0" * 32),
        ("identity.donor.layers", []),
        ("identity.donor.layers", [12, 12]),
        ("identity.donor.layers", [20, 12]),
        ("identity.donor.revision", "main"),
        ("identity.control.kind", "zeros"),
        ("identity.files", []),
        ("identity.files.0.name", "other.safetensors"),
        ("identity.files.1.name", "../rows-00000-of-00001.layer-12.safetensors"),
        ("identity.files.1.name", "rows-00000-of-00001.layer-12.safetensors\n"),
        ("digest", "0" * 63),
        *((f"{path}.surprise", 1) for path in OBJECTS),
        ("surprise", 1),
    ],
)
def test_a_value_out_of_range_or_an_unknown_field_is_refused(path, value):
    with pytest.raises(BankFormatError, match=r"bank\.json"):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_a_manifest_that_is_no_object_is_refused(value):
    with pytest.raises(BankFormatError, match="expected an object"):
        Manifest.from_json(value)


def test_a_newer_version_is_refused_whatever_else_it_holds():
    newer = {"format": "megatron-graft-bank", "version": FORMAT_VERSION + 1, "something": "new"}
    with pytest.raises(BankVersionError, match="newer format version .got 2; expected at most 1"):
        Manifest.from_json(newer)


def test_a_directory_without_a_manifest_is_incomplete(tmp_path):
    with pytest.raises(BankIncompleteError, match="did not finish"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_manifest_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(BankFormatError, match="is not JSON"):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_refused_unread(tmp_path):
    with (tmp_path / MANIFEST_NAME).open("wb") as stream:
        stream.truncate(2**34)  # sparse
    with pytest.raises(BankFormatError, match="is too large"):
        read_manifest(tmp_path)
