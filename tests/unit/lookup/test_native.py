"""The extension by itself: threads, and what it refuses even when nobody checked before."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_graft.bank.extension import load_extension
from megatron_graft.lookup.index import open_index
from tests.helpers.banks import EOD

KEY_IDS = np.array([[-1, 1, 2], [3, 1, 2]], dtype=np.int32)
KEY_ORDERS = np.array([2, 3], dtype=np.uint8)
TOKENS = np.array([[3, 1, 2]], dtype=np.int32)


def table(ids: np.ndarray = KEY_IDS, orders: np.ndarray = KEY_ORDERS, vocab_size: int = 9):
    return load_extension().SuffixTable(ids, orders, vocab_size)


def outputs(shape: tuple[int, ...] = (1, 3)) -> tuple[np.ndarray, np.ndarray]:
    return np.full(shape, 7, np.int64), np.full(shape, 7, np.uint8)


def test_it_answers_directly():
    rows, orders = outputs()
    table().lookup(TOKENS, None, None, rows, orders)
    assert (rows.tolist(), orders.tolist()) == ([[-1, -1, 1]], [[0, 0, 3]])


def test_a_table_without_keys_misses_everything():
    rows, orders = outputs()
    table(np.empty((0, 3), np.int32), np.empty(0, np.uint8)).lookup(TOKENS, None, None, rows, orders)
    assert (rows == -1).all() and (orders == 0).all()


def test_a_table_keeps_its_own_copy_of_the_keys():
    ids, orders = KEY_IDS.copy(), KEY_ORDERS.copy()
    built = table(ids, orders)
    ids.fill(0)
    orders.fill(0)
    rows, found = outputs()
    built.lookup(TOKENS, None, None, rows, found)
    assert found.tolist() == [[0, 0, 3]]


@pytest.mark.parametrize(
    ("ids", "orders", "message"),
    [
        (KEY_IDS[:1], KEY_ORDERS, "differ in rows"),
        (KEY_IDS.reshape(-1), KEY_ORDERS, "key_ids is .N, max_order."),
        (KEY_IDS, KEY_ORDERS[None], "key_orders is .N."),
        (KEY_IDS, np.array([2, 4], np.uint8), "row 1 has order 4"),
        (KEY_IDS, np.array([0, 3], np.uint8), "row 0 has order 0"),
        (KEY_IDS, np.array([3, 3], np.uint8), "row 0 has a token outside the vocabulary"),
        (KEY_IDS[[1, 1]], KEY_ORDERS[[1, 1]], "row 1 repeats the key of row 0"),
        (np.full((2, 3), 9, np.int32), KEY_ORDERS, "outside the vocabulary"),
        (np.zeros((1, 256), np.int32), np.array([2], np.uint8), "do not fit"),
    ],
)
def test_keys_that_make_no_sense_are_a_value_error(ids, orders, message):
    with pytest.raises(ValueError, match=message):
        table(ids, orders)


@pytest.mark.parametrize(
    ("ids", "orders"),
    [
        (KEY_IDS.astype(np.int64), KEY_ORDERS),
        (KEY_IDS, KEY_ORDERS.astype(np.int8)),
        (np.asfortranarray(KEY_IDS), KEY_ORDERS),
        (KEY_IDS.tolist(), KEY_ORDERS),
    ],
)
def test_keys_are_never_converted(ids, orders):
    with pytest.raises(TypeError):
        table(ids, orders)


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
def test_arguments_are_never_converted(changes):
    rows, orders = outputs()
    good = {"tokens": TOKENS, "eod": EOD, "document_starts": None, "rows_out": rows, "orders_out": orders}
    with pytest.raises(TypeError):
        table().lookup(**{**good, **changes})
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
def test_shapes_are_checked_before_memory_is_touched(changes):
    rows, orders = outputs()
    good = {"tokens": TOKENS, "eod": EOD, "document_starts": None, "rows_out": rows, "orders_out": orders}
    with pytest.raises(ValueError):
        table().lookup(**{**good, **changes})
    assert (rows == 7).all() and (orders == 7).all()


def test_read_only_outputs_are_refused():
    rows, orders = outputs()
    rows.flags.writeable = False
    with pytest.raises(ValueError, match="rows_out is read-only"):
        table().lookup(TOKENS, None, None, rows, orders)
    out = np.zeros((1, 2), np.uint16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        load_extension().gather_rows([np.zeros((1, 2), np.uint16)], np.zeros(1, np.int64), out)


def test_gather_equals_take_over_several_blocks():
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 2**16, (11, width)).astype(np.uint16) for width in (5, 1, 64)]
    rows = rng.integers(-3, 11, 100)
    out = np.empty((100, 70), np.uint16)
    load_extension().gather_rows(blocks, rows, out)
    expected = np.concatenate(blocks, axis=1).take(np.maximum(rows, 0), axis=0)
    np.testing.assert_array_equal(out, np.where(rows[:, None] < 0, 0, expected))


@pytest.mark.parametrize(
    ("rows", "shape", "error"),
    [
        ([0, 3], (2, 6), IndexError),
        ([0, 2**62], (2, 6), IndexError),
        ([0, 1], (2, 5), ValueError),
        ([0, 1], (3, 6), ValueError),
        ([0, 1], (12,), ValueError),
    ],
)
def test_gather_refuses_before_it_writes(rows, shape, error):
    blocks = [np.zeros((4, 4), np.uint16), np.zeros((3, 2), np.uint16)]
    out = np.full(shape, 7, np.uint16)
    with pytest.raises(error):
        load_extension().gather_rows(blocks, np.array(rows), out)
    assert (out == 7).all()


def test_threads_may_look_up_and_gather_at_once(bank_of):
    rng = np.random.default_rng(0)
    keys = sorted({tuple(rng.integers(1, 12, rng.integers(2, 5)).tolist()) for _ in range(3000)})
    bank = bank_of(keys, vocab_size=12)
    index, reference = open_index(bank), open_index(bank, "reference")
    batches = [rng.integers(0, 12, (4, 2000)) for _ in range(8)]
    expected = [reference.lookup(batch, eod=EOD) for batch in batches]

    def work(number: int) -> None:
        rows, orders = np.empty((4, 2000), np.int64), np.empty((4, 2000), np.uint8)
        out = np.empty((8000, bank.row_dim), np.uint16)
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
    """With the GIL held, the main thread could take no sample between a lookup's start and its end."""
    index = open_index(bank_of([(1, 2), (1, 1, 1, 1)]))
    tokens = np.random.default_rng(0).integers(1, 4, (64, 30_000)).astype(np.int32)
    span: list[float] = []

    def look_up() -> None:
        rows, orders = np.empty(tokens.shape, np.int64), np.empty(tokens.shape, np.uint8)
        span.append(time.perf_counter())
        index.lookup(tokens, eod=EOD, rows_out=rows, orders_out=orders)
        span.append(time.perf_counter())

    thread = threading.Thread(target=look_up)
    samples: list[float] = []
    thread.start()
    while thread.is_alive():
        samples.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    begin, end = span
    margin = 0.2 * (end - begin)
    assert any(begin + margin < sample < end - margin for sample in samples)
