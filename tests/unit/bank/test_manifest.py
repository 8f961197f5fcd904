from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from typing import Any

import pytest

from megatron_graft.bank.manifest import (
    FORMAT_VERSION,
    INDEX_NAME,
    KEYS_NAME,
    MANIFEST_NAME,
    MAX_NODES,
    Control,
    FileIdentity,
    Identity,
    IndexFile,
    Manifest,
    Processing,
    read_manifest,
    rows_name,
)
from megatron_graft.errors import BankFormatError, BankIncompleteError, BankVersionError
from megatron_graft.files import canonical_json
from tests.helpers.banks import donor_identity, tokenizer_identity


class Missing:
    """What takes the place of a field that is left out; its name is the same in every process."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()


def make_manifest(control: Control | None = None, layers: tuple[int, ...] = (12, 20), shards: int = 1) -> Manifest:
    names = [KEYS_NAME, *(rows_name(layer, shard, shards) for layer in layers for shard in range(shards))]
    index = IndexFile(name=INDEX_NAME, bytes=9000, sha256="cd" * 32, phantoms=2)
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
    return Manifest(identity=identity, digest=identity.digest(), index=index, provenance={"host": "somewhere"})


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


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("control", [None, Control(kind="shuffled", seed=0), Control(kind="random", seed=2**40)])
def test_json_and_back_is_the_same_manifest(control, shards):
    manifest = make_manifest(control, shards=shards)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.identity.shards == shards


def test_shards_are_named_by_layer_number_and_count():
    identity = make_manifest(shards=2).identity
    assert identity.shard_names(20) == [
        "rows-00000-of-00002.layer-20.safetensors",
        "rows-00001-of-00002.layer-20.safetensors",
    ]
    assert [file.name for file in make_manifest(shards=2).files()] == [
        KEYS_NAME, *identity.shard_names(12), *identity.shard_names(20), INDEX_NAME,
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [(12,), (12, 20, 3)])
@pytest.mark.parametrize("change", ["one is missing", "one too many", "swapped", "of another count"])
def test_files_that_are_not_all_shards_in_order_are_refused(layers, change):
    manifest = make_manifest(layers=layers, shards=3).to_json()
    files = manifest["identity"]["files"]
    if change == "one is missing":
        del files[3]
    elif change == "one too many":
        files.append(dict(files[-1]))
    elif change == "swapped":
        files[1], files[2] = files[2], files[1]
    else:
        files[3]["name"] = rows_name(12, 2, 4)
    with pytest.raises(BankFormatError, match=r"bank\.json\.identity\.files\.\d+: is the wrong file"):
        Manifest.from_json(manifest)


def test_the_digest_covers_the_identity_and_neither_index_nor_provenance():
    manifest = make_manifest()
    index = IndexFile(name=INDEX_NAME, bytes=9001, sha256="ef" * 32, phantoms=2)
    other = Manifest(identity=manifest.identity, digest=manifest.digest, index=index, provenance={"host": "elsewhere"})
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
        ("identity.row_dtype", "float16"),
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


OBJECTS = ["index", "identity", "identity.tokenizer", "identity.donor", "identity.processing", "identity.files.1"]
FIELDS = [
    "format", "version", "identity", "digest", "index", "provenance",
    *(f"index.{name}" for name in ("name", "bytes", "sha256", "phantoms")),
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
        ("identity.orders", [2, 9]),
        ("identity.num_rows", 0),
        ("identity.num_rows", 2**32),
        ("identity.row_dim", 0),
        ("identity.row_dtype", "float64"),
        ("identity.row_dtype", "int8|bfloat16"),
        ("identity.tokenizer.vocab_size", 0),
        ("identity.tokenizer.vocab_size", 2**20 + 1),
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
        ("index.name", "indexxqbt"),
        ("index.name", "../index.qbt"),
        ("index.sha256", "0" * 63),
        ("index.phantoms", MAX_NODES - 6),  # with 7 rows
        ("index.phantoms", 2**40),
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


def test_as_many_phantoms_as_ids_are_left_are_accepted():
    assert Manifest.from_json(changed("index.phantoms", MAX_NODES - 7)).index.phantoms == MAX_NODES - 7


@pytest.mark.parametrize("row_dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3"])
def test_every_row_dtype_is_accepted(row_dtype):
    assert Manifest.from_json(changed("identity.row_dtype", row_dtype)).identity.row_dtype == row_dtype


def test_another_version_is_refused_whatever_else_it_holds():
    other = {"format": "megatron-graft-bank", "something": "else"}
    with pytest.raises(BankVersionError, match=r"newer format version .got 3; expected 2.\. Update megatron-graft"):
        Manifest.from_json({**other, "version": FORMAT_VERSION + 1})
    with pytest.raises(BankVersionError, match=r"older format version .got 1; expected 2.\. Rebuild the bank"):
        Manifest.from_json({**other, "version": 1})


def test_a_directory_without_a_manifest_is_incomplete(tmp_path):
    with pytest.raises(BankIncompleteError, match="did not finish"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"a": 1, "a": 2}'])
def test_a_manifest_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(BankFormatError, match="is not JSON"):
        read_manifest(tmp_path)


def test_a_huge_manifest_is_refused_unread(tmp_path):
    with (tmp_path / MANIFEST_NAME).open("wb") as stream:
        stream.truncate(2**34)  # sparse
    with pytest.raises(BankFormatError, match="is too large"):
        read_manifest(tmp_path)
