"""Writing and reading the report of a run: ``report.json``, ``report.md`` and ``loss.png`` in its directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_graft.errors import ConfigError
from megatron_graft.files import write_bytes_atomically, write_json_atomically
from megatron_graft.reporting.comparison import compare
from megatron_graft.reporting.figures import figures_of, round_all
from megatron_graft.reporting.page import PLOT_FILE, page_of
from megatron_graft.reporting.plot import plot_png
from megatron_graft.reporting.run_files import Run, read_json, read_run

REPORT_FILE = "report.json"
PAGE_FILE = "report.md"
FILES = (PLOT_FILE, PAGE_FILE, REPORT_FILE)  # in the order they are written: where the last is, all are


def write_report(
    run_dir: Path, *, work_dir: Path | None = None, command: str | None = None, compare_with: Sequence[Path] = ()
) -> dict[str, Any] | None:
    """Write the three files of a finished run's report.

    Args:
        run_dir: directory that the run was given as ``--graft-run-dir``.
        work_dir: where it was prepared, for the time that took.
        command: the command that makes the run, to be quoted.
        compare_with: directories of other arms, finished too.

    Returns:
        The report, or None (and nothing is written) if the run has not been evaluated at its last step.

    Raises:
        ConfigError: a directory holds no run, or a run to compare with is unfinished or was trained on other data, for
            other steps, or with another seed or batch.
        BankError, IdentityError: a run's bank is gone, damaged or another one.
        StorageError: the files cannot be written.
    """
    run = read_run(run_dir)
    if run is None:
        return None
    others = [_finished(directory) for directory in compare_with]
    figures = figures_of(run, work_dir, command)
    if others:
        figures["comparison"] = compare(run, others)
    report: dict[str, Any] = round_all(figures)
    write_bytes_atomically(run_dir / PLOT_FILE, plot_png(run, others))
    write_bytes_atomically(run_dir / PAGE_FILE, page_of(report).encode())
    write_json_atomically(run_dir / REPORT_FILE, report)
    return report


def copy_report(run_dir: Path, target: Path) -> None:
    """Copy the three files of a report, and nothing else, into the directory ``target``.

    Raises:
        StorageError: they cannot be written.
    """
    for name in FILES:
        write_bytes_atomically(target / name, (run_dir / name).read_bytes())


def load_report(path: Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        ConfigError: it is missing or not JSON.
    """
    report: dict[str, Any] = read_json(path, "Make it with tools/report.py.")
    return report


def _finished(directory: Path) -> Run:
    run = read_run(directory)
    if run is None:
        raise ConfigError(
            f"--compare {directory}", "is not finished", remedy="Run it again to resume, then compare.",
        )  # fmt: skip
    return run
