"""Another bank in place of a run's: it is opened as the run's bank is, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_graft.bank.reader import open_bank
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.training.memory_setup import RunMemory, open_run_memory
from megatron_graft.training.other_banks import other_memories
from tests.helpers.banks import fitting_bank, make_bank
from tests.helpers.memories import contents, layout_of
from tests.helpers.tokenizers import small_sentencepiece
from tests.unit.training.test_memory_setup import COUNTS, TABLES, run_settings

TOKENS = torch.tensor([[8, 7, 5, 6, 6, 2, 5, 6]])


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def bank_path(tmp_path: Path, tokenizer_file: Path) -> Path:
    return fitting_bank(tmp_path / "bank", tokenizer_file, COUNTS)


@pytest.fixture
def other_path(tmp_path: Path, tokenizer_file: Path) -> Path:
    """The same keys with other rows."""
    return fitting_bank(tmp_path / "other", tokenizer_file, COUNTS, seed=50)


def with_other(
    bank: Path, others: dict[str, Path], tokenizer_file: Path, *flags: Any
) -> tuple[RunMemory, dict[str, RunMemory]]:
    args, settings = run_settings(tokenizer_file, "--graft-bank", bank, "--graft-layers", 2, *flags)
    memory = open_run_memory(settings, args)
    assert memory is not None
    return memory, other_memories(others, memory, settings)


def fetched(memory: RunMemory) -> Any:
    return contents(memory.fetcher(layout_of(memory)).fetch(TOKENS, 0).memory)


def rows_read(memory: RunMemory) -> np.ndarray:
    """float32 ``[S, D]``, what the run's model reads of a bank at every position; zeros at a miss."""
    (bank,), (index,) = memory.banks, memory.indexes
    rows_BS, _ = index.lookup(TOKENS.numpy(), eod=memory.tokenizer.eod)
    return bank.float_rows(rows_BS[0])


@pytest.mark.parametrize("flags", [[], TABLES])
def test_the_other_banks_rows_are_fetched_and_nothing_else_changes(
    bank_path: Path, other_path: Path, tokenizer_file: Path, flags: list[Any]
) -> None:
    banks = {"same": bank_path, "other": other_path}
    memory, others = with_other(bank_path, banks, tokenizer_file, *flags)
    assert list(others) == ["same", "other"]
    same, other = others.values()
    assert fetched(same) == fetched(memory) != fetched(other)
    assert other.banks[0].path == other_path and other.banks[0].digest == open_bank(other_path).digest
    assert (other.sites, other.engram, other.tokenizer) == (memory.sites, memory.engram, memory.tokenizer)
    assert layout_of(other) == layout_of(memory)


def test_it_may_have_other_keys(bank_path: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    keys = fitting_bank(tmp_path / "keys", tokenizer_file, {(6, 6): 2})
    _, others = with_other(bank_path, {"keys": keys}, tokenizer_file)
    assert np.flatnonzero(np.abs(rows_read(others["keys"])).sum(axis=1)).tolist() == [4]


def test_the_runs_bank_rows_and_node_copy_apply_to_it(
    bank_path: Path, other_path: Path, tmp_path: Path, tokenizer_file: Path
) -> None:
    flags = ["--bank-rows", 2, "--bank-node-copy", tmp_path / "node", "--bank-huge-pages"]
    _, others = with_other(bank_path, {"other": other_path}, tokenizer_file, *flags)
    (bank,) = others["other"].banks
    assert bank.digest == open_bank(other_path, rows=2).digest
    assert bank.path == tmp_path / "node" / open_bank(other_path).digest
    with_match = np.abs(rows_read(others["other"])).sum(axis=1) > 0
    assert with_match.tolist() == [False, False, False, True, False, False, False, True]


def test_without_other_banks_nothing_is_opened(bank_path: Path, tokenizer_file: Path) -> None:
    assert with_other(bank_path, {}, tokenizer_file)[1] == {}
    _, settings = run_settings(tokenizer_file)
    assert other_memories({}, None, settings) == {}


def test_a_run_without_a_bank_or_with_several_has_no_place_for_another(
    bank_path: Path, other_path: Path, tokenizer_file: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^--other-bank: .*got a run with 2 banks; expected a run with one bank"):
        flags = ["--graft-bank", bank_path, other_path, "--graft-layers", 2, 3]
        with_other(bank_path, {"other": other_path}, tokenizer_file, *flags)
    for flags in ([], TABLES):
        args, settings = run_settings(tokenizer_file, *flags)
        memory = open_run_memory(settings, args)
        with pytest.raises(ConfigError, match=r"^--other-bank: .*got a run with no banks; .* Leave it out"):
            other_memories({"other": other_path}, memory, settings)


def test_another_tokenizer_is_refused(bank_path: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    make_bank(tmp_path / "foreign", COUNTS)
    with pytest.raises(IdentityError, match=rf"is not the tokenizer of the bank {tmp_path}/foreign"):
        with_other(bank_path, {"foreign": tmp_path / "foreign"}, tokenizer_file)


@pytest.mark.parametrize(
    ("layout", "described"),
    [
        ({"width": 6}, "bfloat16 elements, 6 of them"),
        ({"layers": (4, 8), "width": 2}, r"bfloat16 elements, 2 \+ 2 of them"),
        ({"row_dtype": "int8"}, "int8 elements, 4 of them"),
    ],
)
def test_rows_of_another_layout_are_refused(
    bank_path: Path, tmp_path: Path, tokenizer_file: Path, layout: dict[str, Any], described: str
) -> None:
    other = fitting_bank(tmp_path / "laid out", tokenizer_file, COUNTS, **layout)
    expected = rf"^--other-bank {other}: .*run's bank {bank_path} \(got {described}; expected bfloat16 elements, 4 of"
    with pytest.raises(IdentityError, match=expected):
        with_other(bank_path, {"other": other}, tokenizer_file)


def test_fewer_rows_than_the_run_uses_are_refused(bank_path: Path, tmp_path: Path, tokenizer_file: Path) -> None:
    small = fitting_bank(tmp_path / "small", tokenizer_file, {(6, 6): 2})
    with pytest.raises(ConfigError, match=rf"^--bank-rows: is more than the bank {small} has \(got 2"):
        with_other(bank_path, {"small": small}, tokenizer_file, "--bank-rows", 2)


def test_a_run_that_trains_its_rows_is_refused(bank_path: Path, other_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(ConfigError, match="--other-bank: has no rows to read in a run that trains its own"):
        with_other(bank_path, {"other": other_path}, tokenizer_file, "--graft-rows", "trained")
