"""A run's JSON as tables: on the terminal, and as the Markdown of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_graft.errors import ConfigError

Results = dict[str, Any]
MARK = "<!-- Everything below is made by tools/bench/lookup.py --update-page. -->"
TARGET_HEADER = ["figure", "promised", "measured", "verdict"]
_VERDICTS = {True: "met", False: "MISSED", None: "not measured"}


def target_rows(results: Results) -> list[list[str]]:
    """One row per target: name, promised, measured, verdict."""
    rows = []
    for target in results["targets"]:
        sign = "<=" if target["at_most"] else ">="
        unit = f" {target['unit']}" if target["unit"] not in ("", "x") else target["unit"]
        figure = "-" if target["figure"] is None else f"{number(target['figure'])}{unit}"
        promised = f"{sign} {number(target['limit'])}{unit}"
        rows.append([target["name"], promised, figure, _VERDICTS[target["met"]]])
    return rows


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to a common width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def markdown(results: Results) -> str:
    """The generated part of docs/benchmarks.md."""
    parts = [measured_on(results), markdown_table(TARGET_HEADER, target_rows(results))]
    if "lookup" in results:
        parts += [_designs(results["lookup"]), _pages(results["lookup"]), _workloads(results)]
    tables: dict[str, Callable[[Any], str]] = {
        "vocabularies": _vocabularies,
        "python": _python,
        "gather": _gather,
        "open": _opening,
    }
    parts += [table(results[part]) for part, table in tables.items() if part in results]
    return "\n\n".join(parts) + "\n"


def proof(record: Results) -> str:
    """What `make prove-lookup` found, in a sentence."""
    orders = ", ".join(f"{order}: {count:,}" for order, count in enumerate(record["positions_by_matched_order"]))
    return (
        f"`make prove-lookup`: {record['positions']:,} positions over {record['banks']:,} random and adversarial banks "
        f"({record['keys']:,} keys; bodies {', '.join(record['bodies'])}; seed {record['seed']}), "
        f"{record['incremental_positions']:,} of them one token at a time: {record['mismatches']:,} answers differ "
        f"from the brute-force oracle's. Positions by length of their match: {orders}.\n"
    )


def page_with(page: str, tables: str, where: object, mark: str = MARK) -> str:
    """A page with the tables below its mark, in place of those that stood there.

    Raises:
        ConfigError: the page has no mark.
    """
    if mark not in page:
        raise ConfigError(f"--update-page {where}", "has no place for the tables", expected=f"a line {mark}")
    return page[: page.index(mark)] + mark + "\n\n" + tables


def measured_on(results: Results) -> str:
    """Machine, load and commit, in a sentence."""
    machine, load = results["machine"], results["load"]
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    idle = "idle" if load["idle_at_start"] else f"NOT idle (busy share {load['busy_share_at_start']})"
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores ({caches}), {machine['memory_gib']} GiB, "
        f"kernel {machine['kernel']}, transparent huge pages `{machine['huge_pages']}`, {machine['compiler']}, "
        f"torch {machine['torch']}; the machine was {idle}, {load['stolen_share']:.1%} of its time went elsewhere. "
        f"Commit `{results['commit']}`."
    )


def _designs(lookup: Results) -> str:
    """Positions a second of every body and table."""
    rows = [
        [f"this index, {name}" if name != "ungrouped" else "this index, one position after the other",
         number(rates["text_mpos_per_s"]), number(rates["adversarial_mpos_per_s"]),
         number(lookup["build"]["bytes_per_entry"])]
        for name, rates in lookup.get("bodies", {}).items()
    ]  # fmt: skip
    for name, rates in lookup.get("tables", {}).items():
        speeds = [number(rates[f"{workload}_mpos_per_s"]) for workload in ("text", "adversarial")]
        rows.append([name, *speeds, number(rates["bytes_per_entry"])])
    header = ["design, one thread", "text, M positions/s", "adversarial, M positions/s", "bytes per entry"]
    return markdown_table(header, rows)


def _pages(lookup: Results) -> str:
    names = {"huge": "huge pages, private copy", "small": "4 KiB pages, private copy", "file": "the file's own pages"}
    rows = [
        [names[kind], number(page["text_mpos_per_s"]), number(page["adversarial_mpos_per_s"]),
         number(page["line_ns"]), number(page["text_share_of_limit"]),
         number(page["adversarial_share_of_limit"])]
        for kind, page in lookup.get("pages", {}).items()
    ]  # fmt: skip
    header = [
        "pages", "text, M positions/s", "adversarial, M positions/s", "random line, ns", "share of the limit, text",
        "share of the limit, adversarial",
    ]  # fmt: skip
    return markdown_table(header, rows)


def _workloads(results: Results) -> str:
    rows = []
    for source, title in (("lookup", "synthetic"), ("corpus", "real corpus")):
        for name, workload in results.get(source, {}).get("workloads", {}).items():
            shares = workload["share_by_order"]
            hits = ", ".join(f"{order}: {share:.3f}" for order, share in enumerate(shares) if order > 1)
            entries = results[source]["build"]["entries"]
            rate = results[source]["pages"]["huge"][f"{name}_mpos_per_s"]
            cells = [f"{entries:,}", number(workload["probes_per_position"]), number(rate)]
            rows.append([f"{title}, {name}", *cells, number(1 - shares[0]), hits])
    header = ["keys and queries", "entries", "probes per position", "M positions/s", "hit rate", "hits by order"]
    return markdown_table(header, rows)


def _vocabularies(items: list[Results]) -> str:
    rows = [[f"{item['vocab_size']:,}", f"{item['entries']:,}", number(item["bytes_per_entry"])] for item in items]
    return markdown_table(["vocabulary", "entries", "bytes per entry"], rows)


def _python(python: Results) -> str:
    titles = {
        "native": "this index, called from Python",
        "dict": "dict of tuples",
        "searchsorted": "torch.searchsorted",
    }
    rows = [
        [title, *(number(python[name][f"{workload}_mpos_per_s"]) for workload in ("text", "adversarial"))]
        for name, title in titles.items()
    ]
    return markdown_table([f"{python['entries']:,} entries", "text, M positions/s", "adversarial, M positions/s"], rows)


def _gather(gather: Results) -> str:
    rows = [
        [name, threads, number(case["gather"]["bytes_per_second"] / 1e9), number(case["share_of_copy_limit"]),
         number(case["times_memcpy_per_row"])]
        for threads, measured in gather["threads"].items()
        for name, case in measured["gathers"].items()
    ]  # fmt: skip
    return markdown_table(["row bytes", "threads", "GB/s", "share of the copy limit", "against memcpy per row"], rows)


def _opening(opening: Results) -> str:
    row = [f"{opening['entries']:,}", f"{opening['bytes'] / 1e9:.2f}"]
    row += [number(opening[name]) for name in ("from_disk_ms", "in_page_cache_ms", "again_ms")]
    header = ["entries of the bank", "GB", "from disk, ms", "in the page cache, ms", "again in the same process, ms"]
    return markdown_table(header, [row])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, or a whole number."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
