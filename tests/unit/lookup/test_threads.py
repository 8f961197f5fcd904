"""Threads that the system does not start: wherever a pool is made, one error says what was wanted and the way out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.index_file import KeyFinder
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.errors import ConfigError
from megatron_graft.lookup.hashing import open_hasher
from megatron_graft.lookup.index import open_index
from megatron_graft.ngram.hashing import layer_hashes
from tests.helpers.banks import EOD, bank_arguments
from tests.helpers.engram_cases import engram_config
from tests.helpers.forked import check_in_fork

THREADS = 3
KEYS = {(1, 2): 2, (2, 2): 1}


def hasher(threads: int) -> Any:
    config, ids = engram_config(), np.arange(5, dtype=np.int32)
    return open_hasher(config, layer_hashes(config, 5)[2], ids, eod=EOD, threads=threads)


CALLS: dict[str, Callable[[Bank, Path], object]] = {
    "a build": lambda _, path: write_bank(path, **bank_arguments(KEYS), threads=THREADS),  # type: ignore[arg-type]
    "a check of keys": lambda bank, _: KeyFinder(bank.index_path, len(KEYS), threads=THREADS),
    "a lookup": lambda bank, _: open_index(bank, threads=THREADS),
    "hashing": lambda *_: hasher(THREADS),
    "a gather": lambda bank, _: open_bank(bank.path, threads=THREADS).float_rows(np.array([0, 1])),
}


def expect_refusal(call: Callable[[], object], threads: int) -> None:
    """Call, in a forked child, where every new thread wants a stack larger than what a process can address."""

    def check() -> None:
        libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        assert libc.pthread_getattr_default_np(attributes) == 0
        assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 60)) == 0
        assert libc.pthread_setattr_default_np(attributes) == 0
        message = rf"^threads: cannot be started: .* \(got {threads}\)\. Ask for fewer threads"
        with pytest.raises(ConfigError, match=message):
            call()

    check_in_fork(check)


@pytest.mark.parametrize("what", CALLS)
def test_threads_that_cannot_be_started_are_an_error_that_says_so(bank_of: Any, tmp_path: Path, what: str) -> None:
    bank = bank_of(KEYS)
    expect_refusal(lambda: CALLS[what](bank, tmp_path / "new"), THREADS)
    assert not (tmp_path / "new").exists()


def test_so_is_the_first_lookup_of_a_forked_child(bank_of: Any) -> None:
    index = open_index(bank_of(KEYS), threads=2)
    expect_refusal(lambda: index.lookup(np.array([[1, 2]]), eod=EOD), 2)
