"""The tables of docs/benchmarks.md are those of the committed run, unedited."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = REPOSITORY / "runs" / "results" / "native"
PAGE = REPOSITORY / "docs" / "benchmarks.md"


def update(page: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench/lookup.py", "--markdown", RECORDS / "lookup.json"]
    command += ["--proof", RECORDS / "proof.json", "--update-page", page]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_page_shows_the_committed_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    ended = update(page)
    assert ended.returncode == 0, ended.stderr
    assert page.read_text() == PAGE.read_text()
    assert "| figure | promised | measured | verdict |" in page.read_text()


def test_a_table_edited_by_hand_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("| met |", "| surpassed |"))
    assert update(page).returncode == 0
    assert page.read_text() == PAGE.read_text()


def test_a_page_without_the_mark_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Benchmarks\n")
    ended = update(page)
    assert ended.returncode == 2 and "has no place for the tables" in ended.stderr
    assert page.read_text() == "# Benchmarks\n"
