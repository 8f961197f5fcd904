"""Hashed n-grams of Engram (arXiv 2601.07372): published dialects as data, their constants, and the definition.

A layer has one table. Of every n-gram of 2 to ``max_order`` tokens that ends at a position, each head reads one row::

    mix_n = (t_0 * m_0) ^ (t_1 * m_1) ^ ... ^ (t_{n-1} * m_{n-1})        t_k: compressed id of the token k back
    row   = offset(n, j) + mix_n mod p(n, j)                             head j of order n

The multipliers m depend on the layer and on k, the primes p on layer, order and head. Arithmetic is that of int64:
products wrap around, and a remainder is never negative.

Shapes: B sequences, S positions, K heads of all orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_graft.errors import ConfigError
from megatron_graft.ngram.windows import positions_in_document

MAX_ORDER = 8
MAX_HEADS = 1024
MAX_HEAD_ROWS = 2**40  # with so many heads, row numbers stay far inside int64
_INT64_MAX = int(np.iinfo(np.int64).max)
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # leave no doubt below 2^64 (Sorenson and Webster, 2015)


MultiplierRule = Callable[[int, int, int], np.ndarray]
PrimeRule = Callable[[int, int, set[int]], list[int]]


@dataclass(frozen=True, kw_only=True)
class HashDialect:
    """What tells one published way of hashing from another.

    Attributes:
        name: as given to ``--engram-dialect``.
        layer_seed_factor: the generator of a layer is seeded with the run's seed + this * the layer's id.
        multipliers: (that seed, number of compressed ids, ``max_order``) to int64 ``[max_order]``.
        primes: (vocabulary size of an order, number of its heads, primes of all heads before) to those of its heads.
    """

    name: str
    layer_seed_factor: int
    multipliers: MultiplierRule
    primes: PrimeRule


def is_prime(number: int) -> bool:
    """Whether a number below 2^64 is prime: Miller and Rabin's test, with enough witnesses to be sure."""
    if number < 2 or any(number % prime == 0 for prime in _WITNESSES):
        return number in _WITNESSES
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    for witness in _WITNESSES:
        power = pow(witness, (number - 1) >> twos, number)
        if power == 1:
            continue
        for _ in range(twos - 1):
            if power == number - 1:
                break
            power = power * power % number
        if power != number - 1:
            return False
    return True


