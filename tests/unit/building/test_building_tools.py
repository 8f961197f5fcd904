from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from tests.helpers.building import write_data_set
from tests.helpers.tokenizers import small_sentencepiece
from tools import build_bank, fetch_donor


@pytest.fixture
def arguments(data_prefix: str, recipient: TextTokenizer, donor_directory: Path, tmp_path: Path) -> list[str]:
    return [
        "--data-prefix", data_prefix, "--tokenizer-model", str(recipient.path), "--donor", str(donor_directory),
        "--donor-layers", "1", "--num-rows", "50", "--output", str(tmp_path / "bank"),
    ]  # fmt: skip


def test_a_bank_is_built_and_its_coverage_printed_and_stored(
    arguments: list[str], data_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_bank.main([*arguments, "--coverage", f"heldout={data_prefix}"]) == 0
    table = capsys.readouterr().out
    stored = json.loads((tmp_path / "bank.coverage.json").read_text())
    assert stored["bank"] == open_bank(tmp_path / "bank", verify="full").digest
    assert set(stored["data_sets"]) == {"train", "heldout"}
    assert 0.1 < stored["data_sets"]["train"]["hit_rate"] < 1
    assert f"{stored['data_sets']['heldout']['hit_rate']:.1%}" in table


def test_rows_are_stored_as_asked(arguments: list[str], tmp_path: Path) -> None:
    assert build_bank.main([*arguments, "--row-dtype", "int8"]) == 0
    assert open_bank(tmp_path / "bank", verify="full").manifest.identity.row_dtype == "int8"
    assert build_bank.main(arguments) == 2  # of other settings now


def test_a_control_is_made_from_a_bank(arguments: list[str], tmp_path: Path) -> None:
    assert build_bank.main(arguments) == 0
    control = ["--control", "shuffled", "--seed", "7", "--from-bank", str(tmp_path / "bank")]
    assert build_bank.main([*control, "--output", str(tmp_path / "shuffled")]) == 0
    found = open_bank(tmp_path / "shuffled").manifest.identity.control
    assert found is not None and (found.kind, found.seed) == ("shuffled", 7)


def test_data_of_another_tokenizer_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load_tokenizer(small_sentencepiece(tmp_path, vocab_size=380))
    prefix = tmp_path / "other"
    write_data_set(prefix, [other.encode("the whale was near")])
    write_sidecar(prefix, other)
    assert build_bank.main([*arguments, "--coverage", f"foreign={prefix}"]) == 2
    assert f"error: {prefix}: was tokenised by another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--coverage", "heldout"], "error: --coverage: is malformed (got heldout; expected NAME=PREFIX)"),
        (["--coverage", "heldout=nowhere"], "nowhere.idx: does not exist"),
        (["--seed", "-1", "--control", "random"], "error: --seed: "),
        (["--from-bank", "nowhere"], "error: --from-bank: needs --control"),
        (["--orders", "2", "4"], "error: --orders: "),
    ],
)
def test_bad_flags_are_named(
    arguments: list[str], more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_bank.main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


def test_a_flag_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_bank.main(["--output", str(tmp_path / "bank")]) == 2
    assert "error: --data-prefix: is missing" in capsys.readouterr().err


def test_fetching_an_unknown_donor_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_donor.main(["llama-9000", str(tmp_path / "donor")]) == 2
    assert "error: donor name: " in capsys.readouterr().err
