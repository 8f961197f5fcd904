"""The commands that only read a bank: ``tools/verify_bank.py`` and ``tools/inspect_bank.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_graft.bank.manifest import Control, TokenizerIdentity, rows_name
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.data.tokenizer import load_tokenizer
from tests.helpers.banks import bank_arguments, make_bank
from tests.helpers.tokenizers import small_sentencepiece
from tools import inspect_bank, verify_bank

COUNTS = {(1, 2): 9, (7, 1, 2): 5, (4, 4): 1}
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def bank(tmp_path) -> Bank:
    return make_bank(tmp_path / "bank", COUNTS, control=Control(kind="shuffled", seed=5))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    return small_sentencepiece(tmp_path_factory.mktemp("tokenizer"))


def test_verify_prints_the_digest_of_a_sound_bank(bank, capsys):
    for depth in ("header", "full"):
        assert verify_bank.main([str(bank.path), "--depth", depth]) == 0
        assert capsys.readouterr().out == (f"{bank.path}: {depth} check passed, 3 rows x 4\ndigest {bank.digest}\n")


def test_verify_reads_every_byte_unless_told_otherwise(bank, capsys):
    path = bank.path / rows_name(12)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert verify_bank.main([str(bank.path), "--depth", "header"]) == 0
    assert verify_bank.main([str(bank.path)]) == 2
    assert f"error: {path}: was altered" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["verify_bank", "inspect_bank"])
def test_the_tools_run_as_files_and_report_bad_input_in_one_line(tmp_path, tool):
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_inspect_shows_identity_orders_and_keys(bank, capsys):
    assert inspect_bank.main([str(bank.path), "--keys", "2"]) == 0
    out = capsys.readouterr().out
    for line in (
        f"digest     {bank.digest}",
        "rows       3 x 4 bfloat16",
        "control    shuffled, seed 5",
        "provenance made_by: a test",
        "    2            2   66.7%             10          9        5        1",
        "    3            1   33.3%              5          5        5        5",
        "         0          9  2  [1, 2]",
        "         1          5  3  [7, 1, 2]",
    ):
        assert f"{line}\n" in out


def test_inspect_shows_keys_as_text_with_the_banks_own_tokenizer(tmp_path, tokenizer_file, capsys):
    tokenizer = load_tokenizer(tokenizer_file)
    key = tuple(tokenizer.encode(" the whale"))
    arguments = bank_arguments({key: 3}, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod)
    arguments["tokenizer"] = TokenizerIdentity(
        fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
    )
    write_bank(tmp_path / "bank", **arguments)
    assert inspect_bank.main([str(tmp_path / "bank"), "--tokenizer", str(tokenizer_file)]) == 0
    assert "' the whale'" in capsys.readouterr().out


def test_inspect_refuses_another_tokenizer(bank, tokenizer_file, capsys):
    assert inspect_bank.main([str(bank.path), "--tokenizer", str(tokenizer_file)]) == 2
    assert "is not the tokenizer of this bank" in capsys.readouterr().err
    assert open_bank(bank.path).digest == bank.digest
