"""Hashing of whole batches: native, reference and the oracle agree, and both refuse the same input."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.arrays import ArrayError
from megatron_graft.bank.extension import load_extension
from megatron_graft.errors import ConfigError, GraftError
from megatron_graft.lookup.hashing import NgramHasher, open_hasher
from megatron_graft.ngram.hashing import layer_hashes
from tests.helpers.engram_cases import Case, engram_config, random_case
from tests.helpers.forked import check_in_fork
from tests.helpers.threads import others_run_during

EOD = 1
IDS = np.array([0, 1, 1, 2, 3], dtype=np.int32)
TOKENS = np.array([[3, 4, 2], [0, 1, 3]], dtype=np.int32)


def hasher_of(case: Case, layer_number: int, implementation: str, threads: int = 1) -> NgramHasher:
    return open_hasher(
        case.config,
        case.hashes[layer_number],
        case.compressed_ids,
        eod=case.eod,
        implementation=implementation,
        threads=threads,
    )


def small_hasher(implementation: str = "native", ids: np.ndarray = IDS, **settings: Any) -> NgramHasher:
    config = engram_config()
    return open_hasher(config, layer_hashes(config, 4)[2], ids, eod=EOD, implementation=implementation, **settings)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("eod", [EOD, None])
@pytest.mark.parametrize("across_documents", [True, False])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_both_agree_with_the_oracle(max_order: int, across_documents: bool, eod: int | None, dtype: type) -> None:
    for seed in range(10, 14):
        case = random_case(seed, max_order=max_order, across_documents=across_documents, eod=eod)
        tokens_BS = case.tokens_BS.astype(dtype)
        for layer_number, layer in case.hashes.items():
            expected = case.expected(layer_number)
            for implementation, threads in (("native", 1), ("native", 3), ("reference", 1), ("auto", 1)):
                hasher = hasher_of(case, layer_number, implementation, threads)
                assert (hasher.num_heads, hasher.num_rows) == (case.config.num_heads, layer.num_rows)
                rows = hasher.rows(tokens_BS)
                assert rows.dtype == np.int64
                assert rows.min() >= 0 and rows.max() < hasher.num_rows
                np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("across_documents", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ranges_of_threads_that_begin_inside_a_document(threads: int, across_documents: bool) -> None:
    case = random_case(1, max_order=4, across_documents=across_documents, length=7001)
    native, reference = hasher_of(case, 4, "native", threads), hasher_of(case, 4, "reference")
    expected = reference.rows(case.tokens_BS)
    for dtype in (np.int32, np.int64):
        np.testing.assert_array_equal(native.rows(case.tokens_BS.astype(dtype)), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_most_extreme_ids_and_multipliers(dtype: type) -> None:
    case = random_case(2, max_order=4, across_documents=True)
    extremes = np.iinfo(dtype)
    case.tokens_BS = np.array([[extremes.min, -1, extremes.min + 1, 0, extremes.min]], dtype=dtype)
    for layer_number in case.hashes:
        expected = case.expected(layer_number)
        for implementation in ("native", "reference"):
            rows = hasher_of(case, layer_number, implementation).rows(case.tokens_BS)
            np.testing.assert_array_equal(rows, expected)


def test_no_position_depends_on_a_later_one(implementation: str) -> None:
    case = random_case(5, max_order=4, across_documents=False)
    hasher = hasher_of(case, 9, implementation)
    whole = hasher.rows(case.tokens_BS)
    for end in range(case.tokens_BS.shape[1]):
        beginning = hasher.rows(np.ascontiguousarray(case.tokens_BS[:, :end]))
        np.testing.assert_array_equal(beginning, whole[:, :end])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 1), (1, 2)])
def test_sequences_shorter_than_an_ngram(shape: tuple[int, int], implementation: str) -> None:
    case = random_case(0, max_order=4, across_documents=True, length=8)
    case.tokens_BS = np.ascontiguousarray(case.tokens_BS[: shape[0], : shape[1]])
    np.testing.assert_array_equal(hasher_of(case, 1, implementation).rows(case.tokens_BS), case.expected(1))


@pytest.mark.parametrize("ids", [IDS, IDS.astype(np.int64)], ids=["int32", "int64"])
def test_a_compression_map_may_be_read_only_and_is_not_looked_at_again(ids: np.ndarray) -> None:
    given = ids.copy()
    given.flags.writeable = False
    hasher = small_hasher(ids=given)
    expected = small_hasher("reference", ids=IDS).rows(TOKENS)
    given.flags.writeable = True
    given[:] = 0
    np.testing.assert_array_equal(hasher.rows(TOKENS), expected)


def test_a_call_into_given_memory_returns_that_and_allocates_nothing() -> None:
    tokens_BS = np.zeros((8, 512), dtype=np.int64)
    hasher = small_hasher(threads=2)
    out = np.full((8, 512, 4), -7, dtype=np.int64)
    expected = hasher.rows(tokens_BS)
    tracemalloc.start()
    try:
        assert hasher.rows(tokens_BS, rows_out=out) is out
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(out, expected)
    assert peak < 4096  # the tokens alone are 32 KiB


def test_given_memory_is_written_by_both(implementation: str) -> None:
    out = np.full((2, 3, 4), -7, dtype=np.int64)
    assert small_hasher(implementation).rows(TOKENS, rows_out=out) is out
    assert out.min() >= 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_id_without_a_compressed_one_is_named_with_its_place(dtype: type, threads: int, implementation: str) -> None:
    tokens_BS = np.zeros((3, 2000), dtype=dtype)
    tokens_BS[1, 1300], tokens_BS[2, 7] = len(IDS), np.iinfo(dtype).max
    message = rf"tokens_BS\[1, 1300\]: is outside .* \(got {len(IDS)}; expected less than {len(IDS)}\)"
    with pytest.raises(ArrayError, match=message):
        small_hasher(implementation, threads=threads).rows(tokens_BS)


@pytest.mark.parametrize(
    ("tokens_BS", "rows_out", "message"),
    [
        (TOKENS.astype(np.uint32), None, "tokens_BS: has the wrong dtype"),
        (TOKENS[0], None, "tokens_BS: has the wrong shape"),
        (np.asfortranarray(TOKENS), None, "tokens_BS: is not C-contiguous"),
        (TOKENS.tolist(), None, "tokens_BS: is not a NumPy array"),
        (TOKENS, np.zeros((2, 3, 4), np.int32), "rows_out: has the wrong dtype"),
        (TOKENS, np.zeros((2, 3, 5), np.int64), "rows_out: has the wrong shape"),
        (TOKENS, np.zeros((3, 2, 4), np.int64), "rows_out: has the wrong shape"),
        (TOKENS, np.zeros((2, 3, 8), np.int64)[:, :, ::2], "rows_out: is not C-contiguous"),
    ],
)
def test_a_wrong_array_is_refused(tokens_BS: Any, rows_out: np.ndarray | None, message: str, implementation: str):
    with pytest.raises(ArrayError, match=message):
        small_hasher(implementation).rows(tokens_BS, rows_out=rows_out)
    assert rows_out is None or not rows_out.any()


def test_an_output_may_be_neither_read_only_nor_the_input(implementation: str) -> None:
    out = np.zeros((2, 3, 4), np.int64)
    with pytest.raises(ArrayError, match="rows_out: shares memory with tokens_BS"):
        small_hasher(implementation).rows(out.reshape(-1)[:6].reshape(2, 3), rows_out=out)
    out.flags.writeable = False
    with pytest.raises(ArrayError, match="rows_out: is read-only"):
        small_hasher(implementation).rows(TOKENS, rows_out=out)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": IDS[:2]}, ConfigError, r"--engram-pad-id: .*got 2; expected 0 to 1"),
        ({"ids": IDS[:0]}, ConfigError, "--engram-pad-id"),
        ({"ids": IDS.astype(np.uint16)}, ArrayError, "compressed_ids: has the wrong dtype"),
        ({"ids": IDS[None]}, ArrayError, "compressed_ids: has the wrong shape"),
        ({"ids": np.repeat(IDS, 2)[::2]}, ArrayError, "compressed_ids: is not C-contiguous"),
        ({"ids": IDS - 1}, ArrayError, "compressed_ids: .*got -1; expected 0 to 4"),
        ({"ids": IDS + 2}, ArrayError, "compressed_ids: .*got 5"),
        ({"ids": IDS.astype(np.int64) + 2**32}, ArrayError, "compressed_ids: .*got 4294967299"),
        ({"implementation": "fast"}, ConfigError, "hashing implementation: is unknown .*got fast"),
        ({"threads": 0}, ConfigError, "threads: is out of range"),
        ({"threads": 2000}, ConfigError, "threads: is out of range"),
    ],
)
def test_a_hasher_that_makes_no_sense_is_refused(changes: dict[str, Any], error: type[GraftError], message: str):
    with pytest.raises(error, match=message):
        small_hasher(**changes)


def extension_hasher(**changes: Any) -> Any:
    constants = {
        "compressed_ids": IDS,
        "multipliers": np.array([3, 5, 7]),
        "primes": np.array([11, 13, 17, 19]),
        "offsets": np.array([0, 11, 24, 41]),
        "pad": 2,
        "eod": None,
        "threads": 1,
    }
    return load_extension().NgramHasher(**{**constants, **changes})


def test_the_extension_answers_directly() -> None:
    rows = np.zeros((1, 3, 4), np.int64)
    hasher = extension_hasher()
    hasher.rows(np.array([[3, 4, 2]]), rows)
    # The arithmetic of these rows is in the test of the definition.
    assert rows[0].tolist() == [[1, 23, 26, 43], [3, 14, 37, 54], [1, 23, 26, 43]]
    assert hasher.num_heads == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"compressed_ids": IDS.astype(np.int64)}, TypeError),
        ({"compressed_ids": IDS[None]}, ValueError),
        ({"multipliers": np.array([3, 5, 7], np.int32)}, TypeError),
        ({"multipliers": np.array([3])}, ValueError),
        ({"primes": np.array([11, 13, 17])}, ValueError),
        ({"primes": np.array([11, 13, 17, 0])}, ValueError),
        ({"primes": np.array([[11, 13], [17, 19]])}, ValueError),
        ({"offsets": np.array([0, 11])}, ValueError),
        ({"threads": 0}, ValueError),
    ],
)
def test_the_extension_refuses_constants_that_nobody_checked(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        extension_hasher(**changes)


@pytest.mark.parametrize(
    ("tokens", "rows", "error"),
    [
        (TOKENS.astype(np.float64), np.zeros((2, 3, 4), np.int64), TypeError),
        (TOKENS, np.zeros((2, 3, 4), np.int32), TypeError),
        (TOKENS, np.zeros((2, 3, 8), np.int64)[:, :, ::2], TypeError),
        (TOKENS[0], np.zeros((2, 3, 4), np.int64), ValueError),
        (TOKENS, np.zeros((2, 12), np.int64), ValueError),
        (TOKENS, np.zeros((3, 2, 4), np.int64), ValueError),
        (TOKENS, np.zeros((2, 3, 3), np.int64), ValueError),
        (TOKENS + 3, np.zeros((2, 3, 4), np.int64), IndexError),
    ],
)
def test_the_extension_refuses_arrays_that_nobody_checked(tokens: Any, rows: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        extension_hasher().rows(tokens, rows)


def test_a_forked_child_hashes_with_threads_of_its_own() -> None:
    case = random_case(3, max_order=3, across_documents=False, length=20_000)
    hasher = hasher_of(case, 4, "native", threads=2)
    expected = hasher.rows(case.tokens_BS)
    check_in_fork(lambda: np.testing.assert_array_equal(hasher.rows(case.tokens_BS), expected))


def test_threads_may_hash_at_once() -> None:
    case = random_case(4, max_order=3, across_documents=False, length=3000)
    hasher = hasher_of(case, 4, "native", threads=2)
    batches = [np.roll(case.tokens_BS, shift, axis=1) for shift in range(4)]
    expected = [hasher_of(case, 4, "reference").rows(batch) for batch in batches]

    def work(number: int) -> None:
        out = np.empty_like(expected[0])
        for turn in range(20):
            choice = (number + turn) % len(batches)
            np.testing.assert_array_equal(hasher.rows(batches[choice], rows_out=out), expected[choice])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_other_threads_run_while_one_hashes() -> None:
    hasher = small_hasher()
    tokens_BS = np.zeros((64, 60_000), dtype=np.int32)
    out = np.empty((*tokens_BS.shape, 4), np.int64)
    assert others_run_during(lambda: hasher.rows(tokens_BS, rows_out=out))
