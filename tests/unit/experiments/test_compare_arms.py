"""The page of a comparison, made by the command: what it says, in which order, and from partial results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.experiments import statistics
from megatron_graft.experiments.comparison_details import sweeps_of, training_section
from megatron_graft.experiments.comparison_numbers import interval, level, loss, marked, signed, with_sd
from megatron_graft.experiments.comparison_plots import minus_stand_in
from tests.helpers.arm_records import all_records, make_record, write_experiment, write_records
from tools import compare_arms
from tools.report import updated_figures

HEADINGS = [
    "Verdicts", "Arms", "By source, and on foreign texts", "By length of match", "Where the differences come from",
    "By length of match and frequency of the key", "Loss against tokens", "Further arms", "Sweeps", "After tuning",
    "Sites", "Memory off, and other rows, after training", "What is not run yet", "Made by",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics.resampled_ratios, "__defaults__", (200, statistics.BOOTSTRAP_SEED))


def compare(directory: Path, records: list[dict[str, Any]], *flags: str) -> str:
    write_experiment(directory)
    path = write_records(directory / "records.jsonl", records)
    page = directory / "results" / "arms.md"
    command = [str(directory / "arms.yaml"), str(path), "--output", str(page), *flags]
    assert compare_arms.main(command) == 0
    return page.read_text()


def headings(page: str) -> list[str]:
    return re.findall(r"^## (.+)$", page, re.MULTILINE)


def section(page: str, heading: str) -> str:
    return page.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_a_page_of_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.md").write_text("What we make of it.\n")
    experiment = write_experiment(tmp_path)
    records = all_records(experiment)
    page = compare(tmp_path, records, "--words", str(tmp_path / "words.md"))
    assert page.startswith("# Small arms\n") and "21 of 21 runs are finished" in page
    assert headings(page) == HEADINGS
    assert page.index("**H1 shown**") < page.index("What we make of it.") < page.index("## Arms")
    assert "H2 shown: a bank added beats the table alone; `sum` − `engram` = −0.10" in capsys.readouterr().out
    assert re.search(r"Without a hypothesis.*\n\n.*\n.*\n\| `sum_shuffled` − `none` \| −0\.", section(page, "Verdicts"))
    assert "Nothing: every run" in section(page, "What is not run yet")
    assert "| `graft`: bank alone | one seed |" in section(page, "Further arms")
    assert [line for line in section(page, "Sweeps").splitlines() if line.startswith("###")] == [
        "### Bank size",
        "### Donor layer",
    ]
    assert "| 500 | `rows_500` | one seed |" in page and "| tokens, `sum` | 2 | 900 | 1,500 | 3,000 |" in page
    for name in re.findall(r"!\[.+?\]\((.+?)\)", page):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    plots = {"differences", "by_order", "tokens", "sweeps", "coverage"}
    assert {file.stem for file in (tmp_path / "results" / "arms").glob("*.png")} == plots
    again = tmp_path / "again"
    again.mkdir()
    assert compare(again, records[::-1], "--words", str(tmp_path / "words.md")) == page


def test_every_number_of_the_first_table_is_in_the_summary(tmp_path: Path) -> None:
    records = [make_record(arm, seed) for arm in ("none", "sum") for seed in (1, 2)]
    page = compare(tmp_path, records)
    summary = json.loads((tmp_path / "results" / "arms" / "summary.json").read_text())
    arm = summary["arms"]["sum"]
    text = arm["texts"]["heldout"]
    row = next(line for line in section(page, "Arms").splitlines() if line.startswith("| `sum`"))
    assert row.strip("| ").split(" | ") == [
        "`sum`: both summed", "2", "6.00 M", "0.00 M", "0.02 M", "16", "12.00 M",
        f"{text['loss']['mean']:.4f} ± {text['loss']['sd']:.4f}",
        f"{text['bits_per_byte']['mean']:.4f} ± {text['bits_per_byte']['sd']:.4f}",
        f"{with_sd(text['minus']['none'], sign='+')} {interval(text['minus']['none']['documents'])}",
    ]  # fmt: skip


def test_a_sweeps_lines_ascend_and_tell_what_the_varied_thing_did(tmp_path: Path) -> None:
    page = compare(tmp_path, [make_record(arm, 1) for arm in ("rows_1000", "rows_500", "rows_100", "layer_9")])
    change = json.loads((tmp_path / "results" / "arms" / "summary.json").read_text())["arms"]["rows_100"]["varies"]
    assert change["arm"] == "rows_1000" and 0.05 < change["difference"]["mean"] < 0.13
    lines = [line.split(" | ") for line in section(page, "Sweeps").splitlines() if line.startswith("| ")]
    head, rows = lines[0], [line for line in lines if line[1].startswith("`rows")]
    assert [row[0] for row in rows] == ["| 100", "| 500", "| 1,000"]
    column = head.index("− unchanged arm")
    assert rows[0][column] == f"{signed(change['difference']['mean'])} {interval(change['difference']['documents'])}"
    assert rows[2][column] == "–"


def test_what_was_tuned_is_told_in_full_and_on_every_other_text(tmp_path: Path) -> None:
    page = compare(tmp_path, [make_record(arm, seed) for arm in ("none", "sum", "tuned") for seed in (1, 2, 3)])
    told = json.loads((tmp_path / "results" / "arms" / "summary.json").read_text())["round"]
    lines = [line.strip("| ").split(" | ") for line in section(page, "After tuning").splitlines()]
    in_full, elsewhere = (line for line in lines if line[0] == "`tuned` − `sum`")
    found = told["arms"]["tuned"]["minus"]["sum"]
    seeds = [signed(found["by_seed"][seed]) for seed in ("1", "2", "3")]
    assert in_full[1:3] == [signed(found["mean"]), interval(found["documents"])] and in_full[4:7] == seeds
    varied, baseline = told["pairs"]
    assert (varied["second"], baseline["second"]) == ("sum", "none")
    assert list(varied["texts"]) == ["untouched", "heldout", "email"]
    means = [signed(varied["texts"][text]["mean"]) for text in ("heldout", "email")]
    assert [cell.strip("*†") for cell in elsewhere[1:]] == means
    assert [line for line in lines if line[0] == "`tuned` − `none`"]


@pytest.mark.parametrize(
    "values",
    [
        ["x 0.33", "x 1", "x 5", "x 15"], ["2", "2 and 3", "2 to 4", "2 to 6"], ["1e-3", "2e-3", "4e-3"],
        ["9,375", "37,500"], ["6", "30", "all five"], ["raw", "centred"],
    ],
)  # fmt: skip
def test_values_of_a_sweep_ascend(values: list[str]) -> None:
    arms = {value: {"sweeps": {"one": value}} for value in values}
    if values[0] != "raw":  # words stay as they come
        arms = dict(reversed(arms.items()))
    assert list(sweeps_of({"arms": arms})["one"]) == values


def test_what_stands_in_for_the_baseline_lies_at_zero_on_a_sweeps_plot(tmp_path: Path) -> None:
    compare(tmp_path, [make_record(arm, 1) for arm in ("none", "engram", "rows_500")])
    summary = json.loads((tmp_path / "results" / "arms" / "summary.json").read_text())
    arms = {name: summary["arms"][name] for name in ("rows_500", "none")}
    found = minus_stand_in(summary, arms)
    assert list(found) == ["rows_500", "none"] and found["none"]["mean"] == 0
    assert found["rows_500"] == arms["rows_500"]["texts"]["heldout"]["minus"]["none"]
    assert minus_stand_in(summary, {"none": arms["none"]}) == {}


def test_arms_of_other_lengths_are_followed_against_those_that_stand_in(tmp_path: Path) -> None:
    records = [make_record(arm, seed) for arm in ("none", "engram", "graft") for seed in (1, 2, 3)]
    compare(tmp_path, records)
    summary = json.loads((tmp_path / "results" / "arms" / "summary.json").read_text())
    assert "Of further arms" not in "".join(training_section(summary, {}))
    summary["arms"]["graft"]["against"] = {"none": "long_none", "sum": "long_sum"}  # the latter has not been run
    at = summary["arms"]["graft"]["training"]["minus"]["none"]["at"]
    lines = [line for part in training_section(summary, {}) for line in part.splitlines() if "long_" in line]
    cells = [with_sd(at[share], sign="+") for share in ("15", "25", "50", "75", "100")]
    tokens = f"{summary['arms']['graft']['tokens_seen'] / 1e6:.2f} M"
    assert [line.strip("| ").split(" | ") for line in lines] == [["`graft` − `long_none`", "one seed", tokens, *cells]]


def test_a_readme_can_show_a_figure(tmp_path: Path) -> None:
    compare(tmp_path, [make_record(arm, 1) for arm in ("none", "engram")])
    key = "arms/summary.json#arms.engram.texts.heldout.minus.none.mean"
    shown = updated_figures(f"<!-- figure: {key} -->-9.999<!-- /figure -->", tmp_path / "results")
    assert re.search(r"-->-0\.(09|10)\d<!--", shown)


def test_partial_results_make_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    page = compare(tmp_path, [make_record("none", 1), make_record("none", 2), make_record("engram", 1)])
    assert "**H1 open** (1 of 3 seeds have been run): a table beats no memory; `engram` − `none` = " in page
    assert "**H2 open** (not run yet): a bank added beats the table alone." in page
    missing = section(page, "What is not run yet")
    assert "- `none`: seed 3" in missing and "- `sum`: seed 1, 2, 3" in missing and "- `graft`: seed 1" in missing
    assert not {"Further arms", "Sweeps", "After tuning", "Sites"} & set(headings(page))
    assert "nan" not in page and "None" not in page.replace("None has been run yet", "")


def test_no_run_at_all_makes_a_page_and_old_plots_go(tmp_path: Path) -> None:
    compare(tmp_path, [make_record("none", 1), make_record("engram", 1)])
    beside = tmp_path / "results" / "arms"
    (beside / "mine.png").write_bytes(b"")
    assert (beside / "differences.png").is_file()
    page = compare(tmp_path, [])
    assert "0 of 21 runs are finished" in page and "None has been run yet." in page
    assert sorted(file.name for file in beside.iterdir()) == ["mine.png", "summary.json"]


def test_a_run_that_is_set_aside_or_diverged_is_told(tmp_path: Path) -> None:
    diverged = make_record("engram", 1)
    text = diverged["texts"]["heldout"]
    text["loss"] = text["documents"]["loss"][0] = None
    diverged["training"]["loss"][-1] = None
    page = compare(tmp_path, [make_record("none", 1), diverged, make_record("graft", 5)])
    missing = section(page, "What is not run yet")
    assert "loss that is not finite, and so without a mean: `engram`, seed 1." in missing
    assert "- `graft`, seed 5: the experiment asks for seeds 1" in missing


def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(tmp_path)
    path = write_records(tmp_path / "records.jsonl", [make_record("none", 1)])
    for flags, message in (
        (["--output", str(tmp_path / "page.txt")], "is no Markdown file"),
        (["--words", str(tmp_path / "nothing.md")], "cannot be read"),
    ):
        assert compare_arms.main([str(tmp_path / "arms.yaml"), str(path), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("page*")) and not (tmp_path / "comparison.md").exists()


def test_numbers_are_written_alike() -> None:
    assert (loss(5.01234), signed(-0.05), signed(0.05, 2)) == ("5.0123", "−0.0500", "+0.05")
    assert (loss(None), loss(float("nan")), level(1 - 0.05 / 6)) == ("–", "not finite", "99.17 %")
    assert (with_sd({"mean": 1.0, "sd": None}), with_sd({"mean": 1.0, "sd": 0.5}, 1)) == ("1.0000", "1.0 ± 0.5")
    sides = {(-0.2, -0.1): "**−0.1500**", (-0.2, 0.1): "−0.1500", (0.1, 0.2): "**−0.1500**"}
    for (low, high), text in sides.items():
        assert marked({"mean": -0.15, "documents": {"low": low, "high": high}, "by_seed": {"1": -0.15}}) == text
    assert (marked(None), marked({"mean": -0.15, "documents": None})) == ("–", "−0.1500")


def test_a_difference_beyond_both_intervals_has_a_mark() -> None:
    found = {"mean": -0.15, "documents": {"low": -0.2, "high": -0.1}, "by_seed": {"1": -0.16, "2": -0.14}}
    for high, text in ((-0.01, "**−0.1500**†"), (0.01, "**−0.1500**")):
        assert marked(found | {"over_seeds": {"low": -0.3, "high": high}}) == text


def test_a_difference_whose_sign_hangs_on_the_seed_is_not_bold() -> None:
    by_seed = {"1": -0.4, "2": 0.1}
    assert marked({"mean": -0.15, "documents": {"low": -0.2, "high": -0.1}, "by_seed": by_seed}) == "−0.1500"