def odd_multipliers(seed: int, compressed_vocab_size: int, max_order: int) -> np.ndarray:
    """Odd int64 ``[max_order]`` by NumPy's default generator, so small that no product with a compressed id wraps."""
    half = max(1, _INT64_MAX // compressed_vocab_size // 2)
    return 2 * np.random.default_rng(seed).integers(0, half, size=max_order, dtype=np.int64) + 1


def next_unused_primes(vocab_size: int, heads: int, taken: set[int]) -> list[int]:
    """The least primes from ``vocab_size`` on that no head before has, whatever its order and layer."""
    found: list[int] = []
    candidate = vocab_size
    while len(found) < heads:
        if candidate not in taken and is_prime(candidate):
            found.append(candidate)
        candidate += 1
    return found


DIALECTS: dict[str, HashDialect] = {
    "deepseek": HashDialect(
        name="deepseek", layer_seed_factor=10_007, multipliers=odd_multipliers, primes=next_unused_primes
    ),
}


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Sizes and dialect of a run's hashed tables.

    Attributes:
        dialect: how n-grams are hashed.
        max_order: longest n-gram; the shortest has 2 tokens.
        heads: heads of each order.
        vocab_sizes: for each order from 2 on, the least number of rows that a head has.
        dim: elements that the heads of one order read together.
        seed: of the multipliers.
        pad_id: token id that stands where an n-gram would reach before its sequence or document; compressed like any.
        across_documents: whether n-grams reach across document starts. The published ones do.
        layer_ids: for each layer with a table, by layer number, that number (Megatron's, 1-based) and the id by which
            the dialect knows the layer.

    Raises:
        ConfigError: a value that makes no table; it names the flag.
    """

    dialect: HashDialect
    max_order: int
    heads: int
    vocab_sizes: tuple[int, ...]
    dim: int
    seed: int
    pad_id: int
    across_documents: bool
    layer_ids: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        orders, sizes = self.max_order - 1, self.vocab_sizes
        _require("--engram-max-order", self.max_order, 2 <= self.max_order <= MAX_ORDER, f"2 to {MAX_ORDER}")
        _require("--engram-heads", self.heads, 1 <= self.heads <= MAX_HEADS, f"1 to {MAX_HEADS}")
        _require("--engram-vocab-size", list(sizes), len(sizes) == orders, f"{orders} numbers, one for each order")
        in_range = all(2 <= size <= MAX_HEAD_ROWS for size in sizes)
        _require("--engram-vocab-size", list(sizes), in_range, f"numbers from 2 to {MAX_HEAD_ROWS}")
        divisible = self.dim >= 1 and self.dim % self.heads == 0
        _require("--engram-dim", self.dim, divisible, f"a positive multiple of the {self.heads} heads")
        _require("--engram-seed", self.seed, self.seed >= 0, "0 or more")
        _require("--engram-pad-id", self.pad_id, self.pad_id >= 0, "a token id")
        layers = [number for number, _ in self.layer_ids]
        _require("--engram-layers", layers, layers == sorted(set(layers)), "ascending layer numbers, none twice")
        ids = [layer_id for _, layer_id in self.layer_ids]
        _require("--engram-layer-ids", ids, min(ids, default=0) >= 0, "numbers of 0 or more")

    @property
    def num_heads(self) -> int:
        """K, rows read at each position."""
        return self.heads * (self.max_order - 1)

    @property
    def head_dim(self) -> int:
        """Elements of a row."""
        return self.dim // self.heads


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerHash:
    """The constants of one layer; the arrays are read-only.

    Attributes:
        layer_number: Megatron's global, 1-based number of the layer.
        multipliers: odd int64 ``[max_order]``, by distance back.
        primes: int64 ``[K]``, the rows of each head, by order and then head.
        offsets: int64 ``[K]``, the table row at which each head begins.
    """

    layer_number: int
    multipliers: np.ndarray
    primes: np.ndarray
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the layer's table, all heads together."""
        return int(self.primes.sum())


def layer_hashes(config: EngramConfig, compressed_vocab_size: int) -> dict[int, LayerHash]:
    """The constants of every layer, by layer number.

    Args:
        config: sizes and dialect. Which layers it has matters to each of them: no prime is used twice.
        compressed_vocab_size: V', number of compressed ids, at least 1; it bounds the multipliers.
    """
    dialect = config.dialect
    hashes: dict[int, LayerHash] = {}
    taken: set[int] = set()
    for layer_number, layer_id in config.layer_ids:
        seed = config.seed + dialect.layer_seed_factor * layer_id
        found: list[int] = []
        for vocab_size in config.vocab_sizes:
            of_order = dialect.primes(vocab_size, config.heads, taken)
            found += of_order
            taken.update(of_order)
        primes = np.array(found, dtype=np.int64)
        hashes[layer_number] = LayerHash(
            layer_number=layer_number,
            multipliers=_read_only(dialect.multipliers(seed, compressed_vocab_size, config.max_order)),
            primes=_read_only(primes),
            offsets=_read_only(np.cumsum(primes) - primes),
        )
    return hashes


def hash_rows_reference(
    tokens_BS: np.ndarray, compressed_ids: np.ndarray, layer: LayerHash, config: EngramConfig, eod: int | None
) -> np.ndarray:
    """The definition: the table rows that every position reads.

    Args:
        tokens_BS: int32 or int64 ``[B, S]`` token ids. A negative one is mixed as it is, without a compressed id.
        compressed_ids: int32 or int64 ``[V]``, the compressed id of every token id.
        layer: constants of the layer.
        config: what they were made from.
        eod: id of the end-of-document token, or None if sequences hold one document each. It is the last token of its
            document and hashed like any other.

    Returns:
        int64 ``[B, S, K]``.

    Raises:
        IndexError: a token id, or the pad id, is V or more.
    """
    sequences, length = tokens_BS.shape
    ids_BS = np.where(tokens_BS < 0, tokens_BS, compressed_ids[np.maximum(tokens_BS, 0)]).astype(np.int64)
    pad = np.int64(compressed_ids[config.pad_id])
    position_BS = positions_in_document(tokens_BS, None if config.across_documents else eod)
    rows_BSK = np.empty((sequences, length, config.num_heads), dtype=np.int64)
    mix_BS = ids_BS * layer.multipliers[0]
    for back in range(1, config.max_order):
        older_BS = np.full_like(ids_BS, pad)
        older_BS[:, back:] = ids_BS[:, : max(length - back, 0)]
        older_BS[position_BS < back] = pad
        mix_BS ^= older_BS * layer.multipliers[back]
        order = slice((back - 1) * config.heads, back * config.heads)
        rows_BSK[:, :, order] = layer.offsets[order] + mix_BS[:, :, None] % layer.primes[order]
    return rows_BSK


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _require(flag: str, got: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(flag, "makes no hashed table", got=got, expected=expected)
