"""Writing the comparison of an experiment: the page, and beside it a directory with its plots and its summary."""

from __future__ import annotations

from pathlib import Path

from megatron_graft.errors import ConfigError
from megatron_graft.experiments.comparison import Summary, summarise
from megatron_graft.experiments.comparison_page import page_of
from megatron_graft.experiments.comparison_plots import NAMES, plots_of
from megatron_graft.experiments.experiment import Experiment
from megatron_graft.experiments.records import Records
from megatron_graft.files import storage_errors, write_bytes_atomically, write_json_atomically
from megatron_graft.reporting.figures import round_all

SUMMARY_FILE = "summary.json"


def write_comparison(experiment: Experiment, records: Records, output: Path, words: str = "") -> Summary:
    """Write ``output`` (Markdown), and ``summary.json`` and plots into the directory of its name without ``.md``.

    Plots of an earlier comparison that the records no longer give are removed. The same records give the same page and
    summary, byte for byte, in whatever order they were finished.

    Args:
        experiment: whose.
        records: its finished runs; some, or none, may be missing.
        output: the page.
        words: Markdown that is put behind the verdicts.

    Returns:
        The summary, numbers rounded as they are written.

    Raises:
        ConfigError: ``output`` has no ``.md`` at its end.
        StorageError: a file cannot be written.
    """
    if output.suffix != ".md":
        raise ConfigError(f"--output {output}", "is no Markdown file", expected="a name that ends with .md")
    beside = output.with_suffix("")
    summary: Summary = round_all(summarise(experiment, records))
    plots = plots_of(summary)
    for name, data in plots.items():
        write_bytes_atomically(beside / f"{name}.png", data)
    for name in NAMES:
        if name not in plots:
            with storage_errors(beside):
                (beside / f"{name}.png").unlink(missing_ok=True)
    write_json_atomically(beside / SUMMARY_FILE, summary)
    page = page_of(summary, {name: f"{beside.name}/{name}.png" for name in plots}, words)
    write_bytes_atomically(output, page.encode())
    return summary


def read_words(path: Path) -> str:
    """The prose that a page is given, Markdown.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--words {path}", f"cannot be read: {error}", expected="a Markdown file") from error
