"""Report a finished run: report.json, report.md and loss.png in its directory, beside other arms if wanted.

Also keeps the figures of a README true. A figure is marked like this (nothing of it shows but the number):

    <!-- figure: runs/results/graft_moe/report.json#held_out.loss -->5.01<!-- /figure -->

The path is relative to the README. --update-readme rewrites each figure from its report, with the decimals, the
thousands separators and the percent sign that it has.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError
from megatron_graft.files import write_bytes_atomically
from megatron_graft.reporting.report import copy_report, load_report, write_report

MARK = re.compile(r"(<!-- figure: (?P<file>[^#<>]+)#(?P<key>[^<>]+?) -->)(?P<shown>[^<]*)(<!-- /figure -->)")
_SHOWN_NUMBER = re.compile(r"(?P<sign>\+?)-?(?P<whole>[\d,]+)(\.(?P<decimals>\d+))?(?P<percent>\s?%)?")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?", metavar="RUN", help="directory of the run")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="where the run was prepared (its stages' times)")
    parser.add_argument("--command", metavar="TEXT", help="the command that makes the run (default: its torchrun one)")
    parser.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="other arms, finished too")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="copy the three files there")
    parser.add_argument("--update-readme", type=Path, metavar="FILE", help="rewrite the marked figures of a README")
    arguments = parser.parse_args(argv)
    if arguments.run_dir is None and arguments.update_readme is None:
        parser.error("give a RUN, or --update-readme FILE")
    return arguments


def report_run(arguments: argparse.Namespace) -> None:
    """Write, print and copy the report of a run."""
    run_dir = arguments.run_dir
    report = write_report(
        run_dir, work_dir=arguments.work_dir, command=arguments.command, compare_with=arguments.compare
    )
    if report is None:
        print(f"{run_dir}: the run is not finished, nothing reported; give the same command again to resume it.")
        return
    print((run_dir / "report.md").read_text(encoding="utf-8"))
    if arguments.copy_to is not None:
        copy_report(run_dir, arguments.copy_to)


def updated_figures(text: str, root: Path) -> str:
    """``text`` with every marked figure as its report, a path relative to ``root``, has it."""
    return MARK.sub(lambda mark: mark[1] + _shown_like(_figure(mark, root), mark["shown"]) + mark[5], text)


def _figure(mark: re.Match[str], root: Path) -> Any:
    value: Any = load_report(root / mark["file"])
    for name in mark["key"].split("."):
        if not isinstance(value, dict) or value.get(name) is None:
            raise ConfigError(f"{mark['file']}#{mark['key']}", f"is no figure of the report: {name!r} is not there")
        value = value[name]
    return value


def _shown_like(value: Any, shown: str) -> str:
    """A value with the sign, separators, decimals and unit of the text that it replaces."""
    form = _SHOWN_NUMBER.fullmatch(shown)
    if form is None or not isinstance(value, (int, float)):
        return str(value)
    scale, unit = (100, form["percent"]) if form["percent"] else (1, "")
    separator = "," if "," in form["whole"] else ""
    return f"{value * scale:{form['sign']}{separator}.{len(form['decimals'] or '')}f}{unit}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)

    def body() -> None:
        if arguments.run_dir is not None:
            report_run(arguments)
        if arguments.update_readme is not None:
            readme: Path = arguments.update_readme
            if not readme.is_file():
                raise ConfigError("--update-readme", "is no file", got=readme, expected="a README with marked figures")
            text = updated_figures(readme.read_text(encoding="utf-8"), readme.parent)
            write_bytes_atomically(readme, text.encode())

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
