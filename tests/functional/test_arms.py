"""Two arms with two seeds in miniature, from the shell: texts, banks, runs side by side, a stop, records, a report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.arms_job import NAMES, STEPS, miniature
from tests.helpers.main_job import NUM_ROWS, REPOSITORY, read_records

# The first test pays for all that is trained.
pytestmark = [pytest.mark.slow, pytest.mark.functional, pytest.mark.timeout(1200)]


def start(tool: str, *arguments: object, directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, REPOSITORY / "tools" / f"{tool}.py", *arguments]
    return subprocess.Popen(
        [str(word) for word in command], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=560)
    finally:
        process.terminate()  # what it started leads sessions of its own, and would go on
    assert process.returncode == 0, output[-6000:]
    return output


def records_of(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "runs" / "miniature" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment, stopped when its first run had saved a checkpoint."""
    directory = tmp_path_factory.mktemp("arms") / "of my own"  # a path with spaces
    directory.mkdir()
    process = start("run_arms", miniature(directory), "--jobs", 2, directory=directory)
    saved = directory / "runs" / "miniature" / "none-seed1" / "checkpoints" / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 300
    try:
        while not saved.exists():
            assert process.poll() is None, process.communicate()[0][-6000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "a runner that was stopped must not look finished"
    return directory


@pytest.fixture(scope="module")
def finished(stopped: Path) -> Path:
    """The same, gone on with to its end."""
    finish(start("run_arms", stopped / "arms.yaml", "--jobs", 2, directory=stopped))
    return stopped


def steps_of(directory: Path, run: str) -> dict[int, float]:
    records = read_records(directory / "runs" / "miniature" / run)
    return {record["iteration"]: record["lm loss"] for record in records}


def test_every_run_is_recorded_once(finished: Path) -> None:
    records = records_of(finished)
    assert sorted(record["name"] for record in records) == sorted(NAMES)
    assert {record["steps"] for record in records} == {STEPS}
    assert {tuple(record["texts"]) for record in records} == {("heldout", "untouched", "mail")}


def test_arms_of_a_seed_start_alike_and_seeds_do_not(finished: Path) -> None:
    first = {name: steps_of(finished, name)[1] for name in NAMES}
    assert first["none-seed1"] == first["graft-seed1"]  # one backbone, one batch, and a fresh site changes nothing
    assert first["none-seed2"] == first["graft-seed2"]
    assert first["none-seed1"] != first["none-seed2"]
    assert steps_of(finished, "none-seed1")[STEPS] != steps_of(finished, "graft-seed1")[STEPS]


def test_a_stopped_run_went_on_from_its_checkpoint(finished: Path) -> None:
    log = (finished / "runs" / "miniature" / "none-seed1" / "log.txt").read_text(encoding="utf-8", errors="replace")
    assert "successfully loaded checkpoint" in log


def test_a_record_has_the_losses_of_every_document(finished: Path) -> None:
    for record in records_of(finished):
        text = record["texts"]["heldout"]
        documents = text["documents"]
        assert len(documents["source"]) == len(documents["loss"]) == len(documents["tokens"])
        assert sum(documents["tokens"]) == text["tokens"]
        assert sum(documents["loss"]) / text["tokens"] == pytest.approx(text["loss"], rel=1e-5)
        assert (text["memory_off"] is None) == (record["arm"] == "none")
        assert list(text["other_bank"]) == (["shuffled"] if record["arm"] == "graft" else [])
        assert record["texts"]["mail"]["memory_off"] is None
        assert set(text["by_order"]) >= {"miss", "2"}  # the arm without a bank is split by the same matches
    with_bank, without = ([r for r in records_of(finished) if r["arm"] == arm][0] for arm in ("graft", "none"))
    assert with_bank["parameters"]["stored"] == NUM_ROWS * with_bank["bank"]["row_dim"]
    assert with_bank["flops_per_token"]["sites"] > 0 == without["flops_per_token"]["sites"]


def test_checkpoints_are_gone_and_a_second_call_does_nothing(finished: Path) -> None:
    assert not list((finished / "runs" / "miniature").glob("*/checkpoints"))
    output = finish(start("run_arms", finished / "arms.yaml", directory=finished))
    assert "all 4 runs are finished" in output


def test_a_task_of_an_array_is_one_run_of_the_list(finished: Path) -> None:
    listed = finish(start("run_arms", finished / "arms.yaml", "--list", directory=finished))
    assert [line.split()[1] for line in listed.splitlines()] == NAMES
    output = finish(start("run_arms", finished / "arms.yaml", "--task", 3, directory=finished))
    assert "all 1 runs are finished" in output


def test_the_report_is_written_from_the_records(finished: Path) -> None:
    page = finished / "report.md"
    records = finished / "runs" / "miniature" / "records.jsonl"
    finish(start("compare_arms", finished / "arms.yaml", records, "--output", page, directory=finished))
    text = page.read_text(encoding="utf-8")
    assert "the bank pays" in text
    assert "no memory" in text
    losses = [record["texts"]["heldout"]["loss"] for record in records_of(finished) if record["arm"] == "none"]
    assert f"{sum(losses) / 2:.4f}" in text
