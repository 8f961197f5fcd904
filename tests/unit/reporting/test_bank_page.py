from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_graft.reporting.bank_page import bank_page, coverage_table, curve_table, stage_table, write_bank_page

PNG = b"\x89PNG\r\n\x1a\n"


def point(rows: int, second: float, third: float) -> dict[str, Any]:
    return {
        "rows": rows, "positions": 1000, "hit_rate": second + third, "share_by_order": {"2": second, "3": third},
        "documents": 3, "of_documents": 30, "of_positions": 9000,
    }  # fmt: skip


def norms(rows: int, not_finite: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = {"rows": rows, "not_finite": not_finite, "0": 1.25, "50": 12345.678, "100": None}
    return {"by_order": {"all": values, "2": values}, "by_donor_length": {"all": values, "1": values}}


@pytest.fixture
def report() -> dict[str, Any]:
    curve = [point(10, 0.1, 0.05), point(1000, 0.3, 0.125)]
    return {
        "bank": {
            "name": "bank", "digest": "ab" * 32, "num_rows": 1000, "rows_by_order": {"2": 600, "3": 400},
            "orders": [2, 3], "row_dim": 64, "row_dtype": "int8", "phantoms": 5, "smallest_count": 2,
            "largest_count": 9000, "control": None, "centred": True, "normalised": True, "tokenizer": "cd" * 32,
            "donor": {"name": "small", "revision": "ef" * 32, "layers": [3, 7], "hidden_size": 32},
        },
        "coverage": {"train": curve[-1]},
        "coverage_by_rows": {"train": curve},
        "norms": {"raw": {"7": norms(1000, not_finite=2)}, "stored": {"7": norms(1000)}},
        "keys": {
            "most_frequent": [{"row": 0, "text": " of the", "ids": [4, 5], "order": 2, "count": 9000}],
            "random": [
                {"row": 7, "text": "a`b|c\n", "ids": [1, 2, 3], "order": 3, "count": 17},
                {"row": 9, "text": None, "ids": [8, 9], "order": 2, "count": 16},
            ],
            "seed": 3,
        },
        "bytes": {"bank.json": 1500, "index.qbt": 12_800},
        "stages": {"pack": {"tasks": 2, "task_seconds": 75.0, "cpu_seconds": 60.0, "wall_seconds": None, "facts": {}}},
        "selection": {"skipped": {"no_text": 12, "blank": 3}, "rows_without_suffix": 4},
        "donor_tokens": {"tokens": 1150, "per_row": 1.15},
    }  # fmt: skip


def test_the_page_says_what_the_report_knows(report: dict[str, Any]) -> None:
    page = bank_page(report)
    for line in (
        "# Bank `bank`",
        "| rows | 1,000 (2: 600, 3: 400) |",
        "| row | 64 × int8, normalised and centred |",
        "| donor | small, layers 3, 7, `efefefefefef` |",
        "| size | 14,300 bytes |",
        "| passed over | no_text: 12, blank: 3 |",
        "| rows whose suffix is no key | 4 |",
        "| donor tokens | 1,150, 1.150 a row |",
        "| train | 1,000 | 42.5% | 30.0% | 12.5% | 57.5% |",
        "| 10 | 15.0% |",
        "train: 3 of 30 documents (1,000 of 9,000 positions)",
        "![Coverage by the number of rows](coverage.png)",
        "| donor length 1 | 1,000 | 1.25 | 1.235e+04 | – |",
        "**2 rows are not finite**",
        "| ` of the` | 2 | 9,000 | 0 |",
        "| 8 9 | 2 | 16 | 9 |",
        "## Random keys (seed 3)",
        "| pack | 2 | – | 1m15s | 1m00s |",
    ):
        assert line in page, line


def test_a_key_of_any_characters_stays_in_its_cell(report: dict[str, Any]) -> None:
    assert "| `` a`b\\|c\\n `` | 3 | 17 | 7 |" in bank_page(report)


def test_what_was_not_measured_has_no_place_on_the_page(report: dict[str, Any]) -> None:
    nothing = report | {
        "coverage": {}, "coverage_by_rows": {}, "stages": {}, "selection": None, "donor_tokens": None,
        "norms": {"raw": None, "stored": {}},
    }  # fmt: skip
    page = bank_page(nothing)
    assert coverage_table(nothing) == curve_table(nothing) == stage_table(nothing) == ""
    assert not [word for word in ("## Coverage", "## Norms", "## Stages", "donor tokens", "None") if word in page]


def test_report_page_and_plot_are_written(report: dict[str, Any], tmp_path: Path) -> None:
    write_bank_page(tmp_path / "out", report)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["coverage.png", "report.json", "report.md"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    plot = (tmp_path / "out/coverage.png").read_bytes()
    assert plot.startswith(PNG)
    more = report | {"coverage_by_rows": {"train": [point(10, 0.2, 0.05), point(1000, 0.3, 0.125)]}}
    write_bank_page(tmp_path / "out", more)
    assert (tmp_path / "out/coverage.png").read_bytes() != plot


def test_without_coverage_there_is_no_plot(report: dict[str, Any], tmp_path: Path) -> None:
    write_bank_page(tmp_path, report | {"coverage": {}, "coverage_by_rows": {}})
    assert not (tmp_path / "coverage.png").exists()
    assert "coverage.png" not in (tmp_path / "report.md").read_text()
