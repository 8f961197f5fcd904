"""The report of a bank as one readable page, and its plot: coverage by the size of the bank."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_graft.files import write_bytes_atomically, write_json_atomically
from megatron_graft.log import format_seconds
from megatron_graft.reporting.page import NOTHING, markdown_table
from megatron_graft.reporting.plot import COLOURS, STYLE

PLOT_FILE, PAGE_FILE, REPORT_FILE = "coverage.png", "report.md", "report.json"
_NUMBERS = ("rows", "not_finite")
BankReport = Mapping[str, Any]


def write_bank_page(directory: Path, report: BankReport) -> None:
    """Write ``report.json``, ``report.md`` and, where coverage was measured, ``coverage.png``.

    Raises:
        StorageError: the file system refused a write.
    """
    write_json_atomically(directory / REPORT_FILE, report)
    if report["coverage"]:
        write_bytes_atomically(directory / PLOT_FILE, coverage_png(report))
    write_bytes_atomically(directory / PAGE_FILE, bank_page(report).encode())


def bank_page(report: BankReport) -> str:
    """The page of a report, Markdown."""
    plot = f"![Coverage by the number of rows]({PLOT_FILE})" if report["coverage"] else ""
    parts = [
        f"# Bank `{report['bank']['name']}`",
        _facts(report),
        _section("Coverage", coverage_table(report), _sampled(report), plot, curve_table(report)),
        _section("Norms", *_norms(report)),
        _section("Most frequent keys", _keys(report["keys"]["most_frequent"])),
        _section(f"Random keys (seed {report['keys']['seed']})", _keys(report["keys"]["random"])),
        _section("Files", _files(report["bytes"])),
        _section("Stages", stage_table(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def coverage_table(report: BankReport) -> str:
    """Share of positions by the order of their longest match, one data set a line; empty if none was measured."""
    if not report["coverage"]:
        return ""
    orders = [str(order) for order in report["bank"]["orders"]]
    heads = ["data set", "positions", "hit", *(f"order {order}" for order in orders), "miss"]
    rows = [
        [
            name, f"{shares['positions']:,}", f"{shares['hit_rate']:.1%}",
            *(f"{shares['share_by_order'][order]:.1%}" for order in orders), f"{1 - shares['hit_rate']:.1%}",
        ]
        for name, shares in report["coverage"].items()
    ]  # fmt: skip
    return markdown_table(heads, rows)


def curve_table(report: BankReport) -> str:
    """Hit rate by number of rows; empty if no coverage was measured."""
    curves = report["coverage_by_rows"]
    if not curves:
        return ""
    sizes = [point["rows"] for point in next(iter(curves.values()))]
    rows = [
        [f"{size:,}", *(f"{curve[place]['hit_rate']:.1%}" for curve in curves.values())]
        for place, size in enumerate(sizes)
    ]
    return markdown_table(["rows", *curves], rows)


def stage_table(report: BankReport) -> str:
    """Tasks, wall, task and processor seconds of every stage; empty if the build left no log."""
    rows = [
        [
            name, f"{stage['tasks']:,}",
            NOTHING if stage["wall_seconds"] is None else format_seconds(stage["wall_seconds"]),
            format_seconds(stage["task_seconds"]), format_seconds(stage["cpu_seconds"]),
        ]
        for name, stage in report["stages"].items()
    ]  # fmt: skip
    return markdown_table(["stage", "tasks", "wall", "all tasks", "processor"], rows) if rows else ""


def coverage_png(report: BankReport) -> bytes:
    """Hit rate against the number of rows, one line a data set, as the bytes of a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
        for number, (name, curve) in enumerate(report["coverage_by_rows"].items()):
            colour = COLOURS[number % len(COLOURS)]
            rows = [point["rows"] for point in curve]
            axes.plot(rows, [point["hit_rate"] for point in curve], "o-", color=colour, label=f"{name}, any order")
            longest = str(report["bank"]["orders"][-1])
            shares = [point["share_by_order"][longest] for point in curve]
            axes.plot(rows, shares, "o--", color=colour, alpha=0.5, markersize=4, label=f"{name}, order {longest}")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.set(title="Coverage", xlabel="rows of the bank", ylabel="share of positions that match")
        axes.legend()
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        pyplot.close(figure)
    return stream.getvalue()


