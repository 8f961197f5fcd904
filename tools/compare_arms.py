"""Compare the arms of an experiment from the records of its finished runs: page, plots, and summary.json.

The page says first what became of each hypothesis; what has not been run yet is listed at its end. How arms are
compared was fixed beforehand and stands in megatron_graft/experiments/statistics.py. A figure of summary.json can be
shown in a README, which tools/report.py --update-readme keeps true.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.experiments.comparison_page import verdict_sentence
from megatron_graft.experiments.comparison_report import read_words, write_comparison
from megatron_graft.experiments.experiment import load_experiment
from megatron_graft.experiments.records import load_records


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="YAML", help="the experiment")
    parser.add_argument("records", type=Path, nargs="?", metavar="FILE",
                        help="JSON lines, one for each finished run (default: runs/NAME/records.jsonl)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="PAGE.md",
                        help="the page; plots and summary.json go to the directory PAGE (default: comparison.md beside "
                        "the records)")  # fmt: skip
    parser.add_argument("--words", type=Path, metavar="FILE", help="Markdown to put behind the verdicts")
    return parser.parse_args(argv)


def _compare(arguments: argparse.Namespace) -> None:
    experiment = load_experiment(arguments.experiment)
    path = arguments.records or Path("runs") / experiment.name / "records.jsonl"
    output = arguments.output or path.with_name("comparison.md")
    words = read_words(arguments.words) if arguments.words else ""
    summary = write_comparison(experiment, load_records(path, experiment), output, words)
    for name, one in summary["hypotheses"].items():
        print(verdict_sentence(name, one).replace("**", ""))
    print(f"{summary['runs']['finished']} of {summary['runs']['planned']} runs; written to {output}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: _compare(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
