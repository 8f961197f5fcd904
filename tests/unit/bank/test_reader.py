from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.extension import MODULE_NAME
from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, MANIFEST_NAME, Manifest, rows_name
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.bank.tensorfile import write_tensors
from megatron_graft.bank.writer import write_bank
from megatron_graft.errors import (
    BankError,
    BankFormatError,
    BankIncompleteError,
    BankVersionError,
    ConfigError,
    IdentityError,
    NativeExtensionError,
)
from megatron_graft.lookup.index import open_index
from tests.helpers.banks import (
    bank_arguments,
    keys_of,
    make_bank,
    random_counts,
    refit_manifest,
    table_bytes,
)
from tests.helpers.sparse_bank import resident_pages, write_sparse_bank

COUNTS = {(1, 2): 9, (2, 3): 8, (7, 1, 2): 5, (3, 3, 3, 3): 2, (4, 4): 1}
LAYERS = (20, 12)  # column order is the donor's order of layers, not the numerical one
IMPLEMENTATIONS = ["native", "reference"]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("banks") / "bank"
    make_bank(path, COUNTS, layers=LAYERS, shard_rows=3)
    return path


@pytest.fixture
def bank_path(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bank"))


SHARDS = [rows_name(layer, shard, 2) for layer in LAYERS for shard in range(2)]


@pytest.mark.parametrize("verify", ["header", "sample", "full"])
@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
def test_an_open_bank_says_what_was_written(bank_path, verify, gather):
    bank = open_bank(str(bank_path), verify, gather=gather)
    assert (bank.num_rows, bank.row_dim, bank.row_bytes, bank.orders) == (5, 8, 16, (2, 3, 4))
    assert (bank.min_order, bank.max_order, bank.vocab_size, bank.eod) == (2, 4, 50, 0)
    assert bank.tokenizer_fingerprint == "f0" * 32
    assert bank.digest == bank.manifest.identity.digest()
    assert bank.rows_of_keys() == {key: row for row, key in enumerate(COUNTS)}
    assert bank.key_counts.tolist() == list(COUNTS.values())
    assert bank.index_path == bank_path / INDEX_NAME
    assert (list(bank.rows_by_layer), bank.layer_widths) == ([20, 12], (4, 4))
    assert bank.manifest.index.phantoms == 2  # (3, 3) and (3, 3, 3)


def test_nothing_of_a_bank_can_be_written(tmp_path):
    bank = make_bank(tmp_path / "bank", COUNTS, row_dtype="int8")
    rows = bank.rows_by_layer[12]
    for array in (bank.key_ids, bank.key_orders, bank.key_counts, *rows.shards, *rows.scales):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.fixture(scope="module", params=[(name, *form) for name in ROW_DTYPES for form in ((4, None), (3, 2), (5, 1))])
def any_bank(request, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A bank of any row dtype, width and number of shards, and its rows as a gather must give them."""
    row_dtype, width, shard_rows = request.param
    arguments = bank_arguments(COUNTS, layers=LAYERS, width=width, row_dtype=row_dtype, shard_rows=shard_rows)
    path = tmp_path_factory.mktemp("any") / "bank"
    write_bank(path, **arguments)
    return path, table_bytes(arguments)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
def test_gather_gives_the_bytes_written_and_zeros_for_negative_rows(any_bank, gather, threads):
    path, table = any_bank
    bank = open_bank(path, "full", gather=gather, threads=threads)
    rows = np.random.default_rng(0).integers(-2, 5, 400)
    out = np.full((400, bank.row_bytes), 0xFF, dtype=np.uint8)
    bank.gather(rows, out)
    np.testing.assert_array_equal(out, np.where(rows[:, None] < 0, 0, table.take(np.maximum(rows, 0), axis=0)))


@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
def test_column_slices_side_by_side_are_the_whole_row(any_bank, gather):
    path, _ = any_bank
    bank = open_bank(path, gather=gather)
    rows = np.array([4, -1, 0, 2, 2], dtype=np.int64)
    whole = bank.float_rows(rows)
    assert whole.dtype == np.float32 and not whole[1].any()
    for cut in range(1, bank.row_dim):
        parts = [bank.float_rows(rows, columns) for columns in ((0, cut), (cut, bank.row_dim))]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_float_rows_are_elements_times_scales(tmp_path):
    arguments = bank_arguments(COUNTS, layers=LAYERS, row_dtype="int8", shard_rows=2)
    write_bank(tmp_path / "bank", **arguments)
    found = open_bank(tmp_path / "bank").float_rows(np.arange(5))
    scaled = [arguments["layers"][layer] * arguments["scales"][layer][:, None] for layer in LAYERS]
    np.testing.assert_array_equal(found, np.concatenate(scaled, axis=1))


@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
def test_gather_of_nothing_is_nothing(bank_path, gather):
    open_bank(bank_path, gather=gather).gather(np.empty(0, dtype=np.int64), np.empty((0, 16), dtype=np.uint8))


@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("rows", "out", "message"),
    [
        (np.array([0, 5]), np.full((2, 16), 7, np.uint8), "rows: names a row .* .got 5; expected below 5"),
        (np.array([0, 2**62]), np.full((2, 16), 7, np.uint8), "rows: names a row"),
        (np.array([0], dtype=np.int32), np.full((1, 16), 7, np.uint8), "rows: has the wrong dtype"),
        (np.array([[0]]), np.full((1, 16), 7, np.uint8), "rows: has the wrong shape"),
        (np.arange(4)[::2], np.full((2, 16), 7, np.uint8), "rows: is not C-contiguous"),
        (np.array([0]), np.full((1, 8), 7, np.uint16), "out: has the wrong dtype"),
        (np.array([0]), np.full((1, 15), 7, np.uint8), "out: has the wrong shape"),
        (np.array([0]), np.full((2, 16), 7, np.uint8), "out: has the wrong shape"),
        (np.array([0]), np.full((1, 32), 7, np.uint8)[:, ::2], "out: is not C-contiguous"),
    ],
)
def test_gather_refuses_what_does_not_fit_and_writes_nothing(bank_path, gather, rows, out, message):
    with pytest.raises(ArrayError, match=f"^{message}"):
        open_bank(bank_path, gather=gather).gather(rows, out)
    assert (out == 7).all()


def test_gather_refuses_columns_and_outputs_that_do_not_fit_them(bank_path):
    bank = open_bank(bank_path)
    with pytest.raises(ArrayError, match="^columns: are no columns of a row .got .4, 9.; expected 0 <= first"):
        bank.gather(np.array([0]), np.zeros((1, 10), np.uint8), (4, 9))
    with pytest.raises(ArrayError, match="^out: has the wrong shape"):
        bank.gather(np.array([0]), np.zeros((1, 16), np.uint8), (4, 8))


def test_gather_refuses_a_read_only_or_overlapping_output(bank_path):
    bank = open_bank(bank_path)
    buffer = np.zeros(2, dtype=np.int64)
    out = buffer.view(np.uint8).reshape(1, 16)
    with pytest.raises(ArrayError, match="^out: shares memory with rows"):
        bank.gather(buffer[:1], out)
    out.flags.writeable = False
    with pytest.raises(ArrayError, match="^out: is read-only"):
        bank.gather(np.zeros(1, dtype=np.int64), out)


def test_without_the_extension_only_the_reference_opens_and_gathers(bank_path, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE_NAME, None)
    with pytest.raises(NativeExtensionError, match="make native"):
        open_bank(bank_path)
    for verify in ("header", "sample", "full"):
        bank = open_bank(bank_path, verify, gather="reference")
    bank.gather(np.zeros(1, dtype=np.int64), np.empty((1, 16), dtype=np.uint8))


@pytest.mark.parametrize("rows", [None, 5, 3])
def test_a_pickled_bank_is_a_path(bank_path, rows):
    bank = open_bank(bank_path, gather="reference", rows=rows, threads=2)
    pickled = pickle.dumps(bank)
    assert len(pickled) < 1000
    copy: Bank = pickle.loads(pickled)
    assert (copy.path, copy.digest, copy.num_rows, copy.threads) == (bank.path, bank.digest, rows or 5, 2)
    np.testing.assert_array_equal(copy.float_rows(np.arange(3)), bank.float_rows(np.arange(3)))


@pytest.mark.parametrize("counts", [COUNTS, {(1, 2): 9}])
def test_a_bank_replaced_since_it_was_pickled_is_refused(bank_path, counts):
    pickled = pickle.dumps(open_bank(bank_path))
    smaller = pickle.dumps(open_bank(bank_path, rows=3))
    shutil.rmtree(bank_path)
    make_bank(bank_path, counts, layers=LAYERS, seed=1)
    for data in (pickled, smaller):
        with pytest.raises(IdentityError, match="was replaced"):
            pickle.loads(data)


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_path_that_is_no_directory_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(BankError, match=f"{name}: is not a directory"):
        open_bank(tmp_path / name)


def test_a_bank_without_a_manifest_is_incomplete(bank_path):
    (bank_path / MANIFEST_NAME).unlink()
    with pytest.raises(BankIncompleteError, match="did not finish"):
        open_bank(bank_path)


@pytest.mark.parametrize(("version", "problem"), [(1, "an older"), (3, "a newer")])
def test_a_bank_of_another_version_is_refused(bank_path, version, problem):
    manifest = json.loads((bank_path / MANIFEST_NAME).read_text())
    (bank_path / MANIFEST_NAME).write_text(json.dumps({**manifest, "version": version}))
    with pytest.raises(BankVersionError, match=f"{MANIFEST_NAME}: was written by {problem} .*Rebuild the bank"):
        open_bank(bank_path)


@pytest.mark.parametrize("name", [KEYS_NAME, INDEX_NAME, *SHARDS])
def test_a_missing_truncated_or_grown_file_is_refused_at_once(bank_path, name):
    data = (bank_path / name).read_bytes()
    for wrong in (data[:-1], data[:100], b"", data + b"x"):
        (bank_path / name).write_bytes(wrong)
        with pytest.raises(BankFormatError, match=f"{name}: is truncated or was altered"):
            open_bank(bank_path)
    (bank_path / name).unlink()
    with pytest.raises(BankFormatError, match=f"{name}: is missing"):
        open_bank(bank_path)


@pytest.mark.parametrize("verify", ["header", "sample", "full"])
def test_an_altered_manifest_is_found_at_once(bank_path, verify):
    text = (bank_path / MANIFEST_NAME).read_text()
    (bank_path / MANIFEST_NAME).write_text(text.replace('"eod": 0', '"eod": 9'))
    with pytest.raises(BankFormatError, match="was altered: its digest"):
        open_bank(bank_path, verify)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_rows", 4, "does not hold the keys"),
        ("orders", [2, 3], "does not hold the keys"),
        ("orders", [1, 4], "another bank: its min_order differs"),
        ("row_dim", 9, "rows of the wrong width"),
        ("row_dtype", "float16", "does not hold the rows"),
        ("row_dtype", "int8", "does not hold the rows"),
        ("tokenizer", {"fingerprint": "f0" * 32, "vocab_size": 51, "eod": 0}, "another bank: its vocab_size differs"),
        ("tokenizer", {"fingerprint": "f1" * 32, "vocab_size": 50, "eod": 0}, "its tokenizer_sha256 differs"),
    ],
)
def test_files_at_odds_with_the_identity_are_refused(bank_path, field, value, message):
    refit_manifest(bank_path, lambda manifest: manifest["identity"].update({field: value}))
    with pytest.raises(BankFormatError, match=message):
        open_bank(bank_path, gather="reference" if field == "num_rows" or value == [2, 3] else "native")


@pytest.mark.parametrize(
    "replaced",
    [
        {"key_orders": ("I64", np.full(5, 2))},
        {"key_surprises": ("U8", np.zeros(5, dtype=np.uint8))},
        {"key_ids": ("I32", np.zeros((5, 5), dtype=np.int32))},
        {"key_counts": ("I64", np.ones(4, dtype=np.int64))},
        {"key_counts": None},
    ],
)
def test_keys_of_another_type_shape_or_name_are_refused(bank_path, replaced):
    keys = keys_of(COUNTS)
    tensors = {
        "key_counts": ("I64", keys.key_counts),
        "key_ids": ("I32", keys.key_ids),
        "key_orders": ("U8", keys.key_orders),
    }
    wanted = {name: tensor for name, tensor in {**tensors, **replaced}.items() if tensor is not None}
    write_tensors(bank_path / KEYS_NAME, wanted)
    refit_manifest(bank_path)
    with pytest.raises(BankFormatError, match="does not hold the keys"):
        open_bank(bank_path, gather="reference")


@given(data=st.data())
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("gather", IMPLEMENTATIONS)
def test_the_first_rows_of_a_bank_are_the_bank_of_its_most_frequent_keys(tmp_path_factory, gather, data):
    directory = tmp_path_factory.mktemp("prefix")
    counts = random_counts(data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1000)), vocab_size=6)
    num_rows = data.draw(st.integers(1, len(counts)))
    arguments = bank_arguments(counts, layers=LAYERS, shard_rows=data.draw(st.integers(1, 50)))
    write_bank(directory / "whole", **arguments)
    cut = open_bank(directory / "whole", "full", rows=num_rows, gather=gather)
    keys = keys_of(counts)
    ranked = {tuple(ids[-order:]): int(count) for ids, order, count in zip(
        keys.key_ids[:num_rows].tolist(), keys.key_orders[:num_rows].tolist(), keys.key_counts[:num_rows], strict=True
    )}  # fmt: skip
    rows = {layer: np.ascontiguousarray(array[:num_rows]) for layer, array in arguments["layers"].items()}
    write_bank(directory / "built", **{**bank_arguments(ranked, layers=LAYERS), "layers": rows})
    built = open_bank(directory / "built", gather=gather)
    assert (cut.num_rows, cut.rows_of_keys()) == (num_rows, built.rows_of_keys())
    np.testing.assert_array_equal(cut.key_counts, built.key_counts)
    tokens = np.random.default_rng(num_rows).integers(-1, 7, (3, 40))
    found, expected = (open_index(bank, gather).lookup(tokens, eod=0) for bank in (cut, built))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    every = np.arange(-1, num_rows)
    out = np.zeros((2, len(every), cut.row_bytes), dtype=np.uint8)
    cut.gather(every, out[0])
    built.gather(every, out[1])
    np.testing.assert_array_equal(out[0], out[1])
    with pytest.raises(ArrayError, match=f"expected below {num_rows}"):
        cut.gather(np.array([num_rows]), out[0, :1])


def test_fewer_rows_are_another_bank_and_all_rows_are_the_same(bank_path):
    whole = open_bank(bank_path)
    digests = [open_bank(bank_path, rows=rows).digest for rows in range(1, 6)]
    assert len(set(digests)) == 5 and digests[-1] == whole.digest
    assert open_bank(bank_path, rows=3).digest == digests[2]
    cut = open_bank(bank_path, rows=1)
    assert (cut.orders, cut.min_order, cut.max_order) == (whole.orders, 2, 4)


def test_words_that_name_nothing_are_refused(bank_path):
    with pytest.raises(ConfigError, match="verify: is unknown .got Full; expected header or sample or full"):
        open_bank(bank_path, "Full")
    with pytest.raises(ConfigError, match="gather: is unknown .got Native; expected native or reference"):
        open_bank(bank_path, gather="Native")


@pytest.mark.parametrize("rows", [0, -1, 6])
def test_rows_that_are_not_there_are_refused(bank_path, rows):
    with pytest.raises(ConfigError, match=f"rows of {bank_path}: are not in this bank .got {rows}; expected 1 to 5"):
        open_bank(bank_path, rows=rows)
    with pytest.raises(ConfigError, match="threads: is out of range"):
        open_bank(bank_path, threads=0)


def test_an_open_reads_no_key_and_no_row_however_many_there_are(tmp_path):
    write_sparse_bank(tmp_path / "bank", num_rows=50_000_000)
    bank = open_bank(tmp_path / "bank")
    assert bank.num_rows == 50_000_000
    # What the kernel read ahead behind the headers is all there is: a pass over the keys would bring in 350,000 pages.
    for array in (bank.key_counts, bank.key_ids, bank.key_orders, bank.rows_by_layer[12].shards[0]):
        assert resident_pages(array) <= 256
    open_bank(tmp_path / "bank", rows=30_000_000)
    assert resident_pages(bank.key_ids) <= 256


def test_the_digest_tells_banks_apart(tmp_path):
    digests = {
        make_bank(tmp_path / "a", COUNTS).digest,
        make_bank(tmp_path / "b", COUNTS).digest,
        make_bank(tmp_path / "c", COUNTS, seed=1).digest,
        make_bank(tmp_path / "d", {**COUNTS, (4, 4): 2}).digest,
        make_bank(tmp_path / "e", COUNTS, eod=30).digest,
        make_bank(tmp_path / "f", COUNTS, shard_rows=3).digest,
    }
    assert len(digests) == 5  # a and b are the same bank
    manifests = [Manifest.from_json(json.loads((tmp_path / n / MANIFEST_NAME).read_text())) for n in "ab"]
    assert manifests[0] == manifests[1]
