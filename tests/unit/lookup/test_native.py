"""The extension by itself: threads, and what it refuses even when nobody checked before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.extension import load_extension
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.index import open_index
from tests.helpers.banks import EOD
from tests.helpers.forked import check_in_fork
from tests.helpers.threads import others_run_during

KEY_IDS = np.array([[-1, 3, 1], [3, 1, 2]], dtype=np.int32)
KEY_ORDERS = np.array([2, 3], dtype=np.uint8)
TOKENS = np.array([[3, 1, 2]], dtype=np.int32)
BODIES = ("plain", "portable", "avx2", "avx512")


@pytest.fixture
def index_path(tmp_path: Path) -> Path:
    path = tmp_path / "index"
    build(path)
    return path


def build(path: Path, ids: np.ndarray = KEY_IDS, orders: np.ndarray = KEY_ORDERS, vocab_size: int = 9, **changes):
    settings = {"tokenizer_sha256": b"t" * 32, "keys_sha256": b"k" * 32, "threads": 1, "memory_bytes": 1 << 20}
    return load_extension().build_index(str(path), ids, orders, vocab_size, **{**settings, **changes})


def opened(path: Path, row_limit: int = 2, pages: str = "file", body: str = "auto", threads: int = 1):
    return load_extension().SuffixIndex(str(path), row_limit, pages, body, threads)


def outputs(shape: tuple[int, ...] = (1, 3)) -> tuple[np.ndarray, np.ndarray]:
    return np.full(shape, 7, np.int64), np.full(shape, 7, np.uint8)


def test_it_answers_directly(index_path):
    rows, orders = outputs()
    opened(index_path).lookup(TOKENS, None, None, rows, orders)
    assert (rows.tolist(), orders.tolist()) == ([[-1, 0, 1]], [[0, 2, 3]])


def test_a_header_says_what_the_index_was_built_from(index_path):
    header = opened(index_path).header
    assert header == load_extension().read_index_header(str(index_path)) == build(index_path.with_name("again"))
    assert (header["rows"], header["phantoms"], header["min_order"], header["max_order"]) == (2, 1, 2, 3)
    assert (header["tokenizer_sha256"], header["keys_sha256"]) == (b"t" * 32, b"k" * 32)
    assert header["file_bytes"] == index_path.stat().st_size
    assert [level["entries"] for level in header["levels"]] == [2, 1]
    assert opened(index_path).count_contents() == ([2, 1], 2)


@pytest.mark.parametrize("changes", [{"threads": 3}, {"memory_bytes": 1}, {"threads": 2, "memory_bytes": 100}])
def test_the_bytes_of_an_index_do_not_depend_on_how_it_was_built(tmp_path, changes):
    rng = np.random.default_rng(0)
    keys = np.unique(rng.integers(0, 30, (4000, 4)).astype(np.int32), axis=0)
    orders = np.full(len(keys), 4, np.uint8)
    build(tmp_path / "plain", keys, orders, 30)
    build(tmp_path / "other", keys, orders, 30, **changes)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("ids", "orders", "message"),
    [
        (KEY_IDS[:1], KEY_ORDERS, "differ in rows"),
        (KEY_IDS.reshape(-1), KEY_ORDERS, "key_ids is .N, max_order."),
        (KEY_IDS, KEY_ORDERS[None], "key_orders is .N."),
        (KEY_IDS, np.array([2, 4], np.uint8), "row 1 has order 4"),
        (KEY_IDS, np.array([0, 3], np.uint8), "row 0 has order 0"),
        (KEY_IDS, np.array([3, 3], np.uint8), "row 0 has token -1, outside the vocabulary"),
        (KEY_IDS[[1, 1]], KEY_ORDERS[[1, 1]], "row 1 repeats the key of row 0"),
        (np.full((2, 3), 9, np.int32), KEY_ORDERS, "has token 9, outside the vocabulary"),
        (np.zeros((1, 9), np.int32), np.array([2], np.uint8), "max_order from 1 to 8"),
        (np.empty((0, 3), np.int32), np.empty(0, np.uint8), "max_order from 1 to 8 and N orders"),
    ],
)
def test_keys_that_make_no_sense_are_a_value_error_and_leave_no_file(tmp_path, ids, orders, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "index", ids, orders)
    assert list(tmp_path.iterdir()) == []


def test_an_index_is_never_written_over_a_file(index_path):
    before = index_path.read_bytes()
    with pytest.raises(FileExistsError):
        build(index_path)
    assert index_path.read_bytes() == before


def test_a_build_that_its_caller_stops_leaves_no_file(tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "index", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ids", "orders"),
    [
        (KEY_IDS.astype(np.int64), KEY_ORDERS),
        (KEY_IDS, KEY_ORDERS.astype(np.int8)),
        (np.asfortranarray(KEY_IDS), KEY_ORDERS),
        (KEY_IDS.tolist(), KEY_ORDERS),
    ],
)
def test_keys_are_never_converted(tmp_path, ids, orders):
    with pytest.raises(TypeError):
        build(tmp_path / "index", ids, orders)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"pages": "big"}, "no pages big"), ({"body": "sse9"}, "no body sse9"), ({"threads": 0}, "thread")],
)
def test_settings_that_do_not_exist_are_a_value_error(index_path, setting, message):
    with pytest.raises(ValueError, match=message):
        opened(index_path, **setting)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": TOKENS.astype(np.uint32)},
        {"tokens": TOKENS.astype(np.float64)},
        {"tokens": np.ones((1, 6), np.int32)[:, ::2]},
        {"tokens": TOKENS.tolist()},
        {"rows_out": np.zeros((1, 3), np.int32)},
        {"rows_out": np.zeros((1, 6), np.int64)[:, ::2]},
        {"orders_out": np.zeros((1, 3), np.int64)},
        {"document_starts": np.zeros((1, 3), np.uint8)},
    ],
)
def test_arguments_are_never_converted(index_path, changes):
    rows, orders = outputs()
    good = {"tokens": TOKENS, "eod": EOD, "document_starts": None, "rows_out": rows, "orders_out": orders}
    with pytest.raises(TypeError):
        opened(index_path).lookup(**{**good, **changes})
    assert (rows == 7).all() and (orders == 7).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": TOKENS[0]},
        {"rows_out": np.zeros((3, 1), np.int64)},
        {"rows_out": np.zeros(3, np.int64)},
        {"orders_out": np.zeros((1, 4), np.uint8)},
        {"document_starts": np.zeros((1, 2), bool)},
    ],
)
def test_shapes_are_checked_before_memory_is_touched(index_path, changes):
    rows, orders = outputs()
    good = {"tokens": TOKENS, "eod": EOD, "document_starts": None, "rows_out": rows, "orders_out": orders}
    with pytest.raises(ValueError):
        opened(index_path).lookup(**{**good, **changes})
    assert (rows == 7).all() and (orders == 7).all()


def test_read_only_outputs_are_refused(index_path):
    rows, orders = outputs()
    rows.flags.writeable = False
    with pytest.raises(ValueError, match="rows_out is read-only"):
        opened(index_path).lookup(TOKENS, None, None, rows, orders)


@pytest.mark.parametrize("setting", [*({"body": body} for body in BODIES), {"pages": "huge"}, {"threads": 3}])
def test_every_body_and_setting_gives_the_same_answers(bank_of, setting):
    rng = np.random.default_rng(1)
    keys = sorted({tuple(rng.integers(1, 4, rng.integers(1, 9)).tolist()) for _ in range(2000)})
    bank = bank_of(keys, vocab_size=4)
    tokens = rng.integers(-1, 5, (3, 20_000)).astype(np.int32)
    expected = open_index(bank).lookup(tokens, eod=EOD)
    try:
        index = open_index(bank, **setting)
    except ConfigError as error:
        assert setting.get("body") in ("avx2", "avx512") and "lacks the instructions" in str(error), error
        pytest.skip(str(error))
    rows, orders = index.lookup(tokens, eod=EOD)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(orders, expected[1])
    assert set(np.unique(orders)) == set(range(9))


def test_a_forked_child_looks_up_with_threads_of_its_own(bank_of):
    index = open_index(bank_of([(1, 2), (2, 2)]), threads=2)
    tokens = np.random.default_rng(0).integers(0, 3, (2, 50_000))
    expected, _ = index.lookup(tokens, eod=EOD)
    check_in_fork(lambda: np.testing.assert_array_equal(index.lookup(tokens, eod=EOD)[0], expected))


def test_threads_may_look_up_and_gather_at_once(bank_of):
    rng = np.random.default_rng(0)
    keys = sorted({tuple(rng.integers(1, 12, rng.integers(2, 5)).tolist()) for _ in range(3000)})
    bank = bank_of(keys, vocab_size=12)
    index, reference = open_index(bank), open_index(bank, "reference")
    batches = [rng.integers(0, 12, (4, 2000)) for _ in range(8)]
    expected = [reference.lookup(batch, eod=EOD) for batch in batches]

    def work(number: int) -> None:
        rows, orders = np.empty((4, 2000), np.int64), np.empty((4, 2000), np.uint8)
        out = np.empty((8000, bank.row_bytes), np.uint8)
        for turn in range(10):
            choice = (number + turn) % len(batches)
            index.lookup(batches[choice], eod=EOD, rows_out=rows, orders_out=orders)
            np.testing.assert_array_equal(rows, expected[choice][0])
            np.testing.assert_array_equal(orders, expected[choice][1])
            bank.gather(rows.reshape(-1), out)
            np.testing.assert_array_equal(out[rows.reshape(-1) < 0], 0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_other_threads_run_during_a_lookup(bank_of):
    index = open_index(bank_of([(1, 2), (1, 1, 1, 1)]))
    tokens = np.random.default_rng(0).integers(1, 4, (64, 30_000)).astype(np.int32)
    rows, orders = np.empty(tokens.shape, np.int64), np.empty(tokens.shape, np.uint8)
    assert others_run_during(lambda: index.lookup(tokens, eod=EOD, rows_out=rows, orders_out=orders))
