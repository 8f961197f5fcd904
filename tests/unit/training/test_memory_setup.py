"""How a run opens its bank: all of it or its first rows, where it lies or from the node's copy."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_graft.bank.manifest import TokenizerIdentity
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import ConfigError, IdentityError
from megatron_graft.training.arguments import GraftSettings, add_graft_arguments, graft_settings
from megatron_graft.training.identity import memory_identity
from megatron_graft.training.memory_setup import RunMemory, open_run_memory
from tests.helpers.banks import bank_arguments, make_bank
from tests.helpers.tokenizers import small_sentencepiece
from tests.unit.training.test_arguments import MEGATRON_DEFAULTS

COUNTS = {(5, 6): 9, (7, 5, 6): 5, (6, 6): 3, (8, 7, 5, 6): 1}
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def bank_path(tmp_path: Path, tokenizer_file: Path) -> Path:
    tokenizer = load_tokenizer(tokenizer_file)
    arguments = bank_arguments(COUNTS, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    arguments["tokenizer"] = TokenizerIdentity(
        fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
    )
    write_bank(tmp_path / "bank", **arguments)  # type: ignore[arg-type]
    return tmp_path / "bank"


def run_memory(bank: Path, tokenizer_file: Path, *flags: str, seq_length: int = 16) -> RunMemory:
    args, settings = run_settings(bank, tokenizer_file, *flags, seq_length=seq_length)
    memory = open_run_memory(settings, args)
    assert memory is not None
    return memory


def run_settings(
    bank: Path, tokenizer_file: Path, *flags: str, seq_length: int
) -> tuple[argparse.Namespace, GraftSettings]:
    parser = add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(["--graft-bank", str(bank), "--graft-layers", "2", *flags])
    run: dict[str, Any] = {
        "num_layers": NUM_LAYERS, "tokenizer_model": str(tokenizer_file), "seq_length": seq_length, "seed": 1,
        "init_method_std": 0.02, "data_path": None, "train_data_path": None, "valid_data_path": None,
        "test_data_path": None,
    }  # fmt: skip
    for name, value in (MEGATRON_DEFAULTS | run).items():
        setattr(args, name, value)
    return args, graft_settings(args)


def rows_found(memory: RunMemory) -> list[int]:
    rows_BS, _ = memory.index.lookup(np.array([[8, 7, 5, 6, 6]]), eod=memory.bank.eod)
    return rows_BS[0].tolist()


def test_by_default_the_whole_bank_is_read_where_it_lies(bank_path: Path, tokenizer_file: Path) -> None:
    memory = run_memory(bank_path, tokenizer_file)
    assert (memory.bank.path, memory.bank.num_rows) == (bank_path, 4)
    assert memory.site.row_dim == memory.bank.row_dim == 4
    assert rows_found(memory) == [-1, -1, -1, 3, 2]


def test_with_fewer_rows_the_run_has_another_identity_and_other_matches(bank_path: Path, tokenizer_file: Path) -> None:
    whole, part = run_memory(bank_path, tokenizer_file), run_memory(bank_path, tokenizer_file, "--bank-rows", "2")
    assert part.bank.num_rows == 2
    assert rows_found(part) == [-1, -1, -1, 1, -1]
    assert memory_identity(part) == memory_identity(whole) | {"bank": open_bank(bank_path, rows=2).digest}
    assert memory_identity(part) != memory_identity(whole)
    assert memory_identity(run_memory(bank_path, tokenizer_file, "--bank-rows", "4")) == memory_identity(whole)


def test_a_copy_on_the_node_is_the_same_bank_read_elsewhere(
    bank_path: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    whole = run_memory(bank_path, tokenizer_file)
    flags = ["--bank-node-copy", str(tmp_path / "node"), "--graft-verify-bank", "full"]
    copied = run_memory(bank_path, tokenizer_file, *flags)
    assert copied.bank.path == tmp_path / "node" / whole.bank.digest
    assert memory_identity(copied) == memory_identity(whole)
    assert rows_found(copied) == rows_found(whole)
    part = run_memory(bank_path, tokenizer_file, *flags, "--bank-rows", "2")
    assert (part.bank.path, part.bank.num_rows) == (copied.bank.path, 2)


@pytest.mark.parametrize(
    "flags", [["--bank-huge-pages"], ["--bank-lookup-threads", "3"], ["--graft-lookup", "reference"]]
)
def test_how_the_bank_is_read_changes_no_answer_and_no_identity(
    bank_path: Path, tokenizer_file: Path, flags: list[str]
) -> None:
    whole, other = run_memory(bank_path, tokenizer_file), run_memory(bank_path, tokenizer_file, *flags)
    assert rows_found(other) == rows_found(whole)
    assert memory_identity(other) == memory_identity(whole)


def test_more_rows_than_the_bank_has_are_refused_by_flag(bank_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"^--bank-rows: is more than the bank {bank_path} has \(got 5; .* at most 4"
    ):
        run_memory(bank_path, tokenizer_file, "--bank-rows", "5")


def test_a_bank_that_does_not_fit_the_run_is_not_copied(bank_path: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    copy = ["--bank-node-copy", str(tmp_path / "node")]
    with pytest.raises(ConfigError, match="^--seq-length: is shorter"):
        run_memory(bank_path, tokenizer_file, *copy, seq_length=3)
    with pytest.raises(IdentityError, match="is not the tokenizer of the bank"):
        run_memory(make_bank(tmp_path / "foreign", {(1, 2): 3}).path, tokenizer_file, *copy)
    assert not (tmp_path / "node").exists()
