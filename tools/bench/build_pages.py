"""A run of the building bench as Markdown tables."""

from __future__ import annotations

from pages import TARGET_HEADER, Results, markdown_table, measured_on, number, target_rows

MARK = "<!-- Everything below is made by tools/bench/build.py --update-page. -->"


def building_tables(results: Results) -> str:
    """The generated part of docs/results/building.md."""
    parts = [measured_on(results), markdown_table(TARGET_HEADER, target_rows(results))]
    tables = {"count": _count, "memory": _memory, "encode": _encode}
    parts += [table(results[part]) for part, table in tables.items() if part in results]
    return "\n\n".join(parts) + "\n"


def _count(count: Results) -> str:
    ours = count["ours"]
    rows = [["ours, all stages, interpreter included", _seconds(ours), number(ours["peak_mib"])]]
    if "lmplz" in count:
        rows.append(["lmplz -o 5 --prune 0 1 1 1 1", _seconds(count["lmplz"]), "-"])
    kept = ", ".join(f"{order}: {amount:,}" for order, amount in ours["kept"].items())
    stages = ", ".join(f"{stage} {seconds:g}" for stage, seconds in ours["cpu_seconds_by_stage"].items())
    text = (
        f"{ours['tokens']:,} tokens of real text, n-grams kept by order: {kept}. Processor seconds by stage: {stages}."
    )
    if "equal_with_marks" in count:
        same = "the same numbers" if count["equal_with_marks"] else "OTHER numbers"
        text += f" With a line's marks as tokens, as lmplz has them, both keep {same} of n-grams."
    header = ["orders 2 to 5, at least twice", "processor s (wall s)", "peak MiB"]
    return markdown_table(header, rows) + "\n\n" + text


def _seconds(measured: Results) -> str:
    return f"{measured['cpu_seconds']:.1f} ({measured['wall_seconds']:.1f})"


def _memory(memory: Results) -> str:
    row = [
        f"{memory['corpus_mib']:,} MiB, {memory['tokens']:,} ids", f"{memory['memory_mib']:,}",
        f"{memory['peak_mib']:,.0f}", number(memory["mtok_per_cpu_s"]), str(memory["most_passes"]),
    ]  # fmt: skip
    header = [
        "synthetic ids", "bound, MiB", "peak, MiB, interpreter included", "M tokens/s/core",
        "passes over the table of kept n-grams, at most",
    ]  # fmt: skip
    return markdown_table(header, [row])


def _encode(encode: Results) -> str:
    names = {"packs": "packs (shared beginnings)", "whole": "whole texts, equal lengths together"}
    rows = [
        [name, number(encode["tokens_per_row"][way]), number(encode["rows_per_second"][way])]
        for way, name in names.items()
    ]
    layers = ", ".join(map(str, encode["layers"]))
    title = (
        f"{encode['donor']}, layer {layers}, {encode['dtype']}, {encode['threads']} threads, {encode['rows']:,} rows"
    )
    tables = [markdown_table([title, "donor tokens a row", "rows a second"], rows)]
    differences = []
    for layer, between in encode["difference"].items():
        differences.append([f"layer {layer}: packs from whole texts", *_shares(between)])
        for way, name in names.items():
            differences.append([f"layer {layer}: {name} from float64", *_shares(encode["from_float64"][layer][way])])
    header = ["difference of a row over its norm", "median", "99 %", "largest"]
    return "\n\n".join([*tables, markdown_table(header, differences)])


def _shares(differences: Results) -> list[str]:
    return [f"{differences[name]:.1e}" for name in ("median", "p99", "largest")]
