"""The example script is told to stop before training: while texts, tokenizer, data and bank are made."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.main_job import make_job, run_script

pytestmark = [pytest.mark.slow, pytest.mark.functional]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_while_a_run_is_prepared_ends_all_that_was_started(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path / "inputs", tmp_path / "job")

    def left() -> list[list[str]]:
        return [process.cmdline() for process in psutil.process_iter() if _works_in(process, job.directory)]

    def building() -> bool:
        return any("build_bank.py" in word for command in left() for word in command)

    assert run_script(job, interrupt=(signal.Signals[name], building)).code == 128 + signal.SIGTERM
    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == [] and not (job.work / "bank").exists()


def _works_in(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == directory
    except psutil.Error:
        return False
