"""Hashed n-grams by the definition: by hand, against an independent oracle, and against published integers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from megatron_graft.errors import ConfigError
from megatron_graft.ngram.hashing import LayerHash, hash_rows_reference, is_prime, layer_hashes
from tests.helpers import engram_oracle
from tests.helpers.engram_cases import engram_config, random_case

EOD = 1
IDS = np.array([0, 1, 1, 2, 3], dtype=np.int32)
BY_HAND = LayerHash(
    layer_number=2,
    multipliers=np.array([3, 5, 7]),
    primes=np.array([11, 13, 17, 19]),
    offsets=np.array([0, 11, 24, 41]),
)


def rows_of(tokens: list[int], layer: LayerHash = BY_HAND, eod: int | None = EOD, **changes: Any) -> list[list[int]]:
    config = engram_config(**{"pad_id": 3, **changes})
    return hash_rows_reference(np.array([tokens]), IDS, layer, config, eod)[0].tolist()


def test_rows_worked_out_by_hand() -> None:
    # Tokens 3 4 2 are the compressed ids 2 3 1, and the pad, token 3, is 2. Multipliers 3, 5, 7 from the newest back.
    # Order 2:                       mod 11, 13    order 3:            mod 17, 19
    # 2*3 ^ 2*5 =  6 ^ 10 = 12       1, 12         12 ^ 2*7 =  2       2, 2
    # 3*3 ^ 2*5 =  9 ^ 10 =  3       3, 3           3 ^ 2*7 = 13       13, 13
    # 1*3 ^ 3*5 =  3 ^ 15 = 12       1, 12         12 ^ 2*7 =  2       2, 2
    # To each its head's first row: 0, 11, 11 + 13 = 24, 24 + 17 = 41.
    assert rows_of([3, 4, 2]) == [[1, 23, 26, 43], [3, 14, 37, 54], [1, 23, 26, 43]]


def test_a_negative_id_is_mixed_as_it_is_and_its_remainder_is_not_negative() -> None:
    # -1*3 ^ 2*5 = -3 ^ 10 = ...11101 ^ 01010 = ...10111 = -9, mod 11 = 2, mod 13 = 4.
    # -9 ^ 2*7 = ...10111 ^ 01110 = ...11001 = -7, mod 17 = 10, mod 19 = 12.
    assert rows_of([-1]) == [[2, 11 + 4, 24 + 10, 41 + 12]]


def test_products_wrap_around_at_64_bits() -> None:
    # 2^62 * 4 = 2^64 is 0 and 2^62 * 2 = 2^63 is -2^63; with pads of 0 the mixes are just that.
    layer = LayerHash(layer_number=2, multipliers=np.array([2**62, 1]), primes=np.array([7]), offsets=np.array([0]))
    config = engram_config(max_order=2, heads=1, vocab_sizes=(7,), pad_id=0)
    ids = np.array([0, 4, 2])
    rows = hash_rows_reference(np.array([[1], [2]]), ids, layer, config, None)
    assert rows.ravel().tolist() == [0, -(2**63) % 7]


def test_an_eod_is_hashed_with_its_document_and_starts_the_next_without_it() -> None:
    tokens = [4, 3, EOD, 2, 4, EOD, EOD, 0]
    parted = rows_of(tokens, across_documents=False)
    documents = [rows_of(document) for document in ([4, 3, EOD], [2, 4, EOD], [EOD], [0])]
    assert parted == [row for document in documents for row in document]
    assert rows_of(tokens, across_documents=True) == rows_of(tokens, across_documents=True, eod=None) != parted
    assert rows_of(tokens, across_documents=False, eod=None) == rows_of(tokens, across_documents=True)


def test_primes_are_the_next_that_no_head_of_any_layer_has() -> None:
    hashes = layer_hashes(engram_config(heads=2, vocab_sizes=(10, 12)), 100)
    # From 10: 11, 13. From 12, 13 being taken: 17, 19. For the other layer, all these being taken: 23, 29; 31, 37.
    assert hashes[2].primes.tolist() == [11, 13, 17, 19]
    assert hashes[16].primes.tolist() == [23, 29, 31, 37]
    assert hashes[2].offsets.tolist() == [0, 11, 24, 41]
    assert hashes[16].offsets.tolist() == [0, 23, 52, 83]
    assert [hashes[layer].num_rows for layer in (2, 16)] == [60, 120]


def test_a_vocabulary_size_that_is_prime_is_its_own_first_prime() -> None:
    assert layer_hashes(engram_config(max_order=2, heads=3, vocab_sizes=(2,), dim=3), 9)[2].primes.tolist() == [2, 3, 5]


def test_is_prime_on_small_numbers_and_on_those_that_fool_few_witnesses() -> None:
    sieve = np.ones(50_000, dtype=bool)
    sieve[:2] = False
    for number in range(2, 224):
        sieve[number * number :: number] = False
    assert [number for number in range(50_000) if is_prime(number)] == np.flatnonzero(sieve).tolist()
    # Strong pseudoprimes to all primes up to 7, 13, 19 and 31 (Jaeschke 1993; Jiang and Deng 2014); squares of primes.
    for composite in (3_215_031_751, 3_474_749_660_383, 341_550_071_728_321, 3_825_123_056_546_413_051, 65_537**2):
        assert not is_prime(composite)
    # The largest primes below 2^61, 2^63 and 2^64, and their neighbours.
    for prime in (2**61 - 1, 2**63 - 25, 2**64 - 59):
        assert is_prime(prime) and not is_prime(prime - 2) and not is_prime(prime + 2)


@pytest.mark.parametrize("seed", range(8))
def test_constants_agree_with_the_oracle(seed: int) -> None:
    case = random_case(seed, max_order=2 + seed % 3, across_documents=True)
    assert list(case.hashes) == [number for number, _ in case.config.layer_ids]
    for layer_number, layer_id in case.config.layer_ids:
        layer = case.hashes[layer_number]
        primes = np.concatenate(case.primes(layer_number))
        assert layer.layer_number == layer_number
        assert layer.multipliers.tolist() == case.multipliers(layer_id)
        np.testing.assert_array_equal(layer.primes, primes)
        np.testing.assert_array_equal(layer.offsets, [primes[:head].sum() for head in range(len(primes))])
        assert layer.num_rows == primes.sum()
        assert {array.dtype for array in (layer.multipliers, layer.primes, layer.offsets)} == {np.dtype(np.int64)}


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("eod", [EOD, None])
@pytest.mark.parametrize("across_documents", [True, False])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_rows_agree_with_the_oracle(max_order: int, across_documents: bool, eod: int | None, dtype: type) -> None:
    for seed in range(5):
        case = random_case(seed, max_order=max_order, across_documents=across_documents, eod=eod)
        for layer_number, layer in case.hashes.items():
            tokens_BS = case.tokens_BS.astype(dtype)
            rows = hash_rows_reference(tokens_BS, case.compressed_ids, layer, case.config, eod)
            assert rows.dtype == np.int64
            np.testing.assert_array_equal(rows, case.expected(layer_number))


def test_layers_differ_in_every_constant_and_follow_the_seed() -> None:
    hashes = layer_hashes(engram_config(), 1000)
    assert not set(hashes[2].multipliers.tolist()) & set(hashes[16].multipliers.tolist())
    other = layer_hashes(engram_config(seed=1), 1000)
    assert not set(hashes[2].multipliers.tolist()) & set(other[2].multipliers.tolist())
    np.testing.assert_array_equal(hashes[2].primes, other[2].primes)


@pytest.mark.parametrize("compressed_size", [1, 2, 1000, 99_092, 2**31])
def test_multipliers_are_odd_and_no_product_with_a_compressed_id_wraps(compressed_size: int) -> None:
    layer = layer_hashes(engram_config(max_order=8, vocab_sizes=(10,) * 7), compressed_size)[2]
    for multiplier in layer.multipliers.tolist():
        assert multiplier % 2 == 1
        assert 0 < multiplier * (compressed_size - 1) < 2**63 or compressed_size == 1
    assert max(layer.multipliers.tolist()) > 2**62 // compressed_size  # nor are they smaller than they may be


def test_published_constants_and_rows() -> None:
    """Integers that the published code gives.

    Made by running the classes of engram_demo_v1.py (deepseek-ai/Engram at fb7f84a) with its default configuration, but
    with a tokenizer of 1000 ids that are compressed to themselves. The primes do not depend on the tokenizer: they are
    those of the demo as it is.
    """
    config = engram_config(heads=8, vocab_sizes=(646_400, 646_400), dim=512, pad_id=2, layer_ids=((2, 1), (16, 15)))
    hashes = layer_hashes(config, 1000)
    assert hashes[2].multipliers.tolist() == [7593627661414631, 479593001838623, 3563315849468963]
    assert hashes[16].multipliers.tolist() == [2865651367968763, 5551170510236881, 5343936160617101]
    assert hashes[2].primes.tolist() == [
        646403, 646411, 646421, 646423, 646433, 646453, 646519, 646523,
        646537, 646543, 646549, 646571, 646573, 646577, 646609, 646619,
    ]  # fmt: skip
    assert hashes[16].primes.tolist() == [
        646631, 646637, 646643, 646669, 646687, 646721, 646757, 646771,
        646781, 646823, 646831, 646837, 646843, 646859, 646873, 646879,
    ]  # fmt: skip
    tokens_BS, ids = np.array([[7, 999, 0, -1, 42]]), np.arange(1000)
    rows_SK = {
        number: hash_rows_reference(tokens_BS, ids, layer, config, EOD)[0] - layer.offsets
        for number, layer in hashes.items()
    }
    assert rows_SK[2][0].tolist() == [
        484916, 547720, 598559, 604942, 617405, 541231, 258902, 380118,
        462955, 412820, 48272, 40945, 613854, 576862, 396694, 2050,
    ]  # fmt: skip
    assert rows_SK[2][3].tolist() == [
        484444, 186176, 420637, 548518, 300089, 536005, 582271, 23416,
        556684, 346631, 177260, 324317, 248596, 355371, 603406, 209581,
    ]  # fmt: skip
    assert rows_SK[16][:, :3].tolist() == [
        [402061, 82562, 546273], [549232, 327124, 91848], [191054, 137794, 556146], [632776, 257113, 34641],
        [39366, 321865, 611483],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("vocab_size", "dim", "layers", "millions"),
    [
        (646_400, 512, ((2, 1), (16, 15)), 1324),
        # Engram-27B: 2,262,400 slots, read as 1,131,200 rows a head for each of two orders; "5.7B parameters".
        (1_131_200, 1280, ((2, 1), (15, 14)), 5793),
    ],
    ids=["demo", "engram-27b"],
)
def test_the_published_sizes_take_no_time_and_share_no_prime(
    vocab_size: int, dim: int, layers: tuple[tuple[int, int], ...], millions: int
) -> None:
    config = engram_config(heads=8, vocab_sizes=(vocab_size,) * 2, dim=dim, layer_ids=layers)
    start = time.perf_counter()
    hashes = layer_hashes(config, 99_092)
    assert time.perf_counter() - start < 1
    primes = np.concatenate([layer.primes for layer in hashes.values()]).tolist()
    assert len(set(primes)) == len(primes) == 32
    assert vocab_size <= min(primes) and max(primes) < vocab_size + 1000
    rows = sum(layer.num_rows for layer in hashes.values())
    assert (config.num_heads, config.head_dim) == (16, dim // 8)
    assert round(rows * config.head_dim / 1e6) == millions
    by_oracle = engram_oracle.primes(len(layers), [vocab_size] * 2, 8)
    assert primes == [prime for layer in by_oracle for order in layer for prime in order]


@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_a_token_changes_its_own_position_and_the_next_ones_within_an_ngram_only(max_order: int) -> None:
    case = random_case(3, max_order=max_order, across_documents=False)
    layer = case.hashes[4]
    before = hash_rows_reference(case.tokens_BS, case.compressed_ids, layer, case.config, case.eod)
    for position in range(case.tokens_BS.shape[1]):
        tokens_BS = case.tokens_BS.copy()
        tokens_BS[1, position] = -77
        after = hash_rows_reference(tokens_BS, case.compressed_ids, layer, case.config, case.eod)
        changed = np.argwhere((before != after).any(axis=-1))
        assert (1, position) in set(map(tuple, changed.tolist()))
        assert set(changed[:, 0]) == {1}
        # A document that no longer ends there reaches further, but no further than an n-gram does.
        assert changed[:, 1].min() == position and changed[:, 1].max() < position + max_order


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 1), (1, 2)])
def test_sequences_shorter_than_an_ngram(shape: tuple[int, int]) -> None:
    case = random_case(0, max_order=4, across_documents=True, length=8)
    case.tokens_BS = case.tokens_BS[: shape[0], : shape[1]]
    rows = hash_rows_reference(case.tokens_BS, case.compressed_ids, case.hashes[1], case.config, case.eod)
    np.testing.assert_array_equal(rows, case.expected(1))


def test_an_id_without_a_compressed_one_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        rows_of([1, len(IDS)])
    with pytest.raises(IndexError):
        rows_of([1], pad_id=len(IDS))


def test_constants_cannot_be_changed() -> None:
    layer = layer_hashes(engram_config(), 100)[2]
    for array in (layer.multipliers, layer.primes, layer.offsets):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_order": 1, "vocab_sizes": ()}, "--engram-max-order: .*got 1; expected 2 to 8"),
        ({"max_order": 9, "vocab_sizes": (10,) * 8}, "--engram-max-order: .*got 9"),
        ({"heads": 0}, "--engram-heads: .*got 0"),
        ({"heads": 2000, "dim": 2000}, "--engram-heads: .*got 2000"),
        ({"vocab_sizes": (10,)}, r"--engram-vocab-size: .*got \[10\]; expected 2 numbers"),
        ({"vocab_sizes": (10, 10, 10)}, "--engram-vocab-size: .*expected 2 numbers"),
        ({"vocab_sizes": (10, 1)}, "--engram-vocab-size: .*numbers from 2"),
        ({"vocab_sizes": (10, 2**40 + 1)}, "--engram-vocab-size: .*numbers from 2"),
        ({"dim": 9}, "--engram-dim: .*got 9; expected a positive multiple of the 2 heads"),
        ({"dim": 0}, "--engram-dim: .*got 0"),
        ({"seed": -1}, "--engram-seed: .*got -1"),
        ({"pad_id": -1}, "--engram-pad-id: .*got -1"),
        ({"layer_ids": ((3, 1), (2, 2))}, r"--engram-layers: .*got \[3, 2\]"),
        ({"layer_ids": ((2, 1), (2, 2))}, "--engram-layers"),
        ({"layer_ids": ((2, -1),)}, r"--engram-layer-ids: .*got \[-1\]"),
    ],
)
def test_a_value_that_makes_no_table_is_refused_by_its_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        engram_config(**changes)
