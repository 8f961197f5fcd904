"""The commands that only read a bank: ``tools/verify_bank.py`` and ``tools/inspect_bank.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_graft.bank.index_file import read_index_header
from megatron_graft.bank.manifest import INDEX_NAME, KEYS_NAME, Control, TokenizerIdentity, rows_name
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.tensorfile import read_header
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
    for depth in ("header", "sample", "full"):
        assert verify_bank.main([str(bank.path), "--depth", depth, "--threads", "2"]) == 0
        passed = f"{bank.path}: {depth} check passed, 3 rows x 4 bfloat16\ndigest {bank.digest}\n"
        assert capsys.readouterr().out == passed


def test_verify_reads_every_byte_unless_told_otherwise(bank, capsys):
    path = bank.path / rows_name(12)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert verify_bank.main([str(bank.path), "--depth", "header"]) == 0
    assert verify_bank.main([str(bank.path)]) == 2
    assert f"error: {path}: was altered" in capsys.readouterr().err


def test_verify_finds_an_altered_key_in_a_sample_and_not_by_header(bank, capsys):
    path = bank.path / KEYS_NAME
    entry = read_header(path)["key_ids"]
    bits = bytearray(path.read_bytes())
    bits[entry.offset + 4 * 3 - 4] ^= 1  # the newest token of row 0
    path.write_bytes(bits)
    assert verify_bank.main([str(bank.path), "--depth", "header"]) == 0
    assert verify_bank.main([str(bank.path), "--depth", "sample"]) == 2
    assert f"error: {bank.path}/" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["verify_bank", "inspect_bank"])
def test_the_tools_run_as_files_and_report_bad_input_in_one_line(tmp_path, tool):
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_inspect_names_a_seed_that_is_none(bank, capsys):
    assert inspect_bank.main([str(bank.path), "--seed", "-1"]) == 2
    assert "error: --seed: is negative (got -1; expected 0 or more)" in capsys.readouterr().err


def test_inspect_shows_identity_orders_and_keys(bank, capsys):
    assert inspect_bank.main([str(bank.path), "--keys", "2"]) == 0
    out = capsys.readouterr().out

    def size(name: str) -> int:
        return (bank.path / name).stat().st_size

    for line in (
        f"digest     {bank.digest}",
        "rows       3 x 4 bfloat16",
        "control    shuffled, seed 5",
        "provenance made_by: a test",
        f"keys       {size(KEYS_NAME):>18,} bytes in 1 file, {size(KEYS_NAME) / 3:,.1f} for each key",
        f"rows       {size(rows_name(12)):>18,} bytes in 1 file, {size(rows_name(12)) / 3:,.1f} for each row",
        f"index      {size(INDEX_NAME):>18,} bytes in 1 file, {size(INDEX_NAME) / 3:,.1f} for each entry",
        f"file       {size(INDEX_NAME):>18,} bytes  {bank.manifest.index.sha256[:12]}  {INDEX_NAME}",
        f"index      version 1, of keys {bank.manifest.identity.files[0].sha256[:12]} and tokenizer f0f0f0f0f0f0",
        "entries    3: rows 3, phantoms 0",
        "    2            2   66.7%             10          9        5        1",
        "    3            1   33.3%              5          5        5        5",
        "         0          9  2  [1, 2]",
        "         1          5  3  [7, 1, 2]",
    ):
        assert f"{line}\n" in out


def test_inspect_counts_phantoms_and_buckets_by_order(tmp_path, capsys):
    # (5, 6, 7) and (8, 6, 7) bring the node (6, 7), which is no key; 7 is one.
    make_bank(tmp_path / "bank", {(5, 6, 7): 4, (8, 6, 7): 3, (7,): 2, (1, 2): 1})
    assert inspect_bank.main([str(tmp_path / "bank")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "entries    5: rows 4, phantoms 1" in lines
    start = lines.index("order        entries       phantoms        buckets  filled") + 1
    table = [line.split() for line in lines[start : start + 3]]
    assert [row[:3] for row in table] == [["1", "1", "0"], ["2", "2", "1"], ["3", "2", "0"]]
    assert table[0][3:] == ["-", "-"]
    levels = read_index_header(tmp_path / "bank" / INDEX_NAME)["levels"]
    for row, level in zip(table[1:], levels, strict=True):
        assert row[3:] == [f"{level['buckets']:,}", f"{level['entries'] / level['buckets'] / 8:.1%}"]


def test_inspect_shows_a_part_of_a_bank_as_the_bank_that_it_is(bank, capsys):
    assert inspect_bank.main([str(bank.path), "--rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"digest     {open_bank(bank.path, rows=1).digest}" in lines
    assert f"part of    {bank.digest}, 1 of 3 rows" in lines
    assert "rows       1 x 4 bfloat16" in lines
    assert "    3            0    0.0%              0          -        -        -" in lines
    assert [line for line in lines if line.startswith("         ") and "[" in line] == [
        "         0          9  2  [1, 2]"
    ] * 2
    assert inspect_bank.main([str(bank.path), "--rows", "4"]) == 2
    assert "got 4; expected 1 to 3" in capsys.readouterr().err


def test_inspect_shows_the_root_mean_square_of_rows(tmp_path, capsys):
    arguments = bank_arguments({(1, 2): 9, (3, 4): 5}, row_dtype="int8")
    arguments["layers"] = {12: np.array([[3, -3, 3, 3], [0, 0, 0, 2]], dtype=np.int8)}
    arguments["scales"] = {12: np.array([0.5, 2.0], dtype=np.float32)}
    write_bank(tmp_path / "bank", **arguments)
    assert inspect_bank.main([str(tmp_path / "bank"), "--norms"]) == 0
    out = capsys.readouterr().out
    assert "         0          9  2   1.5000  [1, 2]\n         1          5  2   2.0000  [3, 4]\n" in out


def test_inspect_refuses_to_show_a_key_that_is_none(bank, capsys):
    path = bank.path / KEYS_NAME
    entry = read_header(path)["key_orders"]
    bits = bytearray(path.read_bytes())
    bits[entry.offset] = 200
    path.write_bytes(bits)
    assert inspect_bank.main([str(bank.path)]) == 2
    assert f"error: {path}: row 0 has an unlisted order" in capsys.readouterr().err


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
