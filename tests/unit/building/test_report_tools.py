"""tools/report_bank.py and ``--estimate``, on a recipient, its data and a donor that are really there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_graft.bank.reader import open_bank
from megatron_graft.data.sidecar import write_sidecar
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_graft.reporting.cost_page import shown_bytes
from tests.helpers.building import make_documents, write_data_set
from tests.helpers.tokenizers import small_sentencepiece
from tools import build_bank, report_bank


@pytest.fixture(scope="module")
def flags(
    data_prefix: str, recipient: TextTokenizer, donor_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    return [
        "--data-prefix", data_prefix, "--tokenizer-model", str(recipient.path), "--donor", str(donor_directory),
        "--donor-layers", "1", "--num-rows", "60", "--workers", "1", "--threads", "1",
        "--output", str(tmp_path_factory.mktemp("banks") / "bank"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bank(flags: list[str]) -> Path:
    assert build_bank.main(flags) == 0
    return Path(flags[-1])


@pytest.fixture(scope="module")
def other_prefix(recipient: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("other") / "heldout"
    write_sidecar(prefix, recipient)
    return write_data_set(prefix, [[*recipient.encode(text), recipient.eod] for text in make_documents(15, seed=9)])


def test_a_report_adds_to_what_the_build_measured(
    bank: Path, recipient: TextTokenizer, other_prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = [bank.with_name(f"bank.{name}.json") for name in ("report", "coverage")]
    before = [path.read_bytes() for path in beside]
    built = json.loads(before[0])
    output = tmp_path / "report"
    arguments = [str(bank), "--data", f"heldout={other_prefix}", "--tokenizer-model", str(recipient.path)]
    assert report_bank.main([*arguments, "--output", str(output)]) == 0
    assert [path.read_bytes() for path in beside] == before, "the bank may lie where nobody may write"
    printed = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    assert set(report["coverage"]) == {"train", "heldout"}
    assert report["coverage"]["train"] == built["coverage"]["train"]
    assert report["norms"]["raw"] == built["norms"]["raw"] and report["norms"]["raw"]["1"]["by_donor_length"]
    assert f"| heldout | {report['coverage']['heldout']['positions']:,} |" in printed and "| encode |" in printed
    assert report["donor_tokens"]["tokens"] > 60
    for key in report["keys"]["random"]:
        assert key["text"] == recipient.ngram_text(key["ids"])
    assert (output / "coverage.png").is_file() and "# Bank `bank`" in (output / "report.md").read_text()
    assert report_bank.main(arguments) == 0
    assert bank.with_name("bank.report").joinpath("report.json").is_file()
    coverage = json.loads(beside[1].read_text())
    assert set(coverage["data_sets"]) == {"train", "heldout"} and coverage["bank"] == open_bank(bank).digest


def test_a_bank_alone_is_reported(bank: Path, tmp_path: Path) -> None:
    assert report_bank.main([str(bank), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["keys"]["most_frequent"][0]["text"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "heldout"], "error: --data: is malformed (got heldout; expected NAME=PREFIX)"),
        (["--data", "a=b"], "error: --tokenizer-model: is missing"),
        (["--most-positions", "0"], "error: --most-positions: is too small"),
        (["--seed", "-1"], "error: --seed: is negative"),
        (["--log", "nowhere.jsonl"], "error: nowhere.jsonl: is no log of a build"),
    ],
)
def test_bad_flags_are_named(
    bank: Path, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_bank.main([str(bank), *more, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = load_tokenizer(small_sentencepiece(tmp_path, vocab_size=380))
    assert report_bank.main([str(bank), "--tokenizer-model", str(other.path)]) == 2
    assert "was made with another tokenizer than --tokenizer-model" in capsys.readouterr().err


def test_an_estimate_of_everything_is_what_the_build_finds(
    flags: list[str], bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = tmp_path / "planned"
    assert build_bank.main([*flags, "--output", str(planned), "--estimate", "--estimate-tokens", "1000000"]) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for order, number in open_bank(bank).manifest.provenance["selection"]["candidates_by_order"].items():
        assert f"| order {order} | {number:,} |" in printed
    assert "| all, with a text |" in printed and "Measured on the sample: count_tokens, donor_tokens" in printed
    rows = sum(file.stat().st_size for file in bank.glob("rows-*"))
    assert f"| bank: rows | {shown_bytes(rows)} |" in printed


def test_an_estimate_that_does_not_fit_is_shown_and_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = ["--output", str(tmp_path / "planned"), "--num-rows", str(10**13)]
    assert build_bank.main([*flags, *planned, "--estimate"]) == 0  # there are far fewer n-grams, and room for those
    assert "n-grams qualify for the 1e+13 rows asked for" in capsys.readouterr().out
    full = shutil.disk_usage(tmp_path)._replace(free=5000)
    for more in (["--estimate"], []):
        with monkeypatch.context() as patched:
            patched.setattr("megatron_graft.building.room.shutil.disk_usage", lambda _path: full)
            assert build_bank.main([*flags, *planned, *more]) == 2
        assert "has no room for this build (got 5,000 bytes free; expected about" in capsys.readouterr().err
    assert not list(tmp_path.glob("planned*"))