def _section(title: str, *parts: str) -> str:
    present = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *present]) if present else ""


def _facts(report: BankReport) -> str:
    bank, donor = report["bank"], report["bank"]["donor"]
    steps = [word for word, done in (("normalised", bank["normalised"]), ("centred", bank["centred"])) if done]
    rows_by_order = ", ".join(f"{order}: {number:,}" for order, number in bank["rows_by_order"].items())
    lines = [
        ["rows", f"{bank['num_rows']:,} ({rows_by_order})"],
        ["row", f"{bank['row_dim']:,} × {bank['row_dtype']}, {' and '.join(steps) or 'as the donor gave them'}"],
        ["donor", f"{donor['name']}, layers {', '.join(map(str, donor['layers']))}, `{donor['revision'][:12]}`"],
        ["counts", f"{bank['smallest_count']:,} to {bank['largest_count']:,}"],
        ["digest", f"`{bank['digest'][:12]}`"],
        ["size", f"{sum(report['bytes'].values()):,} bytes"],
        ["nodes of the index that are no key", f"{bank['phantoms']:,}"],
    ]
    if bank["control"]:
        lines.append(["control", f"{bank['control']} rows"])
    lines += [[name, text] for name, text in _selection(report.get("selection") or {})]
    if report["donor_tokens"]:
        tokens = report["donor_tokens"]
        lines.append(["donor tokens", f"{tokens['tokens']:,.0f}, {tokens['per_row']:.3f} a row"])
    return markdown_table(["", ""], lines, numbers=False)


def _selection(selection: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "skipped" in selection:
        yield "passed over", ", ".join(f"{rule}: {number:,}" for rule, number in selection["skipped"].items())
    if "rows_without_suffix" in selection:
        yield "rows whose suffix is no key", f"{selection['rows_without_suffix']:,}"


def _sampled(report: BankReport) -> str:
    notes = [
        f"{name}: {shares['documents']:,} of {shares['of_documents']:,} documents "
        f"({shares['positions']:,} of {shares['of_positions']:,} positions)"
        for name, shares in report["coverage"].items()
    ]
    if not notes:
        return ""
    return (
        "Of a large data set a sample is looked up: whole documents, evenly spread, always the same ones. "
        f"{'; '.join(notes)}."
    )


def _norms(report: BankReport) -> Iterator[str]:
    for kind, title in (("raw", "The donor's states, before processing"), ("stored", "Rows, as stored")):
        for layer, norms in (report["norms"][kind] or {}).items():
            yield f"{title}, layer {layer}: quantiles of the Euclidean norm."
            rows = [
                [f"{label} {group}" if group != "all" else "all", f"{values['rows']:,.0f}",
                 *(_figure(value) for name, value in values.items() if name not in _NUMBERS)]
                for label, part in (("order", "by_order"), ("donor length", "by_donor_length"))
                for group, values in (norms[part] or {}).items()
                if group != "all" or part == "by_order"
            ]  # fmt: skip
            percents = [f"{name} %" for name in norms["by_order"]["all"] if name not in _NUMBERS]
            lost = norms["by_order"]["all"]["not_finite"]
            if lost:
                yield f"**{lost:,} rows are not finite** and left out."
            yield markdown_table(["rows of", "rows", *percents], rows)


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _keys(keys: list[dict[str, Any]]) -> str:
    rows = [
        [_code(key["text"]) if key["text"] is not None else " ".join(map(str, key["ids"])), str(key["order"]),
         f"{key['count']:,}", f"{key['row']:,}"]
        for key in keys
    ]  # fmt: skip
    return markdown_table(["key", "order", "count", "row"], rows)


def _code(text: str) -> str:
    """A key's text as code, spaces and control characters to be seen, whatever backticks it holds."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    fence = "`" * (1 + max((len(run) for run in _runs_of_backticks(shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"`{shown}`"


def _runs_of_backticks(text: str) -> list[str]:
    return [run for run in "".join(letter if letter == "`" else " " for letter in text).split() if run]


def _files(sizes: Mapping[str, int]) -> str:
    rows = [[name, f"{size:,}"] for name, size in sizes.items()]
    return markdown_table(["file", "bytes"], [*rows, ["all", f"{sum(sizes.values()):,}"]])
